"""The rewards of one completion become one number, or one advantage."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import nearest

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")


def check_aggregation(name: str) -> None:
    """Refuse what is not in `AGGREGATIONS`."""
    if name not in AGGREGATIONS:
        raise ValueError(
            f"multi_objective_aggregation: expected a known way, got {name!r}; "
            f"{nearest(name, AGGREGATIONS)}"
        )


def weighted(rewards: Tensor, weights: Tensor) -> Tensor:
    """r_i = sum over k of weights_k * rewards_ik without the NaNs; NaN where all K are NaN.

    Args:
        rewards: (B, K) floating, NaN = unscorable.
        weights: (K,) floating.

    Returns:
        (B,), dtype of `rewards`.

    Raises:
        ValueError: when the shapes do not fit.
    """
    if rewards.dim() != 2 or weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"weights: expected shape (K,) for rewards (B, K), got {tuple(weights.shape)} for "
            f"{tuple(rewards.shape)}."
        )
    missing = rewards.isnan()
    total = torch.where(missing, 0.0, rewards) @ weights.to(rewards)
    return torch.where(missing.all(1), torch.nan, total)


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
    # imported late: the advantages stand beside the rewards, not below them
    from grpo_fast.advantages.group import group_advantages

    if rewards.dim() != 2 or num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(
            f"rewards: expected shape (B, K) with B a multiple of {num_generations}, got "
            f"{tuple(rewards.shape)}."
        )
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
    total = weighted(normalized_within_groups(rewards, num_generations), weights)
    valid = total[~total.isnan()]
    std = valid.std() if len(valid) > 1 else total.new_zeros(())
    return torch.where(total.isnan(), 0.0, total / (std + 1e-4))
