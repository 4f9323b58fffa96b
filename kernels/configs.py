"""Launch table of the row kernels. Fixed, so that a user's first call never tunes; dated rows.

A tile of logits is STRIPS strips of THREADS threads with VEC neighbours each: one load instruction
of 16 bytes for each strip.
"""

from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """Shape of a tile; THREADS threads are one program."""

    STRIPS: int
    THREADS: int
    VEC: int


# A row is summed in parts of so many logits, whoever sums them: a program of its own for each part,
# where there are few rows, gives the same bits as one for all. A multiple of every tile.
SEGMENT = 65536

# Launch option of every row kernel: a fused multiply-add that the compiler chooses would differ
# between forward and backward. Those that are wanted are written out.
ENABLE_FP_FUSION = False

FORWARD_STRIPS = {2: 2, 4: 4}
BACKWARD_STRIPS = {2: 4, 4: 4}


def warp_size() -> int:
    """Threads of a warp on the current device."""
    if triton.knobs.runtime.interpret:
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size


def is_aligned(x: torch.Tensor) -> bool:
    """Whether every row of x (B, T, V) starts at a multiple of 16 bytes."""
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:2]))
    return all(step % 16 == 0 for step in steps)


def _options(V: int, strips: int, vec: int, softcap: bool) -> dict[str, object]:
    if vec == 1:
        strips *= 4
    if softcap:
        strips //= 2
    threads = 128 if V <= 4096 else 256
    while strips > 1 and strips * threads * vec >= 2 * V:
        strips //= 2
    return {
        "STRIPS": strips,
        "THREADS": threads,
        "VEC": vec,
        "num_warps": threads // warp_size(),
        "enable_fp_fusion": ENABLE_FP_FUSION,
    }


def forward_launch(logits: torch.Tensor, softcap: float | None) -> dict[str, object]:
    """Launch that reads rows of logits (B, T, V)."""
    size = logits.element_size()
    vec = 16 // size if is_aligned(logits) else 1
    return {"SEGMENT": SEGMENT, **_options(logits.shape[2], FORWARD_STRIPS[size], vec, softcap is not None)}


def backward_launch(logits: torch.Tensor, out: torch.Tensor, softcap: float | None) -> dict[str, object]:
    """Launch that reads rows of logits and writes their gradient."""
    size = out.element_size()
    vec = 16 // size if is_aligned(logits) and is_aligned(out) else 1
    return _options(logits.shape[2], BACKWARD_STRIPS[size], vec, softcap is not None)
