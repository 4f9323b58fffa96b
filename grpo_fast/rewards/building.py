"""What a reward is made of: a rule, a function, a checkpoint or a model, each as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grpo_fast.checks import fail

from .loading import PREFIXES, load_reward


def check_one_tokenizer(tokenizer: Any, rewards: list[Any]) -> None:
    """Refuse one tokenizer for several reward models, whose vocabularies differ.

    Raises:
        ValueError: there is one, and more than one model.
    """
    models = [r for r in rewards if isinstance(r, torch.nn.Module) or _is_checkpoint(r)]
    if tokenizer is not None and len(models) > 1:
        expected = f"a list with the tokenizer of each of {len(models)} reward models"
        hint = "give None where a function stands, or where the checkpoint has its own."
        fail("reward_processing_classes", expected, "one tokenizer", hint)


def _is_checkpoint(reward: Any) -> bool:
    return isinstance(reward, str) and not reward.startswith(PREFIXES)


def as_function(
    reward: Any,
    tokenizer: Any,
    device: torch.device | str | None,
    init_kwargs: dict[str, Any] | None,
    template: dict[str, Any] | None,
) -> Callable[..., Any]:
    """A function of TRL's reward convention from any kind of reward."""
    if isinstance(reward, str) and reward.startswith(PREFIXES):
        return load_reward(reward)
    if isinstance(reward, (str, torch.nn.Module)):
        from .model import RewardModel

        return RewardModel(
            reward,
            tokenizer,
            device=device,
            init_kwargs=init_kwargs,
            chat_template_kwargs=template,
        )
    return reward
