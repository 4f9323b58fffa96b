"""Rewards of a group -> advantages, or weights of its completions; `ADVANTAGES` is the table of
estimators."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.checks import describe, fail, nearest

SCALES = ("group", "batch", "none")


def scorable(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The rewards in float64, and which of them are scorable.

    In float32 the sum of 32 rewards near 1e6 has no ones any more, and an offset that says nothing
    becomes an advantage.
    """
    if rewards.dim() != 2 or not rewards.is_floating_point():
        fail("rewards", "floating-point tensor (P, G)", describe(rewards))
    if torch.isinf(rewards).any():
        fail("rewards", "finite numbers or NaN (unscorable)", "an infinite one")
    # MPS has nothing wider than fp32
    wide = rewards.float() if rewards.device.type == "mps" else rewards.double()
    return wide, ~torch.isnan(rewards)


def width(rewards: Tensor) -> torch.dtype:
    """What is made of rewards has this type: float32, or float64 for float64 rewards."""
    return torch.promote_types(rewards.dtype, torch.float32)


def extremes(rewards: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest valid reward of each group, (P, 1); inf and -inf where there is none."""
    infinity = torch.full_like(rewards, torch.inf)
    highest = torch.where(valid, rewards, -infinity).amax(-1, keepdim=True)
    lowest = torch.where(valid, rewards, infinity).amin(-1, keepdim=True)
    return lowest, highest


def telling(values: Tensor, rewards: Tensor, valid: Tensor) -> Tensor:
    """The values, exactly 0 for unscorable completions and groups without two different rewards."""
    lowest, highest = extremes(rewards, valid)
    return torch.where(valid & (highest > lowest), values, torch.zeros_like(values))


def _moments(rewards: Tensor, valid: Tensor, population: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the last dimension of the valid entries, each (..., 1)."""
    count = valid.sum(-1, keepdim=True)
    filled = torch.where(valid, rewards, torch.zeros_like(rewards))
    mean = filled.sum(-1, keepdim=True) / count.clamp(min=1)
    gap = torch.where(valid, rewards - mean, torch.zeros_like(rewards))
    freedom = count if population else count - 1
    return mean, (gap.square().sum(-1, keepdim=True) / freedom.clamp(min=1)).sqrt()


def group_advantages(
    rewards: Tensor, scale: str = "group", *, eps: float = 1e-4, population: bool = False
) -> Tensor:
    """Advantages of groups of completions of one prompt.

        A = (r - mean_group(r)) / (std + eps)        std of the group, of the whole batch, or no
        division

    A group whose valid rewards are all equal (or that has fewer than two) gets exactly 0, so that
    it cannot train on rounding noise divided by eps.

    Args:
        rewards: (P, G) floating point; NaN marks an unscorable completion: it is left out of the
            mean and the std, and its advantage is 0.
        scale: "group" (DeepSeekMath: Pushing the Limits of Mathematical Reasoning, 2024), "batch"
            (Tricks or Traps? A Deep Dive into RL for LLM Reasoning, 2025) or "none" (Understanding
            R1-Zero-Like Training: A Critical Perspective, 2025).
        eps: added to the std; 1e-4 as in TRL.
        population: divide the squared deviations by n instead of n - 1.

    Returns:
        (P, G) advantages, float32 (float64 for float64 rewards).

    Raises:
        ValueError: rewards not (P, G) floating point, an infinite reward, an unknown scale.
    """
    if scale not in SCALES:
        fail("scale", "a known scale", repr(scale), nearest(scale, SCALES))
    given, (rewards, valid) = rewards, scorable(rewards)
    mean, std = _moments(rewards, valid, population)
    if scale == "batch":
        _, std = _moments(rewards.reshape(1, -1), valid.reshape(1, -1), population)
    advantage = rewards - mean
    if scale != "none":
        advantage = advantage / (std + eps)
    return telling(advantage, rewards, valid).to(width(given))


def centered_advantages(rewards: Tensor) -> Tensor:
    """A = r - mean_group(r): `group_advantages` without the division by the std.

    Source: Understanding R1-Zero-Like Training: A Critical Perspective (Dr. GRPO, 2025).

    Args:
        rewards: (P, G) floating point, NaN = unscorable, as for `group_advantages`.

    Returns:
        (P, G) advantages, float32 (float64 for float64 rewards).

    Raises:
        ValueError: rewards not (P, G) floating point, an infinite reward.
    """
    return group_advantages(rewards, "none")


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Every completion against the mean of the others of its group.

        A_i = r_i - mean(r_j for j != i) = n / (n - 1) * (r_i - mean_group(r))

    over the n scorable completions. The baseline does not depend on the completion it is taken
    from, so the gradient is unbiased. A group whose valid rewards are all equal (or that has fewer
    than two) gets exactly 0.
    Source: Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback
    in LLMs (RLOO, 2024).

    Args:
        rewards: (P, G) floating point; NaN marks an unscorable completion: it is in no baseline,
            and its advantage is 0.

    Returns:
        (P, G) advantages, float32 (float64 for float64 rewards).

    Raises:
        ValueError: rewards not (P, G) floating point, an infinite reward.
    """
    given, (rewards, valid) = rewards, scorable(rewards)
    count = valid.sum(-1, keepdim=True).to(rewards.dtype)
    mean, _ = _moments(rewards, valid, population=True)
    advantage = (rewards - mean) * (count / (count - 1).clamp(min=1))
    return telling(advantage, rewards, valid).to(width(given))
