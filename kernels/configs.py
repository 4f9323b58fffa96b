"""Launch table of the row kernels. Fixed, so that a user's first call never tunes; dated rows.

A row of V logits is read in tiles of BLOCK_V by num_warps warps, at most 8 logits per thread.
"""

from typing import NamedTuple

import triton


class Launch(NamedTuple):
    """Tile width in logits and warps per program."""

    BLOCK_V: int
    num_warps: int


# (largest V of the row, launch). 2026-11: chosen from registers and spills of the compiled kernels
# on sm_80 to sm_120 and gfx942 with Triton 3.6 and 3.9; tiles of 4096 by 8 or 16 warps spill in
# some case. Not timed on a GPU yet.
ROW_LAUNCHES = (
    (512, Launch(512, 4)),
    (1024, Launch(1024, 4)),
)
WIDE_ROW = Launch(2048, 8)

# Launch option of every row kernel: with fused multiply-adds the backward would see other logits
# than the forward, by up to half an ulp of z.
ENABLE_FP_FUSION = False


def row_launch(V: int) -> Launch:
    """Launch of a row kernel for a vocabulary of V."""
    for limit, launch in ROW_LAUNCHES:
        if limit >= V:
            return Launch(min(launch.BLOCK_V, max(16, triton.next_power_of_2(V))), launch.num_warps)
    return WIDE_ROW
