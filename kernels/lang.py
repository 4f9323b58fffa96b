"""Device vocabulary of the row kernels: what a logit is, the statistics of a row, the gradient of a
row.

z = softcap * tanh(scale * x / softcap) * inv_temperature is the transformed logit, fp32 whatever
the storage type. In the loops it appears as u, in which it is linear (`logit`), and its exponent
in bits: t = u * c - base, one fused multiply-add that forward and backward spell alike.
"""

import types

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# bits: a maximum of -inf is kept here, so that -inf - (-inf) never occurs; exp2 of it is 0
LOWEST = tl.constexpr(-3.0e38)
# bits: 2^-200 is 0 in fp32, and 0 * TINY is 0 where 0 * -inf is NaN
TINY = tl.constexpr(-200.0)


def device_function(fn: types.FunctionType, _made: dict = {}):  # noqa: B006 (a cache is meant)
    """The Triton twin of a pure Python function that does its mathematics through the global `m`.

    Numbers among its globals become constants, functions of the same module are converted too.
    """
    if fn not in _made:
        scope = {**fn.__globals__, "m": tl}
        for name in fn.__code__.co_names:
            value = scope.get(name)
            if isinstance(value, types.FunctionType) and value.__module__ == fn.__module__:
                scope[name] = device_function(value)
            elif isinstance(value, (int, float)):
                scope[name] = tl.constexpr(value)
        twin = types.FunctionType(fn.__code__, scope, fn.__name__)
        twin.__module__, twin.__qualname__ = fn.__module__, fn.__qualname__
        _made[fn] = triton.jit(twin)
    return _made[fn]


@triton.jit
def row_pointer(ptr, row, T, stride_b, stride_t, VEC: tl.constexpr):
    """Start of row `row` of a (B, T, V) tensor, given as its strides over B and T. row is int64, so
    the products are. With VEC > 1 every row starts at 16 bytes, which the launcher has checked."""
    offset = (row // T) * stride_b + (row % T) * stride_t
    if VEC > 1:
        offset = tl.multiple_of(offset, VEC)
    return ptr + offset


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, exact to 2 ulp: the rounding of 1 + x is divided out again (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) = -expm1(x) for x <= 0: Taylor to x^9 above -0.5, where 1 - exp(x) would
    cancel."""
    s = 1.0 + x / 9.0
    s = 1.0 + x / 8.0 * s
    s = 1.0 + x / 7.0 * s
    s = 1.0 + x / 6.0 * s
    s = 1.0 + x / 5.0 * s
    s = 1.0 + x / 4.0 * s
    s = 1.0 + x / 3.0 * s
    s = 1.0 + x / 2.0 * s
    return tl.where(x > -0.5, -x * s, 1.0 - tl.exp(x))


@triton.jit
def tanh(x):
    """tanh without libdevice (the interpreter has none): odd Taylor polynomial below 0.25, else
    exp2."""
    x2 = x * x
    small = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def row_factors(
    scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr
):
    """inner, gain, c and chain of a row: u = logit(x, inner), z = u * gain nats = u * c bits, and
    dz/dx = chain, times 1 - u^2 with a softcap."""
    chain = scale * inv_temperature
    inner, gain = 1.0, chain
    if HAS_SOFTCAP:
        inner = scale / softcap
        gain = softcap * inv_temperature
    elif NEGATIVE:
        gain = -chain
    return inner, gain, gain * LOG2E, chain


@triton.jit
def logit(x, inner, HAS_SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr):
    """Logit as stored -> u fp32, with z = u * gain and gain > 0 for the whole row.

    inner is scale / softcap and gain softcap * inv_temperature; without a softcap u is x with the
    sign of the scale and gain |scale| * inv_temperature. A sign costs nothing: it is a modifier of
    the instruction that takes the operand.
    """
    x = x.to(tl.float32)
    if HAS_SOFTCAP:
        return tanh(x * inner)
    if NEGATIVE:
        return -x
    return x


@triton.jit
def base_of(peak):
    """Base of the exponents of a row, bits, from its stored maximum in nats: forward and backward
    take it from the same number, so they see the same exponents."""
    return tl.maximum(peak * LOG2E, LOWEST)


@triton.jit
def fold(u, c, raw, base, rest, dot, HAS_ENTROPY: tl.constexpr):
    """Take a tile u (STRIPS, THREADS, VEC) into the statistics of its threads, (THREADS,) each.

    raw is the maximum of u and base = raw * c; rest = sum 2^t and dot = sum 2^t t, with t relative
    to base. When base rises by d bits, what was summed becomes 2^-d rest and 2^-d (dot - d rest).
    """
    raw = tl.maximum(raw, tl.max(tl.max(u, 2), 0))
    risen = tl.maximum(raw * c, LOWEST)
    d = tl.maximum(base - risen, TINY)
    decay = tl.exp2(d)
    t = tl.fma(u, c, -risen[None, :, None])
    p = tl.exp2(t)
    if HAS_ENTROPY:
        more = tl.sum(tl.sum(p * tl.maximum(t, TINY), 2), 0)
        dot = tl.fma(decay, tl.fma(d, rest, dot), more)
    rest = tl.fma(rest, decay, tl.sum(tl.sum(p, 2), 0))
    return raw, risen, rest, dot


@triton.jit
def scan(
    row_ptr,
    target,
    u_target,
    start,
    V,
    inner,
    c,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Columns [start, start + SEGMENT) of a row, without the target -> raw, rest, dot, (THREADS,).

    Each thread keeps its own maximum and sums, so the loop has no barrier and no shuffle. Only the
    target's tile and the last one compare columns: in the loop that were 4 instructions per logit
    more.
    """
    TILE: tl.constexpr = STRIPS * THREADS * VEC
    cols = tl.arange(0, TILE)
    stop = tl.minimum(V, start + SEGMENT)
    last = stop - (stop - start) % TILE
    own = target - target % TILE
    has_own = (own >= start) & (own < stop)
    # the loop goes over the whole tiles but that of the target
    skipped = tl.where(has_own, tl.minimum(own, last), last)
    # the maximum begins with the target's, which the sums leave out
    raw = tl.zeros((THREADS,), tl.float32) + u_target
    base = tl.maximum(raw * c, LOWEST)
    rest = tl.zeros((THREADS,), tl.float32)
    dot = tl.zeros((THREADS,), tl.float32)
    for i in range(start, last - tl.where(skipped < last, TILE, 0), TILE):
        x = tl.load(row_ptr + (i + tl.where(i >= skipped, TILE, 0)) + cols)
        u = logit(x, inner, HAS_SOFTCAP, NEGATIVE)
        u = tl.reshape(u, (STRIPS, THREADS, VEC))
        raw, base, rest, dot = fold(u, c, raw, base, rest, dot, HAS_ENTROPY)
    odd = has_own.to(tl.int32) + ((last < stop) & (own != last)).to(tl.int32)
    for i in range(0, odd):
        first = tl.multiple_of(tl.where(has_own & (i == 0), own, last), VEC)
        x = tl.load(row_ptr + first + cols, mask=cols < V - first, other=0.0)
        u = logit(x, inner, HAS_SOFTCAP, NEGATIVE)
        beside = (cols < V - first) & (cols != target - first)
        u = tl.where(beside, u, -float("inf"))
        u = tl.reshape(u, (STRIPS, THREADS, VEC))
        raw, base, rest, dot = fold(u, c, raw, base, rest, dot, HAS_ENTROPY)
    return raw, rest, dot


@triton.jit
def merge(raw, rest, dot, raw_2, rest_2, dot_2, c, HAS_ENTROPY: tl.constexpr):
    """Statistics of two parts of a row, both (THREADS,), as those of one. With rest = dot = 0 and
    raw <= raw_2 the second, bit for bit."""
    highest = tl.maximum(raw, raw_2)
    base = tl.maximum(highest * c, LOWEST)
    d = tl.maximum(tl.maximum(raw * c, LOWEST) - base, TINY)
    d_2 = tl.maximum(tl.maximum(raw_2 * c, LOWEST) - base, TINY)
    decay, decay_2 = tl.exp2(d), tl.exp2(d_2)
    if HAS_ENTROPY:
        dot = tl.fma(decay, tl.fma(d, rest, dot), decay_2 * tl.fma(d_2, rest_2, dot_2))
    rest = tl.fma(decay, rest, decay_2 * rest_2)
    return highest, rest, dot


@triton.jit
def finish_stats(u_target, raw, rest, dot, gain, c, HAS_ENTROPY: tl.constexpr):
    """(THREADS,) statistics of a row -> logp of the target, entropy, max, log(sum exp(z - max)),
    nats.

    The only reductions across warps of a row. The target was kept out of `rest`, the mass beside
    it, so logp = -log1p(rest / 2^t) where the target is near the max: log(1 + rest) would lose
    rest below 6e-8.
    """
    peak = tl.max(raw, 0) * gain
    base = base_of(peak)
    d = tl.maximum(tl.maximum(raw * c, LOWEST) - base, TINY)
    weight = tl.exp2(d)
    if HAS_ENTROPY:
        dot = tl.sum(weight * tl.fma(d, rest, dot), 0)
    rest = tl.sum(weight * rest, 0)
    t = tl.fma(u_target, c, -base)
    p = tl.exp2(t)
    total = rest + p
    near = t > -1.0
    beside = log1p(rest / tl.where(near, p, 1.0))
    log_total = tl.where(near, t * LN2 + beside, tl.log(total))
    logp = tl.where(near, -beside, t * LN2 - log_total)
    entropy = 0.0
    if HAS_ENTROPY:
        entropy = log_total - (dot + p * tl.maximum(t, TINY)) * LN2 / total
    return logp, entropy, peak, log_total + tl.fma(base, LN2, -peak)


@triton.jit
def row_stats(
    row_ptr,
    target,
    V,
    factors,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    """One read of a row -> logp of target, entropy, max, log(sum exp(z - max)), all fp32 nats."""
    inner, gain, c, _ = factors
    u_target = logit(tl.load(row_ptr + target), inner, HAS_SOFTCAP, NEGATIVE)
    raw = tl.zeros((THREADS,), tl.float32) + u_target
    rest = tl.zeros((THREADS,), tl.float32)
    dot = tl.zeros((THREADS,), tl.float32)
    for start in range(0, V, SEGMENT):
        raw_2, rest_2, dot_2 = scan(
            row_ptr,
            target,
            u_target,
            start,
            V,
            inner,
            c,
            HAS_ENTROPY,
            HAS_SOFTCAP,
            NEGATIVE,
            SEGMENT,
            STRIPS,
            THREADS,
            VEC,
        )
        raw, rest, dot = merge(raw, rest, dot, raw_2, rest_2, dot_2, c, HAS_ENTROPY)
    return finish_stats(u_target, raw, rest, dot, gain, c, HAS_ENTROPY)


@triton.jit
def gradient_scalars(
    stats, upstream, chain, HAS_DLSE: tl.constexpr, HAS_DENTROPY: tl.constexpr
):
    """What the gradient of a row is made of: base, slope and offset of the logits' factor, and the
    gradient of the target.

        dz_j = 2^t_j * offset                               without dentropy
        dz_j = 2^t_j * (t_j * slope + offset)               with it

    in which (dlse - dlogp) / total, -dentropy (t ln2 - E) / total and the chain factor
    scale * inv_temperature are folded; total = sum 2^t, E = sum 2^t t ln2 / total.
    """
    logp, entropy, peak, log_sum = stats
    dlogp, dlse, dentropy = upstream
    base = base_of(peak)
    log_total = log_sum - tl.fma(base, LN2, -peak)
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
):
    """Gradient of the columns `cols` of a row; MASKED: of those below `left`."""
    base, slope, offset, _ = scalars
    if MASKED:
        x = tl.load(row_ptr + cols, mask=cols < left, other=0.0)
    else:
        x = tl.load(row_ptr + cols)
    u = logit(x, inner, HAS_SOFTCAP, NEGATIVE)
    t = tl.fma(u, c, -base)
    if HAS_DENTROPY:
        dx = tl.exp2(t) * tl.fma(tl.maximum(t, TINY), slope, offset)
    else:
        dx = tl.exp2(t) * offset
    if HAS_SOFTCAP:
        dx = dx * (1.0 - u * u)
    if BARRIER:
        # a fast warp must not overwrite what a slow one has still to read
        tl.debug_barrier()
    dx = dx.to(out_ptr.dtype.element_ty)
    if MASKED:
        tl.store(out_ptr + cols, dx, mask=cols < left)
    else:
        tl.store(out_ptr + cols, dx)


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
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    """dx_j = f * [dlogp (1(j = target) - p_j) + dlse p_j - dentropy p_j (z_j - E_p[z])] of the
    columns [start, start + columns) of a row, with f = scale * inv_temperature * (1 - tanh^2).

    stats is (logp, entropy, peak, log_sum), upstream (dlogp, dlse, dentropy), factors (inner, gain,
    c, chain). target is -1 where it is no column of these logits. The output may be the input: each
    thread overwrites what it has read itself. NARROW: it may be the same bytes as a narrower type.
    Then tile i of the output lies on tile i // 2 of the input, and a barrier before tiles 1, 2, 4,
    8, ... makes all threads read that far first; start is 0.
    """
    TILE: tl.constexpr = STRIPS * THREADS * VEC
    inner, _, c, chain = factors
    cols = tl.arange(0, TILE)
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
    first = start
    if NARROW:
        if full > 0:
            store_gradient_tile(
                row_ptr,
                out_ptr,
                cols,
                V,
                scalars,
                inner,
                c,
                False,
                True,
                HAS_SOFTCAP,
                NEGATIVE,
                HAS_DENTROPY,
            )
            first = TILE
        while first < full:
            tl.debug_barrier()
            doubled = tl.minimum(first + first, full)
            for i in range(first, doubled, TILE):
                store_gradient_tile(
                    row_ptr + i,
                    out_ptr + i,
                    cols,
                    V,
                    scalars,
                    inner,
                    c,
                    False,
                    False,
                    HAS_SOFTCAP,
                    NEGATIVE,
                    HAS_DENTROPY,
                )
            first = doubled
    else:
        for i in range(start, full, TILE):
            store_gradient_tile(
                row_ptr + i,
                out_ptr + i,
                cols,
                V,
                scalars,
                inner,
                c,
                False,
                False,
                HAS_SOFTCAP,
                NEGATIVE,
                HAS_DENTROPY,
            )
    if full < stop:
        store_gradient_tile(
            row_ptr + full,
            out_ptr + full,
            cols,
            V - full,
            scalars,
            inner,
            c,
            True,
            NARROW,
            HAS_SOFTCAP,
            NEGATIVE,
            HAS_DENTROPY,
        )
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
