"""The loops on transformers.Trainer. A name is imported on first use, and transformers with it."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "GRPOConfig": "config",
    "GRPOTrainer": "grpo",
    "IterativeGRPO": "iterative",
    "MicroBatch": "window",
    "PPOConfig": "ppo_config",
    "PPOTrainer": "ppo",
    "RewardModelConfig": "reward_config",
    "RewardModelTrainer": "reward_model",
    "RolloutTrainer": "loop",
    "Stateful": "checkpoint",
}

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "IterativeGRPO",
    "MicroBatch",
    "PPOConfig",
    "PPOTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
    "RolloutTrainer",
    "Stateful",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
