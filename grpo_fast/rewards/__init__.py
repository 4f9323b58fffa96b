"""Rewards: functions, async functions, reward models and reasoning-gym scorers behind one call."""

from .protocol import RewardSet, load_function, weighted
from .reasoning import reasoning_gym_dataset, reasoning_gym_reward

__all__ = [
    "RewardSet",
    "load_function",
    "reasoning_gym_dataset",
    "reasoning_gym_reward",
    "weighted",
]
