"""Rewards of a group -> advantages."""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = ("group", "batch", "none")


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
        scale: "group" (GRPO, 2024), "batch" (REINFORCE++, 2025) or "none" (Dr. GRPO, 2025).
        eps: added to the std; 1e-4 as in TRL.
        population: divide the squared deviations by n instead of n - 1.

    Returns:
        (P, G) advantages, float32 (float64 for float64 rewards).

    Raises:
        ValueError: rewards not (P, G) floating point, an infinite reward, an unknown scale.
    """
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(
            "rewards must be floating point of shape (P, G), "
            f"got {rewards.dtype} {tuple(rewards.shape)}."
        )
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}.")
    if torch.isinf(rewards).any():
        raise ValueError("rewards must be finite or NaN (unscorable), got an infinite value.")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    valid = ~torch.isnan(rewards)
    mean, std = _moments(rewards, valid, population)
    if scale == "batch":
        _, std = _moments(rewards.reshape(1, -1), valid.reshape(1, -1), population)
    advantage = rewards - mean
    if scale != "none":
        advantage = advantage / (std + eps)
    infinity = torch.full_like(rewards, torch.inf)
    highest = torch.where(valid, rewards, -infinity).amax(-1, keepdim=True)
    lowest = torch.where(valid, rewards, infinity).amin(-1, keepdim=True)
    return torch.where(valid & (highest > lowest), advantage, torch.zeros_like(advantage))
