"""Several rewards, each normalised within its group before they are added up (GDPO)."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.checks import fail

from .group import group_advantages


def normalized_within_groups(rewards: Tensor, num_generations: int, eps: float = 1e-4) -> Tensor:
    """n_ik = (r_ik - mean_group(r_k)) / (std_group(r_k) + eps): each reward on its own scale.

    The sum of these, instead of the sum of the rewards, keeps apart what a sum merges: two rewards
    of 1 and 0 and of 0 and 1 have one sum and two meanings, and a reward on a scale of 10 drowns
    one on a scale of 1. A reward whose valid values in a group are all equal is 0 there.
    Source: GDPO: Group reward-Decoupled Normalization Policy Optimization (2026).

    Args:
        rewards: (B, K) floating, groups of `num_generations` rows in order, NaN = unscorable.
        eps: added to the std (n - 1), as in `group_advantages`.

    Returns:
        (B, K), NaN where `rewards` is; float32, or float64 for float64 rewards.

    Raises:
        ValueError: when B is no multiple of `num_generations`, or a reward is infinite.
    """
    if rewards.dim() != 2 or num_generations < 1 or len(rewards) % num_generations:
        fail("rewards", f"shape (B, K), B a multiple of {num_generations}", tuple(rewards.shape))
    kinds = rewards.shape[1]
    groups = rewards.reshape(-1, num_generations, kinds).transpose(1, 2)  # (P, K, G)
    flat = group_advantages(groups.reshape(-1, num_generations), eps=eps)
    scaled = flat.reshape(groups.shape).transpose(1, 2).reshape(rewards.shape)
    return torch.where(rewards.isnan(), torch.nan, scaled)


def decoupled_advantages(rewards: Tensor, weights: Tensor, num_generations: int) -> Tensor:
    """A_i = s_i / (std_batch(s) + 1e-4), s_i = sum over k of w_k n_ik.

    n are the rewards of `normalized_within_groups`. The paper subtracts the batch's mean of s too;
    that mean is 0, since each n sums to 0 over its group, so it is left out: a group in which every
    reward is flat then gets exactly 0, and costs no backward. A completion without any reward is in
    no std and gets 0.
    Source: GDPO: Group reward-Decoupled Normalization Policy Optimization (2026).

    Args:
        rewards: (B, K) floating, groups of `num_generations` rows in order, NaN = unscorable.
        weights: (K,) floating.

    Returns:
        (B,) advantages; float32, or float64 for float64 rewards.

    Raises:
        ValueError: when the shapes do not fit, or a reward is infinite.
    """
    scaled = normalized_within_groups(rewards, num_generations)
    missing = scaled.isnan()
    total = torch.where(missing, 0.0, scaled) @ weights.to(scaled)
    total = torch.where(missing.all(1), torch.nan, total)
    valid = total[~total.isnan()]
    std = valid.std() if len(valid) > 1 else total.new_zeros(())
    return torch.where(total.isnan(), 0.0, total / (std + 1e-4))
