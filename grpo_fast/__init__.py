"""GRPO losses of language models from logits or hidden states, and a thin trainer around them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A checkout keeps the Triton files in the top-level kernels/ folder, a wheel beside this file.
if not (Path(__file__).resolve().parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from .config import LossConfig
    from .engine.chunks import release_workspace
    from .engine.head import Head
    from .engine.logprob import LogProbs, linear_logprob, logprob
    from .loss.linear import linear_policy_loss
    from .loss.logits import policy_loss
    from .loss.vocabulary import sharded_logprob, sharded_policy_loss
    from .models.policy import attach
    from .objective.terms import TokenTerms
    from .objective.token_losses import TokenLosses, token_losses
    from .objective.weights import count as denominator_count
    from .presets import PRESETS
    from .trainer.config import GRPOConfig
    from .trainer.grpo import GRPOTrainer
    from .trainer.iterative import IterativeGRPO
    from .trainer.ppo import PPOTrainer
    from .trainer.ppo_config import PPOConfig
    from .trainer.reward_config import RewardModelConfig
    from .trainer.reward_model import RewardModelTrainer

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "Head",
    "IterativeGRPO",
    "LogProbs",
    "LossConfig",
    "PPOConfig",
    "PPOTrainer",
    "PRESETS",
    "RewardModelConfig",
    "RewardModelTrainer",
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
    "sharded_logprob",
    "sharded_policy_loss",
    "token_losses",
]

# Imported on first use: torch takes seconds of CPU, transformers as many again, and the command
# line answers --help without either. `.models` and `.trainer` are an optional extra.
_HOME = {
    "GRPOConfig": "trainer.config",
    "GRPOTrainer": "trainer.grpo",
    "Head": "engine.head",
    "IterativeGRPO": "trainer.iterative",
    "LogProbs": "engine.logprob",
    "LossConfig": "config",
    "PPOConfig": "trainer.ppo_config",
    "PPOTrainer": "trainer.ppo",
    "PRESETS": "presets",
    "RewardModelConfig": "trainer.reward_config",
    "RewardModelTrainer": "trainer.reward_model",
    "TokenLosses": "objective.token_losses",
    "TokenTerms": "objective.terms",
    "attach": "models.policy",
    "denominator_count": "objective.weights",
    "linear_logprob": "engine.logprob",
    "linear_policy_loss": "loss.linear",
    "logprob": "engine.logprob",
    "policy_loss": "loss.logits",
    "release_workspace": "engine.chunks",
    "sharded_logprob": "loss.vocabulary",
    "sharded_policy_loss": "loss.vocabulary",
    "token_losses": "objective.token_losses",
}
_OWN_NAME = {"denominator_count": "count"}


def __getattr__(name: str) -> Any:
    """Imports a name of `_HOME` on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOME[name]}")
    value = globals()[name] = getattr(home, _OWN_NAME.get(name, name))
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
