"""Per-token objectives and KL estimators, written once for torch and for Triton.

The kernels compile these very functions with `m` bound to `triton.language` (`kernels/lang.py`), so
they use arithmetic and `m.exp`, `m.log`, `m.sigmoid`, `m.where` only: no shapes, no branch on a
value; a branch on an upper-case argument is decided when the kernel is compiled. Each returns the
derivative beside the value, because a stop-gradient lives in the derivative; `reference.py` writes
the detach out and a float64 test compares the two. Comparisons are arranged so that a NaN reaches
both outputs. Every objective is homogeneous in the advantage: f(c A) = c f(A) for c >= 0.
"""

import torch as m

# exp(20) = 4.9e8: far outside any trust region, and its square is still finite in fp32
LOG_RATIO_LIMIT = 20.0


def bounded(x, low, high):
    """clamp(x, low, high) that keeps NaN in both languages (Triton's own drops it since 3.8)."""
    return m.where(x < low, low, m.where(x > high, high, x))


def one_minus_exp(x):
    """1 - exp(x) for x <= 0: Taylor to x^9 above -0.5, where the difference would cancel."""
    s = 1.0 + x / 9.0
    s = 1.0 + x / 8.0 * s
    s = 1.0 + x / 7.0 * s
    s = 1.0 + x / 6.0 * s
    s = 1.0 + x / 5.0 * s
    s = 1.0 + x / 4.0 * s
    s = 1.0 + x / 3.0 * s
    s = 1.0 + x / 2.0 * s
    return m.where(x > -0.5, -x * s, 1.0 - m.exp(x))


def clip(ratio, logp, advantage, low, high, cap, _):
    """Clipped surrogate: -min(min(r, cap) A, clamp(r, low, high) A), and its d/dlog r.

    Source: Proximal Policy Optimization Algorithms (2017). The cap is the two-sided clip of
    INTELLECT-2 (2025), and, above high, the dual clip of Mastering Complex Control in MOBA Games
    (2020): it binds where A < 0 alone. A tie between the branches counts as unclipped, as torch's
    split gradient does.
    """
    plain = m.where(ratio > cap, cap, ratio) * advantage
    clipped = bounded(ratio, low, high) * advantage
    loss = -m.where(plain > clipped, clipped, plain)
    slope = m.where((plain > clipped) | (ratio > cap), 0.0, -ratio * advantage)
    return loss, slope


def surrogate(ratio, logp, advantage, _a, _b, _c, _d):
    """-r A, and its d/dlog r. With token ratios clipped before their geometric mean this is
    Geometric-Mean Policy Optimization (2025)."""
    loss = -ratio * advantage
    return loss, loss


def sapo(ratio, logp, advantage, tau_pos, tau_neg, _a, _b):
    """Soft gate: -(4 / tau) sigmoid(tau (r - 1)) A with tau by the sign of A, and its d/dlog r.

    Source: Soft Adaptive Policy Optimization (2025).
    """
    # torch.where of two Python numbers is fp32, whatever the rest is
    zero = ratio * 0.0
    tau = m.where(advantage > 0.0, tau_pos + zero, tau_neg + zero)
    gate = m.sigmoid(tau * (ratio - 1.0))
    return -4.0 / tau * gate * advantage, -4.0 * gate * (1.0 - gate) * ratio * advantage


def cispo(ratio, logp, advantage, low, high, _b, _c):
    """-stop_gradient(clamp(r, low, high)) A logp, and its d/dlogp. Source: MiniMax-M1 (2025)."""
    slope = -bounded(ratio, low, high) * advantage
    return slope * logp, slope


def reinforce(ratio, logp, advantage, _a, _b, _c, _d):
    """-A logp, and its d/dlogp. Source: Simple Statistical Gradient-Following Algorithms (1992)."""
    return -advantage * logp, -advantage


def vespo(ratio, logp, advantage, k_pos, scale_pos, k_neg, scale_neg):
    """-stop_gradient(phi) A logp with phi = exp(s + k log w - s w), and its d/dlogp.

    w is the ratio of the whole sequence, at least 1e-8; k and s go by the sign of A.
    Source: VESPO: Variational Sequence-Level Soft Policy Optimization (2026).
    """
    w = m.where(ratio < 1e-8, 1e-8, ratio)
    zero = w * 0.0
    k = m.where(advantage < 0.0, k_neg + zero, k_pos + zero)
    scale = m.where(advantage < 0.0, scale_neg + zero, scale_pos + zero)
    slope = -m.exp(scale + k * m.log(w) - scale * w) * advantage
    return slope * logp, slope


def dppo_tv(ratio, logp, advantage, low, high, cap, _):
    """-stop_gradient(min(r, cap)) A logp, 0 where the total variation of the sampled token left
    its bounds in the direction of A; and its d/dlogp.

    p - p_old > high stops a token of A > 0, p - p_old < -low one of A < 0.
    Source: Rethinking the Trust Region in LLM Reinforcement Learning (DPPO, 2026), binary form.
    """
    p = m.exp(logp)
    gap = p - p / ratio
    stopped = m.where(advantage > 0.0, gap, -low) > m.where(advantage > 0.0, high, gap)
    slope = m.where(stopped, 0.0, -m.where(ratio > cap, cap, ratio) * advantage)
    return slope * logp, slope


def dppo_kl(ratio, logp, advantage, low, high, cap, _):
    """`dppo_tv` with the bounds on KL(old || new) of the event "this token": p_old log(p_old / p)
    + (1 - p_old) log((1 - p_old) / (1 - p)).

    1e-8 stands beside 1 - p, which is 0 for a certain token.
    Source: Rethinking the Trust Region in LLM Reinforcement Learning (DPPO, 2026), binary form.
    """
    old = logp - m.log(ratio)
    p_old = m.exp(old)
    other = m.log((one_minus_exp(old) + 1e-8) / (one_minus_exp(logp) + 1e-8))
    divergence = (1.0 - p_old) * other + p_old * (old - logp)
    away = m.where(advantage > 0.0, logp - old, old - logp) > 0.0
    stopped = away & (m.where(advantage > 0.0, divergence - high, divergence - low) > 0.0)
    slope = m.where(stopped, 0.0, -m.where(ratio > cap, cap, ratio) * advantage)
    return slope * logp, slope


def k1(logp, ref_logp):
    """logp - ref, and its d/dlogp. Source: Approximating KL Divergence (Schulman, 2020)."""
    gap = logp - ref_logp
    return gap, gap * 0.0 + 1.0


def k2(logp, ref_logp):
    """(logp - ref)^2 / 2, and its d/dlogp. Source: Approximating KL Divergence (Schulman, 2020)."""
    gap = logp - ref_logp
    return 0.5 * gap * gap, gap


def absolute(logp, ref_logp):
    """|logp - ref|, and its d/dlogp, 0 at 0. Source: Approximating KL Divergence (Schulman, 2020),
    as its k2 with another norm."""
    gap = logp - ref_logp
    return m.where(gap < 0.0, -gap, gap), m.where(gap < 0.0, -1.0, m.where(gap > 0.0, 1.0, gap))


def k3(logp, ref_logp):
    """exp(d) - d - 1 with d = ref - logp, and its d/dlogp = 1 - exp(d).

    Above d = 20 nats exp is continued by its tangent, so that a collapsed policy is still pulled
    back by a finite force. Source: Approximating KL Divergence (Schulman, 2020).
    """
    gap = ref_logp - logp
    exponent = m.where(gap > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, gap)
    scale = m.exp(exponent)
    return scale * (1.0 + (gap - exponent)) - gap - 1.0, 1.0 - scale


def rollout_weight(log_ratio, low, high, MASK):
    """Factor of the objective for tokens that another engine sampled: q = p(old) / p(rollout),
    bounded to [low, high], or 0 outside of it with MASK; 1 where log q is NaN (no rollout
    log-prob). No gradient.

    Source: Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (2025); the mask:
    Every Step Evolves (IcePop, 2025).
    """
    q = m.exp(bounded(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    factor = m.where((q < low) | (q > high), 0.0, q) if MASK else bounded(q, low, high)
    return m.where(log_ratio == log_ratio, factor, 1.0)


def token_loss(
    logp,
    log_ratio,
    ref_logp,
    advantage,
    a,
    b,
    c,
    d,
    beta,
    OBJECTIVE,
    KL,
    KL_GRADIENT,
    THROUGH_RATIO,
    WEIGHT_KL,
    HAS_REF,
):
    """One token's loss = objective + beta * [r *] kl, before its weight.

    a, b, c, d are the numbers of the objective (`LossConfig.parameters`); KL_GRADIENT is the
    estimator whose derivative stands for that of KL.

    Returns:
        loss, its partial derivatives by logp and by log_ratio (at token level d log_ratio = d logp,
        so their sum is the derivative), the ratio r and the kl (0 without a reference).
        The ratio is exp(clamp(log_ratio, -20, 20)) and carries no gradient outside.
    """
    outside = (log_ratio > LOG_RATIO_LIMIT) | (log_ratio < -LOG_RATIO_LIMIT)
    ratio = m.exp(bounded(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    loss, slope = OBJECTIVE(ratio, logp, advantage, a, b, c, d)
    zero = ratio * 0.0
    if THROUGH_RATIO:
        by_logp = zero
        by_ratio = m.where(outside, 0.0, slope)
    else:
        by_logp = slope
        by_ratio = zero
    kl = zero
    if HAS_REF:
        kl, _ = KL(logp, ref_logp)
        _, kl_slope = KL_GRADIENT(logp, ref_logp)
        if WEIGHT_KL:
            loss = loss + beta * ratio * kl
            by_logp = by_logp + beta * ratio * kl_slope
            by_ratio = by_ratio + m.where(outside, 0.0, beta * ratio * kl)
        else:
            loss = loss + beta * kl
            by_logp = by_logp + beta * kl_slope
    return loss, by_logp, by_ratio, ratio, kl
