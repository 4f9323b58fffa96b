"""The loss a second time: one token at a time on Python floats, from the papers' definitions.

It shares no code and no tensor operation with `grpo_fast/reference.py`. What a paper puts under a
stop-gradient is computed from `stopped` and everything else from `logp`: with both the same it is
the value, and a difference quotient in `logp` alone is the derivative that a trainer wants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from grpo_fast import PRESETS, LossConfig

Rows = list[list[float]]


@dataclass(frozen=True)
class Tokens:
    """A padded batch as nested lists; what is None is not given."""

    logp: Rows
    entropy: Rows
    advantages: Rows
    mask: list[list[bool]]
    old: Rows | None = None
    ref: Rows | None = None
    rollout: Rows | None = None
    stopped: Rows | None = None
    threshold: float | None = None
    denominator: float | None = None

    @property
    def steps(self) -> list[list[int]]:
        """Places of the unmasked tokens of each sequence."""
        return [[t for t, counts in enumerate(row) if counts] for row in self.mask]


def _ratio(log_ratio: float) -> float:
    return math.exp(min(max(log_ratio, -20.0), 20.0))


def ratios(
    config: LossConfig, live: list[float], still: list[float], advantages: list[float]
) -> list[float]:
    """What stands in front of each advantage of a sequence, from its log-ratios."""
    if config.level == "token":
        return [_ratio(x) for x in live]
    if config.level == "sequence_product":
        # p(sequence) / p_old(sequence)
        return [_ratio(math.fsum(live))] * len(live)
    if config.level == "sequence_token":
        # GSPO-token: the value of GSPO, the gradient of the token's own ratio
        mean = math.fsum(still) / len(still)
        return [_ratio(mean) * math.exp(x - x0) for x, x0 in zip(live, still, strict=True)]
    if config.level == "sequence_clipped":
        # GMPO: each ratio clipped to (e^-low, e^high) on the side its advantage pushes to
        clipped = []
        for x, a in zip(live, advantages, strict=True):
            x = min(x, config.upper_epsilon) if a > 0 else x
            clipped.append(max(x, -config.epsilon) if a < 0 else x)
        live = clipped
    return [_ratio(math.fsum(live) / len(live))] * len(live)


def _stays(config: LossConfig, p: float, q: float, a: float) -> bool:
    """DPPO: whether the event "this token" is still inside its trust region around p_old = q."""
    if (a > 0 and p <= q) or (a <= 0 and p >= q):
        return True
    bound = config.upper_epsilon if a > 0 else config.epsilon
    if config.loss_type == "dppo_tv":
        return abs(p - q) <= bound
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) <= bound


def _phi(config: LossConfig, w: float, a: float) -> float:
    """VESPO: w^k e^(lambda (1 - w))."""
    side = "neg" if a < 0 else "pos"
    decay = getattr(config, f"vespo_lambda_{side}")
    return max(w, 1e-8) ** getattr(config, f"vespo_k_{side}") * math.exp(decay * (1 - w))


def objective(
    config: LossConfig, r: float, a: float, logp: float, still: tuple[float, float, float]
) -> float:
    """What one token costs; still: its ratio, log-prob and old log-prob under the stop-gradient."""
    fixed, logp0, old = still
    kind = PRESETS[config.loss_type].objective
    if kind == "clip" and a > 0:
        return -a * min(r, 1 + config.upper_epsilon)
    if kind == "clip":
        cap = max(3.0, 1 + config.upper_epsilon) if config.loss_type == "ppo" else math.inf
        cap = cap if config.delta is None else config.delta
        return -a * min(max(r, 1 - config.epsilon), cap)
    if kind == "surrogate":
        return -a * r
    if kind == "sapo":
        tau = config.sapo_temperature_pos if a > 0 else config.sapo_temperature_neg
        return -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))
    if kind == "cispo":
        return -a * min(max(fixed, config.cispo_ratio_min), config.upper_epsilon) * logp
    if kind == "reinforce":
        return -a * logp
    if kind == "vespo":
        return -a * _phi(config, fixed, a) * logp
    cap = 20.0 if config.delta is None else config.delta
    inside = _stays(config, math.exp(logp0), math.exp(old), a)
    return -a * min(fixed, cap) * logp if inside else 0.0


def divergence(kind: str, logp: float, ref: float) -> float:
    """Schulman's estimators of KL(policy || reference)."""
    x = ref - logp
    return {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x, "absolute": abs(x)}[kind]


def penalty(config: LossConfig, logp: float, logp0: float, ref: float) -> float:
    """The KL of a token; straight-through: the value of one estimator, the slope of another."""
    if config.kl_gradient is None:
        return divergence(config.kl_estimator, logp, ref)
    moved = divergence(config.kl_gradient, logp, ref) - divergence(config.kl_gradient, logp0, ref)
    return divergence(config.kl_estimator, logp0, ref) + moved


def rollout_factors(config: LossConfig, old: list[float], rollout: list[float]) -> list[float]:
    """p(old) / p(rollout) of a sequence at its level, bounded or cut; NaN has no say."""
    level, mode = config.rollout_correction.split("_")
    known = [math.exp(o - r) for o, r in zip(old, rollout, strict=True) if not math.isnan(r)]
    low = config.rollout_ratio_min or 0.0
    high = math.inf if config.rollout_ratio_max is None else config.rollout_ratio_max
    whole = math.prod(known)
    if level == "geometric":
        whole = whole ** (1 / max(len(known), 1))
    out = []
    for o, r in zip(old, rollout, strict=True):
        q = whole
        if level == "token":
            q = math.exp(o - r)
        if mode == "truncate":
            q = min(max(q, low), high)
        elif q < low or q > high:
            q = 0.0
        out.append(1.0 if level == "token" and math.isnan(r) else q)
    return out


def quantile(values: list[float], share: float) -> float:
    """The value below which a share of them lies, by linear interpolation."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low, high = values[math.floor(place)], values[math.ceil(place)]
    return low + (place - math.floor(place)) * (high - low)


def drifted(config: LossConfig, sampled: list[float], logp: list[float]) -> bool:
    """DeepSeek-V3.2: mean log p(sampled) / p of a sequence above the threshold; NaN drifts not."""
    if config.off_policy_mask_threshold is None:
        return False
    gaps = [0.0 if math.isnan(s) else s - x for s, x in zip(sampled, logp, strict=True)]
    return math.fsum(gaps) / len(gaps) > config.off_policy_mask_threshold


def sequence_losses(config: LossConfig, tokens: Tokens, b: int, steps: list[int]) -> list[float]:
    """Losses of the unmasked tokens of sequence b."""

    def row(values: Rows) -> list[float]:
        return [values[b][t] for t in steps]

    logp, advantages = row(tokens.logp), row(tokens.advantages)
    still = row(tokens.logp if tokens.stopped is None else tokens.stopped)
    old = still if tokens.old is None else row(tokens.old)
    factors, sampled, base = [1.0] * len(steps), old, old
    if tokens.rollout is not None:
        sampled = row(tokens.rollout)
        if config.loss_type == "vespo":
            base = [o if math.isnan(s) else s for o, s in zip(old, sampled, strict=True)]
        else:
            factors = rollout_factors(config, old, sampled)
    gaps, gaps0 = ([x - o for x, o in zip(v, base, strict=True)] for v in (logp, still))
    ratio = ratios(config, gaps, gaps0, advantages)
    ratio0 = ratios(config, gaps0, gaps0, advantages)
    off = drifted(config, sampled, still)
    out = []
    for i, t in enumerate(steps):
        a = advantages[i]
        fixed = (ratio0[i], still[i], old[i])
        value = objective(config, ratio[i], a, logp[i], fixed) * factors[i]
        kept = tokens.threshold is None or tokens.entropy[b][t] >= tokens.threshold
        if not kept or (off and a < 0):
            value = 0.0
        if tokens.ref is not None:
            kl = penalty(config, logp[i], still[i], tokens.ref[b][t])
            # vespo has a ratio of the sequence for its objective alone
            own = math.exp(logp[i] - old[i]) if config.loss_type == "vespo" else ratio[i]
            value += config.beta * kl * (own if config.use_bias_correction_kl else 1.0)
        out.append(value - config.entropy_coef * tokens.entropy[b][t] * kept)
    return out


def loss(config: LossConfig, tokens: Tokens) -> float:
    """The loss of a batch."""
    if config.top_entropy_quantile < 1 and tokens.threshold is None:
        every = [tokens.entropy[b][t] for b, row in enumerate(tokens.steps) for t in row]
        share = 1 - config.top_entropy_quantile
        tokens = replace(tokens, threshold=quantile(every, share))
    rows = [sequence_losses(config, tokens, b, s) if s else [] for b, s in enumerate(tokens.steps)]
    by_token = config.weights == "token_mean"
    count = sum(len(row) for row in rows) if by_token else len(rows)
    count = count if tokens.denominator is None else tokens.denominator
    if config.weights == "sequence_mean":
        return math.fsum(math.fsum(row) / len(row) for row in rows if row) / count
    total = math.fsum(x for row in rows for x in row)
    if config.weights == "constant_length":
        total /= config.max_completion_length
    return total / count


def derivative(config: LossConfig, tokens: Tokens, h: float = 1e-5) -> Rows:
    """d loss / d logp by central differences, 0 where masked; without the entropy's share."""
    tokens = replace(tokens, stopped=tokens.stopped or tokens.logp)
    out = [[0.0] * len(row) for row in tokens.logp]
    for b, steps in enumerate(tokens.steps):
        for t in steps:
            values = []
            for move in (h, -h):
                logp = [list(row) for row in tokens.logp]
                logp[b][t] += move
                values.append(loss(config, replace(tokens, logp=logp)))
            out[b][t] = (values[0] - values[1]) / (2 * h)
    return out
