"""GRPO losses of language models from logits or hidden states, and a thin trainer around them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# A checkout keeps the Triton files in the top-level kernels/ folder, a wheel beside this file.
if not (Path(__file__).resolve().parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

# `engine.compiled` is there for what torch.compile finds in its table.
from .config import LossConfig
from .engine import compiled  # noqa: F401
from .engine.chunks import release_workspace
from .engine.head import Head
from .engine.logprob import LogProbs, linear_logprob, logprob
from .loss.linear import linear_policy_loss
from .loss.logits import policy_loss
from .objective.terms import TokenTerms
from .objective.token_losses import TokenLosses, token_losses
from .objective.weights import count as denominator_count
from .presets import PRESETS

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "Head",
    "LogProbs",
    "LossConfig",
    "PPOConfig",
    "PPOTrainer",
    "PRESETS",
    "TokenLosses",
    "TokenTerms",
    "__version__",
    "attach",
    "denominator_count",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "policy_loss",
    "release_workspace",
    "token_losses",
]

# These need transformers, which takes seconds to import and is an optional extra.
_LAZY = {
    "GRPOConfig": "trainer.config",
    "GRPOTrainer": "trainer.grpo",
    "PPOConfig": "trainer.ppo_config",
    "PPOTrainer": "trainer.ppo",
    "attach": "models.policy",
}


def __getattr__(name: str) -> Any:
    """Imports a name of `_LAZY` on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
