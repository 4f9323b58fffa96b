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
