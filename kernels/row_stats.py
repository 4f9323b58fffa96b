"""The statistics of a row: its maximum, the mass beside the target, the entropy. One read.

A row is summed in segments, a segment in tiles, and a tile by threads that each keep their own
maximum and sums. That order depends on the vocabulary and the type alone, so a row has the same
bits alone, in a batch, and where several programs share it.
"""

import triton
import triton.language as tl

from grpo_fast.kernels.lang import FAR, LN2, LOWEST, TINY, base_of, far_exponent, log1p, logit


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
    KEEP: tl.constexpr,
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
    EVICT: tl.constexpr = "evict_last" if KEEP else ""
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
        at = row_ptr + (i + tl.where(i >= skipped, TILE, 0))
        x = tl.load(at + cols, eviction_policy=EVICT)
        u = logit(x, inner, HAS_SOFTCAP, NEGATIVE)
        u = tl.reshape(u, (STRIPS, THREADS, VEC))
        raw, base, rest, dot = fold(u, c, raw, base, rest, dot, HAS_ENTROPY)
    odd = has_own.to(tl.int32) + ((last < stop) & (own != last)).to(tl.int32)
    for i in range(0, odd):
        first = tl.multiple_of(tl.where(has_own & (i == 0), own, last), VEC)
        at = row_ptr + first + cols
        x = tl.load(at, mask=cols < V - first, other=0.0, eviction_policy=EVICT)
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
def far_sums(
    row_ptr,
    target,
    V,
    inner,
    gain,
    peak,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """rest and dot of a row beyond `FAR`, whose maximum is known: a second read, and a rare one."""
    rest = tl.zeros((THREADS,), tl.float32)
    dot = tl.zeros((THREADS,), tl.float32)
    for start in range(0, V, THREADS):
        cols = start + tl.arange(0, THREADS)
        x = tl.load(row_ptr + cols, mask=cols < V, other=0.0)
        t = far_exponent(logit(x, inner, HAS_SOFTCAP, NEGATIVE), gain, peak)
        t = tl.where((cols < V) & (cols != target), t, -float("inf"))
        p = tl.exp2(t)
        rest += p
        dot += p * tl.maximum(t, TINY)
    return tl.sum(rest, 0), tl.sum(dot, 0)


@triton.jit
def finish_stats(
    row_ptr,
    target,
    V,
    u_target,
    raw,
    rest,
    dot,
    inner,
    gain,
    c,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    THREADS: tl.constexpr,
):
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
    # the stored log-sum is relative to peak, the sums to base
    residual = tl.fma(base, LN2, -peak)
    if tl.abs(peak) > FAR:
        rest, far_dot = far_sums(
            row_ptr, target, V, inner, gain, peak, HAS_SOFTCAP, NEGATIVE, THREADS
        )
        if HAS_ENTROPY:
            dot = far_dot
        t = far_exponent(u_target, gain, peak)
        residual = 0.0
    p = tl.exp2(t)
    total = rest + p
    near = t > -1.0
    beside = log1p(rest / tl.where(near, p, 1.0))
    log_total = tl.where(near, t * LN2 + beside, tl.log(total))
    logp = tl.where(near, -beside, t * LN2 - log_total)
    entropy = 0.0
    if HAS_ENTROPY:
        entropy = log_total - (dot + p * tl.maximum(t, TINY)) * LN2 / total
        # rounding alone makes that of a certain token -1.4e-14; NaN stays
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
    return logp, entropy, peak, log_total + residual


@triton.jit
def part_pointer(parts_ptr, row, part, V, SEGMENT: tl.constexpr, THREADS: tl.constexpr):
    """Where raw, rest and dot of a segment of a row are kept: parts (N, segments, 3, THREADS)."""
    return parts_ptr + (row * tl.cdiv(V, SEGMENT) + part) * (3 * THREADS) + tl.arange(0, THREADS)


@triton.jit
def row_stats(
    row_ptr,
    target,
    V,
    factors,
    parts_ptr,
    n,
    HAS_PARTS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    KEEP: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    """One read of row n -> logp of target, entropy, max, log(sum exp(z - max)), all fp32 nats.

    HAS_PARTS: other programs have read the segments; what they found is merged in the same order.
    KEEP: the row is read again soon, and may stay in L2.
    """
    inner, gain, c, _ = factors
    u_target = logit(tl.load(row_ptr + target), inner, HAS_SOFTCAP, NEGATIVE)
    raw = tl.zeros((THREADS,), tl.float32) + u_target
    rest = tl.zeros((THREADS,), tl.float32)
    dot = tl.zeros((THREADS,), tl.float32)
    for start in range(0, V, SEGMENT):
        if HAS_PARTS:
            part = part_pointer(parts_ptr, n, start // SEGMENT, V, SEGMENT, THREADS)
            raw_2 = tl.load(part)
            rest_2 = tl.load(part + THREADS)
            dot_2 = rest_2
            if HAS_ENTROPY:
                dot_2 = tl.load(part + 2 * THREADS)
        else:
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
                KEEP,
                SEGMENT,
                STRIPS,
                THREADS,
                VEC,
            )
        raw, rest, dot = merge(raw, rest, dot, raw_2, rest_2, dot_2, c, HAS_ENTROPY)
    return finish_stats(
        row_ptr,
        target,
        V,
        u_target,
        raw,
        rest,
        dot,
        inner,
        gain,
        c,
        HAS_ENTROPY,
        HAS_SOFTCAP,
        NEGATIVE,
        THREADS,
    )


@triton.jit
def store_part(
    row_ptr,
    target,
    V,
    factors,
    parts_ptr,
    n,
    part,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Segment `part` of row n -> its place in parts; `row_stats` merges them. part is int64."""
    inner, _, c, _ = factors
    u_target = logit(tl.load(row_ptr + target), inner, HAS_SOFTCAP, NEGATIVE)
    raw, rest, dot = scan(
        row_ptr,
        target,
        u_target,
        (part * SEGMENT).to(tl.int32),
        V,
        inner,
        c,
        HAS_ENTROPY,
        HAS_SOFTCAP,
        NEGATIVE,
        False,
        SEGMENT,
        STRIPS,
        THREADS,
        VEC,
    )
    place = part_pointer(parts_ptr, n, part, V, SEGMENT, THREADS)
    tl.store(place, raw)
    tl.store(place + THREADS, rest)
    if HAS_ENTROPY:
        tl.store(place + 2 * THREADS, dot)
