"""Per-token objectives and KL estimators, written once for torch and for Triton.

The kernels compile these very functions with `m` bound to `triton.language` (`kernels/lang.py`), so
they use arithmetic and `m.exp`, `m.log`, `m.where` only: no shapes, no branch on a value; a branch
on an upper-case argument is decided when the kernel is compiled. Each returns the derivative beside
the value, because a stop-gradient lives in the derivative; `reference.py` writes the detach out and
a float64 test compares the two. Comparisons are arranged so that a NaN reaches both outputs.
"""

import torch as m

# exp(20) = 4.9e8: far outside any trust region, and its square is still finite in fp32
LOG_RATIO_LIMIT = 20.0


def bounded(x, low, high):
    """clamp(x, low, high) that keeps NaN in both languages (Triton's own drops it since 3.8)."""
    return m.where(x < low, low, m.where(x > high, high, x))


def clip(ratio, logp, advantage, low, high, delta):
    """Clipped surrogate: -min(min(r, delta) A, clamp(r, low, high) A), and its d/dlog r.

    Source: Proximal Policy Optimization Algorithms (2017); delta: INTELLECT-2 (2025). A tie between
    the two branches counts as unclipped, as torch's split gradient does.
    """
    plain = m.where(ratio > delta, delta, ratio) * advantage
    clipped = bounded(ratio, low, high) * advantage
    loss = -m.where(plain > clipped, clipped, plain)
    slope = m.where((plain > clipped) | (ratio > delta), 0.0, -ratio * advantage)
    return loss, slope


def cispo(ratio, logp, advantage, low, high, delta):
    """-stop_gradient(min(r, high)) A logp, and its d/dlogp. Source: MiniMax-M1 (2025)."""
    slope = -m.where(ratio > high, high, ratio) * advantage
    return slope * logp, slope


def k1(logp, ref_logp):
    """logp - ref, and its d/dlogp. Source: Approximating KL Divergence (Schulman, 2020)."""
    gap = logp - ref_logp
    return gap, gap * 0.0 + 1.0


def k2(logp, ref_logp):
    """(logp - ref)^2 / 2, and its d/dlogp. Source: Approximating KL Divergence (Schulman, 2020)."""
    gap = logp - ref_logp
    return 0.5 * gap * gap, gap


def k3(logp, ref_logp):
    """exp(d) - d - 1 with d = ref - logp, and its d/dlogp = 1 - exp(d).

    Above d = 20 nats exp is continued by its tangent, so that a collapsed policy is still pulled
    back by a finite force. Source: Approximating KL Divergence (Schulman, 2020).
    """
    gap = ref_logp - logp
    exponent = m.where(gap > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, gap)
    scale = m.exp(exponent)
    return scale * (1.0 + (gap - exponent)) - gap - 1.0, 1.0 - scale


def token_loss(
    logp,
    log_ratio,
    ref_logp,
    advantage,
    low,
    high,
    delta,
    beta,
    OBJECTIVE,
    KL,
    THROUGH_RATIO,
    WEIGHT_KL,
    HAS_REF,
):
    """One token's loss = objective + beta * [r *] kl, before its weight.

    Returns:
        loss, its partial derivatives by logp and by log_ratio (at token level d log_ratio = d logp,
        so their sum is the derivative), the ratio r and the kl (0 without a reference).
        The ratio is exp(clamp(log_ratio, -20, 20)) and carries no gradient outside.
    """
    outside = (log_ratio > LOG_RATIO_LIMIT) | (log_ratio < -LOG_RATIO_LIMIT)
    ratio = m.exp(bounded(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    loss, slope = OBJECTIVE(ratio, logp, advantage, low, high, delta)
    zero = ratio * 0.0
    if THROUGH_RATIO:
        by_logp = zero
        by_ratio = m.where(outside, 0.0, slope)
    else:
        by_logp = slope
        by_ratio = zero
    kl = zero
    if HAS_REF:
        kl, kl_slope = KL(logp, ref_logp)
        if WEIGHT_KL:
            loss = loss + beta * ratio * kl
            by_logp = by_logp + beta * ratio * kl_slope
            by_ratio = by_ratio + m.where(outside, 0.0, beta * ratio * kl)
        else:
            loss = loss + beta * kl
            by_logp = by_logp + beta * kl_slope
    return loss, by_logp, by_ratio, ratio, kl
