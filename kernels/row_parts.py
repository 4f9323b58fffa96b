"""Few rows: a program for each segment of a row, whose statistics the kernel of the row merges."""

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.configs import FEW_ROWS, segments
from grpo_fast.kernels.lang import row_factors, row_pointer
from grpo_fast.kernels.launch import PER_CALL
from grpo_fast.kernels.row_stats import store_part


@triton.jit(
    do_not_specialize=PER_CALL,
    do_not_specialize_on_alignment=["ids_ptr", "active_ptr", "inv_temperature_ptr"],
)
def row_parts_kernel(
    logits_ptr,
    ids_ptr,
    active_ptr,
    parts_ptr,
    T,
    stride_b,
    stride_t,
    V,
    scale,
    softcap,
    inv_temperature,
    inv_temperature_ptr,
    HAS_MASK: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    """parts[n, s] = raw, rest, dot of segment s of row n; where active[n] == 0 nothing."""
    n = tl.program_id(0).to(tl.int64)
    active = True
    if HAS_MASK:
        active = tl.load(active_ptr + n) != 0
    if HAS_ROW_TEMPERATURE:
        inv_temperature = tl.load(inv_temperature_ptr + n).to(tl.float32)
    if active:
        store_part(
            row_pointer(logits_ptr, n, T, stride_b, stride_t, VEC),
            tl.load(ids_ptr + n).to(tl.int32),
            V,
            row_factors(scale, softcap, inv_temperature, HAS_SOFTCAP, NEGATIVE),
            parts_ptr,
            n,
            tl.program_id(1).to(tl.int64),
            HAS_ENTROPY,
            HAS_SOFTCAP,
            NEGATIVE,
            SEGMENT,
            STRIPS,
            THREADS,
            VEC,
        )


def is_shared(logits: torch.Tensor) -> bool:
    """Whether the rows of logits (B, T, V) are so few and long that programs share one."""
    B, T, V = logits.shape
    return B * T < FEW_ROWS and segments(V) > 1


def row_parts(
    logits: torch.Tensor,
    ids: torch.Tensor,
    active: torch.Tensor | None,
    entropy: bool,
    arguments: dict[str, object],
) -> torch.Tensor | None:
    """Statistics of the segments of few rows, (N, segments, 3, THREADS) fp32; None for many rows.

    At most 3.2 MB for V = 262144, and the only memory that a launcher takes.

    Args:
        ids, active, entropy: as in `logprob_fwd`.
        arguments: of `launch.row_arguments` and `configs.forward_launch`.
    """
    if not is_shared(logits):
        return None
    B, T, V = logits.shape
    shape = (B * T, segments(V), 3, arguments["THREADS"])
    parts = torch.empty(shape, dtype=torch.float32, device=logits.device)
    row_parts_kernel[(B * T, segments(V))](
        ids_ptr=ids,
        active_ptr=active,
        parts_ptr=parts,
        HAS_MASK=active is not None,
        HAS_ENTROPY=entropy,
        **arguments,
    )
    return parts
