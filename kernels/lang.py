"""Device vocabulary of the row kernels: what a logit is, the statistics of a row, the gradient of a
row.

z = softcap * tanh(scale * x / softcap) * inv_temperature is the transformed logit, fp32 whatever
the storage type. In the loops it appears as u, in which it is linear (`logit`), and its exponent
in bits: t = u * c - base, one fused multiply-add that forward and backward spell alike.
"""

import types

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# bits: a maximum of -inf is kept here, so that -inf - (-inf) never occurs; exp2 of it is 0
LOWEST = tl.constexpr(-3.0e38)
# bits: 2^-200 is 0 in fp32, and 0 * TINY is 0 where 0 * -inf is NaN
TINY = tl.constexpr(-200.0)
# nats: beyond this maximum the rounding of u * c could reach a bit, and z is formed first instead
FAR = tl.constexpr(1048576.0)


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
def row_factors(scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr):
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
def far_exponent(u, gain, peak):
    """t of logits so large (finfo.min throughout, say) that only z - max is exact."""
    return (u * gain - peak) * LOG2E
