"""What scales or silences the objective of a token: the rollout engine's other probabilities, a
sequence that drifted off the policy, an entropy outside the top set. Every objective is homogeneous
in the advantage, so each of them is a factor >= 0 of it; the KL never has one."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.presets import LEVELS

from .objectives import rollout_weight
from .weights import sequence_sum, spread

# more numbers than these torch refuses a quantile of
_QUANTILE_LIMIT = 1 << 24


def scaled(advantages: Tensor, factor: Tensor) -> Tensor:
    """advantages * factor, exactly 0 where the factor is 0."""
    return torch.where(factor == 0, torch.zeros_like(advantages), advantages * factor)


def rollout_bounds(config: LossConfig) -> tuple[float, float]:
    """Lowest and highest p(old) / p(rollout)."""
    low, high = config.rollout_ratio_min, config.rollout_ratio_max
    return 0.0 if low is None else float(low), float("inf") if high is None else float(high)


def rollout_factor(
    config: LossConfig, log_ratio: Tensor, mask: Tensor, bounds: Tensor | None
) -> Tensor:
    """Factor (N,) for q = p(old) / p(rollout), at the level and in the mode of the configuration.

    Args:
        log_ratio: (N,) old - rollout log-probs; NaN where the rollout has none: such a token is
            neutral (log q = 0), alone and within its sequence.
        bounds: (S+1,) sequence boundaries; may be None at token level.
    """
    level, mode = config.rollout_correction.rsplit("_", 1)
    low, high = rollout_bounds(config)
    if level != "token":
        known = mask & ~torch.isnan(log_ratio)
        total = sequence_sum(torch.where(known, log_ratio, torch.zeros_like(log_ratio)), bounds)
        if level == "geometric":
            total = total / sequence_sum(known.to(total.dtype), bounds).clamp(min=1.0)
        log_ratio = spread(total, bounds, log_ratio.numel())
    return rollout_weight(log_ratio, low, high, mode == "mask")


def correction_stage(config: LossConfig, has_old: bool) -> str:
    """Where the rollout correction becomes a factor of the advantage.

    `before` the pass, when both log-probs are known beforehand; in the `pass` when the old ones are
    the policy's own, or when the level clips tokens on the side of their advantage, which a factor
    of 0 would hide; in the `objective`, when that takes the ratio to the policy that sampled.
    """
    if config.objective.factor_of is not None:
        return "objective"
    return "before" if has_old and not LEVELS[config.level].clips_tokens else "pass"


def corrected(
    config: LossConfig, advantages: Tensor, log_ratio: Tensor, mask: Tensor, bounds: Tensor | None
) -> Tensor:
    """Advantages with the rollout correction in them; log_ratio as in `rollout_factor`."""
    return scaled(advantages, rollout_factor(config, log_ratio, mask, bounds))


def on_policy_factor(
    threshold: float,
    logp: Tensor,
    sampled_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bounds: Tensor,
) -> Tensor:
    """1.0, or 0.0 for tokens of A < 0 in sequences with mean(sampled - logp) above the threshold.

    A NaN among the sampled log-probs counts as no drift. Source: DeepSeek-V3.2 (2025).
    """
    gap = sampled_logp - logp
    gap = torch.where(mask & ~torch.isnan(gap), gap, torch.zeros_like(gap))
    length = sequence_sum(mask.to(gap.dtype), bounds).clamp(min=1.0)
    drift = spread(sequence_sum(gap, bounds) / length, bounds, gap.numel())
    return torch.where((advantages < 0) & (drift > threshold), 0.0, 1.0).to(gap.dtype)


def entropy_threshold(share: float, entropy: Tensor, mask: Tensor) -> Tensor:
    """0-d entropy (nats) above which the top share of the unmasked tokens lies, by linear
    interpolation; NaN with no token. Source: Beyond the 80/20 Rule (2025)."""
    if entropy.numel() == 0:
        return entropy.new_full((), torch.nan)
    counted = torch.where(mask, entropy, torch.full_like(entropy, torch.nan))
    if counted.numel() <= _QUANTILE_LIMIT:
        return torch.nanquantile(counted, 1.0 - share)
    # NaN sorts last; an fp32 rank would not be an integer any more
    values = counted.sort().values
    rank = (~torch.isnan(values)).sum().sub(1).double() * (1.0 - share)
    places = torch.stack((rank.floor(), rank.ceil())).long().clamp(min=0)
    low, high = values[places]
    return torch.lerp(low, high, rank.frac().to(values.dtype))
