"""Rewards (P, G) -> advantages (P, G)."""

from .decoupled import decoupled_advantages, normalized_within_groups
from .group import (
    SCALES,
    centered_advantages,
    group_advantages,
    leave_one_out_advantages,
)
from .reward_weights import SCHEMES, check_weighting, reward_weights
from .table import ADVANTAGES, advantages_of, check_estimator

__all__ = [
    "ADVANTAGES",
    "SCALES",
    "SCHEMES",
    "advantages_of",
    "centered_advantages",
    "check_estimator",
    "check_weighting",
    "decoupled_advantages",
    "group_advantages",
    "leave_one_out_advantages",
    "normalized_within_groups",
    "reward_weights",
]
