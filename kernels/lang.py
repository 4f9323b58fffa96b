"""Device vocabulary of the row kernels: a logit tile, the statistics of a row, the gradient of a
row.

Every kernel here works on one row of logits per program, in fp32 whatever the storage type. `z` is
the transformed logit: z = softcap * tanh(scale * x / softcap) * inv_temperature, with one
inv_temperature for all rows or one for each.
"""

import types

import torch
import triton
import triton.language as tl


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


def temperature_arguments(inv_temperature: float | torch.Tensor) -> dict[str, object]:
    """Launch arguments for one inv_temperature, or for an fp32 (N,) tensor of them."""
    by_row = isinstance(inv_temperature, torch.Tensor)
    return {
        "inv_temperature": 1.0 if by_row else float(inv_temperature),
        "inv_temperature_ptr": inv_temperature if by_row else None,
        "HAS_ROW_TEMPERATURE": by_row,
    }


@triton.jit
def row_pointer(ptr, row, T, stride_b, stride_t):
    """Start of row `row` of a (B, T, V) tensor, given as its strides over B and T. row is int64, so
    the products are."""
    return ptr + (row // T) * stride_b + (row % T) * stride_t


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
    exp."""
    x2 = x * x
    small = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def transform(x, scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """Logit as stored -> z, fp32."""
    x = x.to(tl.float32) * scale
    if HAS_SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x * inv_temperature


@triton.jit
def row_stats(
    row_ptr,
    target,
    V,
    scale,
    softcap,
    inv_temperature,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One read of a row -> logp of target, entropy, max, log(sum exp(z - max)), all fp32 nats.

    The target is kept out of the running sum: `rest` is the mass beside it relative to the max, so
    logp = -log1p(rest) when the target is the max, where log(1 + rest) would lose rest below 6e-8.
    """
    z_target = transform(tl.load(row_ptr + target), scale, softcap, inv_temperature, HAS_SOFTCAP)
    peak = z_target
    rest = 0.0
    # sum of exp(z - max) * (z - max) beside the target, rescaled with the max
    dot = 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        # the load's mask is the bound alone: with `cols != target` in it every load is 2 bytes wide
        # instead of 16 (sm_80 to sm_120, Triton 3.6 and 3.9)
        x = tl.load(row_ptr + cols, mask=cols < V, other=0.0)
        z = transform(x, scale, softcap, inv_temperature, HAS_SOFTCAP)
        z = tl.where((cols < V) & (cols != target), z, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(z, 0))
        # all -inf so far: subtract 0, not -inf, so that the sums stay 0
        base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        shift = tl.where(peak == -float("inf"), 0.0, peak - base)
        decay = tl.exp(shift)
        gap = z - base
        p = tl.exp(gap)
        dot = decay * (dot + shift * rest) + tl.sum(tl.where(p > 0, p * gap, 0.0), 0)
        rest = rest * decay + tl.sum(p, 0)
        peak = new_peak
    gap = z_target - peak
    p = tl.exp(gap)
    log_sum = tl.where(gap == 0.0, log1p(rest), tl.log(rest + p))
    logp = gap - log_sum
    dot = dot + tl.where(p > 0, p * gap, 0.0)
    return logp, log_sum - dot / (rest + p), peak, log_sum


@triton.jit
def store_row_gradient(
    row_ptr,
    out_ptr,
    target,
    V,
    stats,
    upstream,
    chain,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dx_j = c * [dlogp (1(j = target) - p_j) + dlse p_j - dentropy p_j (z_j - E_p[z])], one
    row, with c = scale * inv_temperature * (1 - tanh^2).

    stats is (logp, entropy, peak, log_sum), upstream (dlogp, dlse, dentropy), chain (scale,
    softcap, inv_temperature). The target's own 1 - p comes from -expm1(logp).
    The output may be the input: each tile is read whole before it is overwritten. It may also be
    the same bytes as a narrower type, whose tile lies in front of what is still to be read.
    """
    logp, entropy, peak, log_sum = stats
    dlogp, dlse, dentropy = upstream
    scale, softcap, inv_temperature = chain
    expected = log_sum - entropy
    for start in range(0, V, BLOCK_V):
        # (1, BLOCK_V), not (BLOCK_V,): Triton spreads tiles of one shape alike over the threads, so
        # a narrower output would change the order of the sums of `row_stats` in the same kernel
        cols = start + tl.arange(0, BLOCK_V)[None, :]
        inside = cols < V
        x = tl.load(row_ptr + cols, mask=inside, other=0.0)
        z = transform(x, scale, softcap, inv_temperature, HAS_SOFTCAP)
        p = tl.exp((z - peak) - log_sum)
        dz = tl.where(cols == target, dlogp * one_minus_exp(logp), -dlogp * p) + dlse * p
        if HAS_DENTROPY:
            dz -= tl.where(p > 0, dentropy * p * ((z - peak) - expected), 0.0)
        dz = dz * (scale * inv_temperature)
        if HAS_SOFTCAP:
            t = z / (softcap * inv_temperature)
            dz = dz * (1.0 - t * t)
        # a fast warp must not overwrite what a slow one has still to read
        tl.debug_barrier()
        tl.store(out_ptr + cols, dz.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_zero_row(out_ptr, V, BLOCK_V: tl.constexpr):
    """out[0:V] = 0 without reading anything."""
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)[None, :]
        tl.store(out_ptr + cols, tl.zeros((1, BLOCK_V), out_ptr.dtype.element_ty), mask=cols < V)
