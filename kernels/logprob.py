"""Log-probs of sampled tokens from rows of logits, and back. One program per row, fp32 inside.

Bytes per row of V logits of e bytes: forward reads V e; backward reads V e and writes V e.
"""

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.configs import forward_launch, gradient_launch, gradient_tiles
from grpo_fast.kernels.lang import row_factors, row_pointer
from grpo_fast.kernels.launch import PER_CALL, gradient_arguments, is_narrowed, row_arguments
from grpo_fast.kernels.row_gradient import store_row_gradient, store_zero_row
from grpo_fast.kernels.row_parts import row_parts
from grpo_fast.kernels.row_stats import row_stats


@triton.jit(
    do_not_specialize=PER_CALL,
    do_not_specialize_on_alignment=["ids_ptr", "active_ptr", "stats_ptr", "inv_temperature_ptr"],
)
def logprob_fwd_kernel(
    logits_ptr,
    ids_ptr,
    active_ptr,
    stats_ptr,
    parts_ptr,
    T,
    stride_b,
    stride_t,
    stride_stats,
    V,
    scale,
    softcap,
    inv_temperature,
    inv_temperature_ptr,
    HAS_MASK: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    """stats[:, n] = logp, entropy, max, log-sum of row n; zeros where active[n] == 0, unread."""
    n = tl.program_id(0).to(tl.int64)
    stat_ptr = stats_ptr + n
    logp, entropy, peak, log_sum = 0.0, 0.0, 0.0, 0.0
    active = True
    if HAS_MASK:
        active = tl.load(active_ptr + n) != 0
    if HAS_ROW_TEMPERATURE:
        inv_temperature = tl.load(inv_temperature_ptr + n).to(tl.float32)
    if active:
        logp, entropy, peak, log_sum = row_stats(
            row_pointer(logits_ptr, n, T, stride_b, stride_t, VEC),
            tl.load(ids_ptr + n).to(tl.int32),
            V,
            row_factors(scale, softcap, inv_temperature, HAS_SOFTCAP, NEGATIVE),
            parts_ptr,
            n,
            HAS_PARTS,
            HAS_ENTROPY,
            HAS_SOFTCAP,
            NEGATIVE,
            False,
            SEGMENT,
            STRIPS,
            THREADS,
            VEC,
        )
    tl.store(stat_ptr, logp)
    stat_ptr += stride_stats
    tl.store(stat_ptr, entropy)
    stat_ptr += stride_stats
    tl.store(stat_ptr, peak)
    stat_ptr += stride_stats
    tl.store(stat_ptr, log_sum)


@triton.jit(
    do_not_specialize=[*PER_CALL, "stride_out_b", "stride_out_t", "tiles"],
    do_not_specialize_on_alignment=[
        "ids_ptr",
        "active_ptr",
        "stats_ptr",
        "dlogp_ptr",
        "dlse_ptr",
        "dentropy_ptr",
        "inv_temperature_ptr",
    ],
)
def logprob_bwd_kernel(
    logits_ptr,
    ids_ptr,
    active_ptr,
    stats_ptr,
    dlogp_ptr,
    dlse_ptr,
    dentropy_ptr,
    out_ptr,
    T,
    stride_b,
    stride_t,
    stride_out_b,
    stride_out_t,
    stride_stats,
    V,
    tiles,
    scale,
    softcap,
    inv_temperature,
    inv_temperature_ptr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    NARROW: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    """out[n] = dloss/dlogits[n] from dlogp, dlse and dentropy of row n; zeros where active[n] == 0,
    and with SKIP_ZEROS where dlogp and dentropy are."""
    n = tl.program_id(0).to(tl.int64)
    # NARROW: one program for all of V
    start, columns = 0, V
    if not NARROW:
        wide = tiles.to(tl.int64) * (STRIPS * THREADS * VEC)
        start, columns = (tl.program_id(1) * wide).to(tl.int32), wide.to(tl.int32)
    grad_ptr = row_pointer(out_ptr, n, T, stride_out_b, stride_out_t, VEC)
    logp_ptr = stats_ptr + n
    entropy_ptr = logp_ptr + stride_stats
    peak_ptr = entropy_ptr + stride_stats
    log_sum_ptr = peak_ptr + stride_stats
    dlogp = tl.load(dlogp_ptr + n)
    dlse, dentropy = 0.0, 0.0
    active = True
    if HAS_MASK:
        active = tl.load(active_ptr + n) != 0
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + n)
    if HAS_DENTROPY:
        dentropy = tl.load(dentropy_ptr + n)
    if SKIP_ZEROS:
        active = (dlogp != 0.0) | (dentropy != 0.0)
    if HAS_ROW_TEMPERATURE:
        inv_temperature = tl.load(inv_temperature_ptr + n).to(tl.float32)
    if active:
        store_row_gradient(
            row_pointer(logits_ptr, n, T, stride_b, stride_t, VEC),
            grad_ptr,
            tl.load(ids_ptr + n).to(tl.int32),
            V,
            start,
            columns,
            (tl.load(logp_ptr), tl.load(entropy_ptr), tl.load(peak_ptr), tl.load(log_sum_ptr)),
            (dlogp, dlse, dentropy),
            row_factors(scale, softcap, inv_temperature, HAS_SOFTCAP, NEGATIVE),
            HAS_SOFTCAP,
            NEGATIVE,
            HAS_DLSE,
            HAS_DENTROPY,
            NARROW,
            False,
            STRIPS,
            THREADS,
            VEC,
        )
    else:
        store_zero_row(grad_ptr, V, start, columns, STRIPS, THREADS, VEC)


def logprob_fwd(
    logits: torch.Tensor,
    ids: torch.Tensor,
    stats: torch.Tensor,
    *,
    active: torch.Tensor | None = None,
    inv_temperature: float | torch.Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
) -> None:
    """Fill stats (4, N) fp32 with logp, entropy, max and log-sum of z = transform(logits).

    Args:
        logits: (B, T, V) fp32, fp16 or bf16 with stride 1 over V; row n = b * T + t.
        ids: (N,) int64 in [0, V) where active; active: (N,) bool or None for all.
        inv_temperature: one number, or (N,) fp32 with each row's own.
        entropy: False leaves it 0 and saves 3 of 9 instructions per logit; no other bit changes.
    """
    B, T, V = logits.shape
    if B * T == 0:
        return
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(logits):
        arguments = row_arguments(logits, scale, softcap, inv_temperature)
        arguments |= forward_launch(logits, softcap)
        parts = row_parts(logits, ids, active, entropy, arguments)
        logprob_fwd_kernel[(B * T,)](
            ids_ptr=ids,
            active_ptr=active,
            stats_ptr=stats,
            parts_ptr=parts,
            stride_stats=stats.stride(0),
            HAS_MASK=active is not None,
            HAS_PARTS=parts is not None,
            HAS_ENTROPY=entropy,
            **arguments,
        )


def logprob_bwd(
    logits: torch.Tensor,
    ids: torch.Tensor,
    stats: torch.Tensor,
    dlogp: torch.Tensor,
    out: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
    dentropy: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    inv_temperature: float | torch.Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    skip_zeros: bool = False,
) -> None:
    """Fill out (B, T, V) with the gradient by logits; out may be logits itself, or its bytes as
    bf16/fp16.

    Args:
        stats: (4, N) from `logprob_fwd`; dlogp, dlse, dentropy: (N,) fp32 upstream gradients.
        inv_temperature: as in `logprob_fwd`.
        skip_zeros: a row whose dlogp and dentropy are exactly 0 is not read, and gets zeros even
            where it holds NaN; in place of active and without dlse.
    """
    assert not skip_zeros or (active is None and dlse is None)
    B, T, V = logits.shape
    if B * T == 0:
        return
    narrow = is_narrowed(logits, out)
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(logits):
        launch = gradient_launch(logits, out, softcap)
        # what is written over its own logits is written by one program, in order
        programs, tiles = (1, 0) if narrow else gradient_tiles(B * T, V, launch)
        logprob_bwd_kernel[(B * T, programs)](
            ids_ptr=ids,
            active_ptr=active,
            stats_ptr=stats,
            dlogp_ptr=dlogp,
            dlse_ptr=dlse,
            dentropy_ptr=dentropy,
            stride_stats=stats.stride(0),
            tiles=tiles,
            HAS_MASK=active is not None,
            HAS_DLSE=dlse is not None,
            HAS_DENTROPY=dentropy is not None,
            SKIP_ZEROS=skip_zeros,
            **gradient_arguments(logits, out),
            **row_arguments(logits, scale, softcap, inv_temperature),
            **launch,
        )
