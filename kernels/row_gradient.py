"""The gradient of a row by its logits: one read and one write, in place where the caller likes."""

import triton
import triton.language as tl

from grpo_fast.kernels.lang import (
    FAR,
    LN2,
    LOG2E,
    TINY,
    base_of,
    far_exponent,
    logit,
    one_minus_exp,
)


@triton.jit
def gradient_scalars(stats, upstream, chain, HAS_DLSE: tl.constexpr, HAS_DENTROPY: tl.constexpr):
    """What the gradient of a row is made of: the base of its exponents, slope and offset of the
    logits' factor, and the gradient of the target.

        dz_j = 2^t_j * offset                               without dentropy
        dz_j = 2^t_j * (t_j * slope + offset)               with it

    in which (dlse - dlogp) / total, -dentropy (t ln2 - E) / total and the chain factor
    scale * inv_temperature are folded; total = sum 2^t, E = sum 2^t t ln2 / total.
    """
    logp, entropy, peak, log_sum = stats
    dlogp, dlse, dentropy = upstream
    base = base_of(peak)
    log_total = log_sum - tl.where(tl.abs(peak) > FAR, 0.0, tl.fma(base, LN2, -peak))
    share = tl.exp2(-log_total * LOG2E) * chain
    slope, offset = 0.0, -dlogp * share
    # 1 - p of the target is -expm1(logp): 1 - exp(logp) would cancel
    at_target = dlogp * one_minus_exp(logp)
    p_target = tl.exp(logp)
    if HAS_DLSE:
        offset += dlse * share
        at_target += dlse * p_target
    if HAS_DENTROPY:
        slope = -dentropy * share * LN2
        offset += dentropy * share * (log_total - entropy)
        # t ln2 - E of the target, where p > 0: -inf there is 0 * -inf
        beside = tl.where(p_target > 0, dentropy * p_target * (logp + entropy), 0.0)
        at_target -= beside
    return base, slope, offset, at_target * chain


@triton.jit
def gradient_of(u, t, scalars, HAS_SOFTCAP: tl.constexpr, HAS_DENTROPY: tl.constexpr):
    """Gradient by the logits of u whose exponents are t."""
    _, slope, offset, _ = scalars
    if HAS_DENTROPY:
        dx = tl.exp2(t) * tl.fma(tl.maximum(t, TINY), slope, offset)
    else:
        dx = tl.exp2(t) * offset
    if HAS_SOFTCAP:
        dx = dx * (1.0 - u * u)
    return dx


@triton.jit
def store_far_gradient(
    row_ptr,
    out_ptr,
    start,
    stop,
    scalars,
    inner,
    gain,
    peak,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    THREADS: tl.constexpr,
):
    """`store_row_gradient` of a row beyond `FAR`, but for its target."""
    for i in range(start, stop, THREADS):
        cols = i + tl.arange(0, THREADS)
        x = tl.load(row_ptr + cols, mask=cols < stop, other=0.0)
        u = logit(x, inner, HAS_SOFTCAP, NEGATIVE)
        t = far_exponent(u, gain, peak)
        dx = gradient_of(u, t, scalars, HAS_SOFTCAP, HAS_DENTROPY)
        tl.debug_barrier()
        tl.store(out_ptr + cols, dx.to(out_ptr.dtype.element_ty), mask=cols < stop)


@triton.jit
def store_gradient_tile(
    row_ptr,
    out_ptr,
    cols,
    left,
    scalars,
    inner,
    c,
    MASKED: tl.constexpr,
    BARRIER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Gradient of the columns `cols` of a row; MASKED: of those below `left`."""
    EVICT: tl.constexpr = "evict_first" if KEEP else ""
    if MASKED:
        x = tl.load(row_ptr + cols, mask=cols < left, other=0.0, eviction_policy=EVICT)
    else:
        x = tl.load(row_ptr + cols, eviction_policy=EVICT)
    u = logit(x, inner, HAS_SOFTCAP, NEGATIVE)
    dx = gradient_of(u, tl.fma(u, c, -scalars[0]), scalars, HAS_SOFTCAP, HAS_DENTROPY)
    if BARRIER:
        # a fast warp must not overwrite what a slow one has still to read
        tl.debug_barrier()
    dx = dx.to(out_ptr.dtype.element_ty)
    if MASKED:
        tl.store(out_ptr + cols, dx, mask=cols < left)
    else:
        tl.store(out_ptr + cols, dx)


@triton.jit
def store_gradient_tiles(
    row_ptr,
    out_ptr,
    first,
    stop,
    scalars,
    inner,
    c,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradient of the whole tiles [first, stop): the loop that is counted."""
    cols = tl.arange(0, TILE)
    for i in range(first, stop, TILE):
        store_gradient_tile(
            row_ptr + i, out_ptr + i, cols, 0, scalars, inner, c,
            False, False, HAS_SOFTCAP, NEGATIVE, HAS_DENTROPY, KEEP,
        )  # fmt: skip


@triton.jit
def store_narrow_tiles(
    row_ptr,
    out_ptr,
    stop,
    scalars,
    inner,
    c,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradient of the whole tiles [0, stop), at the front of the bytes of the same row.

    Tile i of the output lies on tile i // 2 of the input, so a barrier before tiles 1, 2, 4, 8, ...
    makes all threads read that far first.
    """
    if stop > 0:
        store_gradient_tile(
            row_ptr, out_ptr, tl.arange(0, TILE), 0, scalars, inner, c,
            False, True, HAS_SOFTCAP, NEGATIVE, HAS_DENTROPY, KEEP,
        )  # fmt: skip
    first = TILE
    while first < stop:
        tl.debug_barrier()
        doubled = tl.minimum(first + first, stop)
        store_gradient_tiles(
            row_ptr, out_ptr, first, doubled, scalars, inner, c,
            HAS_SOFTCAP, NEGATIVE, HAS_DENTROPY, KEEP, TILE,
        )  # fmt: skip
        first = doubled


@triton.jit
def store_row_gradient(
    row_ptr,
    out_ptr,
    target,
    V,
    start,
    columns,
    stats,
    upstream,
    factors,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    NARROW: tl.constexpr,
    KEEP: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    """dx_j = f * [dlogp (1(j = target) - p_j) + dlse p_j - dentropy p_j (z_j - E_p[z])] of the
    columns [start, start + columns) of a row, with f = scale * inv_temperature * (1 - tanh^2).

    stats is (logp, entropy, peak, log_sum), upstream (dlogp, dlse, dentropy), factors (inner, gain,
    c, chain). target is -1 where it is no column of these logits. The output may be the input: each
    thread overwrites what it has read itself. NARROW: it may be the same bytes as a narrower type;
    start is 0.
    """
    TILE: tl.constexpr = STRIPS * THREADS * VEC
    inner, gain, c, chain = factors
    scalars = gradient_scalars(stats, upstream, chain, HAS_DLSE, HAS_DENTROPY)
    at_target = scalars[3]
    has_target = (target >= start) & (target - start < columns)
    if HAS_SOFTCAP:
        u = logit(tl.load(row_ptr + target, mask=has_target, other=0.0), inner, True, NEGATIVE)
        at_target *= 1.0 - u * u
        # no thread overwrites it before all have read it
        tl.debug_barrier()
    stop = start + tl.minimum(V - start, columns)
    full = tl.multiple_of(stop - (stop - start) % TILE, VEC)
    if tl.abs(stats[2]) > FAR:
        store_far_gradient(
            row_ptr, out_ptr, start, stop, scalars, inner, gain, stats[2],
            HAS_SOFTCAP, NEGATIVE, HAS_DENTROPY, THREADS,
        )  # fmt: skip
        # nothing is left for the loops
        full, stop = start, start
    if NARROW:
        store_narrow_tiles(
            row_ptr, out_ptr, full, scalars, inner, c,
            HAS_SOFTCAP, NEGATIVE, HAS_DENTROPY, KEEP, TILE,
        )  # fmt: skip
    else:
        store_gradient_tiles(
            row_ptr, out_ptr, start, full, scalars, inner, c,
            HAS_SOFTCAP, NEGATIVE, HAS_DENTROPY, KEEP, TILE,
        )  # fmt: skip
    if full < stop:
        store_gradient_tile(
            row_ptr + full, out_ptr + full, tl.arange(0, TILE), V - full, scalars, inner, c,
            True, NARROW, HAS_SOFTCAP, NEGATIVE, HAS_DENTROPY, KEEP,
        )  # fmt: skip
    if has_target:
        # after the thread that owns the column
        tl.debug_barrier()
        tl.store(out_ptr + target, at_target.to(out_ptr.dtype.element_ty))


@triton.jit
def store_zero_row(
    out_ptr, V, start, columns, STRIPS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr
):
    """out[start:start + columns] = 0 without reading anything."""
    TILE: tl.constexpr = STRIPS * THREADS * VEC
    cols = tl.arange(0, TILE)
    zero = tl.zeros((TILE,), out_ptr.dtype.element_ty)
    for i in range(start, start + tl.minimum(V - start, columns), TILE):
        tl.store(out_ptr + i + cols, zero, mask=cols < V - i)
