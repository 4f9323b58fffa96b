"""Rewards (P, G) -> advantages (P, G).

With a critic: rewards and values of tokens (N,) -> advantages (N,), in `gae`.
"""

from .decoupled import decoupled_advantages, normalized_within_groups
from .gae import (
    KL_IN_REWARD,
    explained_variance,
    gae,
    length_lam,
    token_kl,
    token_rewards,
    whiten,
)
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
    "KL_IN_REWARD",
    "SCALES",
    "SCHEMES",
    "advantages_of",
    "centered_advantages",
    "check_estimator",
    "check_weighting",
    "decoupled_advantages",
    "explained_variance",
    "gae",
    "group_advantages",
    "leave_one_out_advantages",
    "length_lam",
    "normalized_within_groups",
    "reward_weights",
    "token_kl",
    "token_rewards",
    "whiten",
]
