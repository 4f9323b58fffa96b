"""Launch table of the row kernels. Fixed, so that a user's first call never tunes; dated rows.

A row of V logits is read in tiles of BLOCK_V by num_warps warps: 16 logits per thread and tile.
"""

from typing import NamedTuple

import triton


class Launch(NamedTuple):
    """Tile width in logits and warps per program."""

    BLOCK_V: int
    num_warps: int


# (largest V of the row, launch). 2026-11: chosen from registers and spills of the compiled kernels
# on sm_80 to sm_120 and gfx942; not timed on a GPU yet.
ROW_LAUNCHES = (
    (1024, Launch(1024, 4)),
    (2048, Launch(2048, 4)),
)
WIDE_ROW = Launch(4096, 8)


def row_launch(V: int) -> Launch:
    """Launch of a row kernel for a vocabulary of V."""
    for limit, launch in ROW_LAUNCHES:
        if limit >= V:
            return Launch(min(launch.BLOCK_V, max(16, triton.next_power_of_2(V))), launch.num_warps)
    return WIDE_ROW
