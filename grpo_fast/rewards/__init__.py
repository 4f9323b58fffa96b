"""Rewards: rules, functions, judges, reward models and reasoning-gym scorers behind one call."""

from .combination import weighted
from .loading import load_function, load_reward
from .protocol import RewardSet
from .reasoning import reasoning_gym_dataset, reasoning_gym_reward
from .rules import RULES
from .workers import in_worker

__all__ = [
    "RULES",
    "RewardSet",
    "in_worker",
    "load_function",
    "load_reward",
    "reasoning_gym_dataset",
    "reasoning_gym_reward",
    "weighted",
]
