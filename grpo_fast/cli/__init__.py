"""The command line, `grpo-fast`: train, ppo, reward-model, iterate, plan and doctor."""

from __future__ import annotations

import importlib
from typing import Any

from .main import main

__all__ = ["load_datasets", "load_rewards", "main"]


def __getattr__(name: str) -> Any:
    """`load_datasets` and `load_rewards` on first use."""
    if name not in ("load_datasets", "load_rewards"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.train"), name)
