"""GRPO losses of language models from logits or hidden states, and a thin trainer around them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# A checkout keeps the Triton files in the top-level kernels/ folder, a wheel beside this file.
if not (Path(__file__).resolve().parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

# Imported at once and not on demand: `logprob` names a module as well as a function, and the
# import system would bind the module here as soon as anything imports it.
# `compiled` and `compiled_logprob` are there for what torch.compile finds in them.
from .config import LossConfig
from .engine.logprob import LogProbs, linear_logprob, logprob
from .loss import compiled, compiled_logprob  # noqa: F401
from .loss.linear import linear_policy_loss
from .loss.logits import policy_loss
from .presets import PRESETS

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "LogProbs",
    "LossConfig",
    "PRESETS",
    "__version__",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "policy_loss",
]

# The trainer needs transformers, which takes seconds to import and is an optional extra.
_LAZY = {"GRPOConfig": "trainer.config", "GRPOTrainer": "trainer.grpo"}


def __getattr__(name: str) -> Any:
    """Imports `GRPOConfig` or `GRPOTrainer` on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
