"""RewardModelConfig: `TrainingArguments` plus what a reward model needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from grpo_fast.checks import fail, is_number
from grpo_fast.objective.preference import PREFERENCE_LOSSES
from grpo_fast.rewards.render import Render

from .kl import option as _option


@dataclass
class RewardModelConfig(TrainingArguments):
    """Arguments of `RewardModelTrainer`; batches count ranked sets, a pair being a set of two.

    Defaults of `TrainingArguments` that differ here: learning_rate 9e-6 and one epoch
    (InstructGPT; more of them overfit), logging_steps 10, remove_unused_columns False,
    metric_for_best_model "accuracy", bf16 True where CUDA supports it.

    Raises:
        ValueError: for any value out of range, before anything is loaded.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = _option(9e-6, "Peak learning rate.")
    num_train_epochs: float = _option(1.0, "Passes over the sets; more than one overfits.")
    logging_steps: float = _option(10, "Log every so many optimizer steps.")
    remove_unused_columns: bool | None = _option(False, "Must stay False.")
    dataloader_pin_memory: bool = _option(False, "Pin the memory of what the loader yields.")
    bf16: bool | None = _option(None, "bf16 autocast; default: True where CUDA supports it.")
    model_init_kwargs: dict | str | None = _option(
        None, "Keyword arguments of from_pretrained when the model is a string (dict or JSON)."
    )
    preference_loss: str = _option("bradley_terry", "bradley_terry, or plackett_luce.")
    margin_scale: float = _option(
        0.0, "Margin of a pair for each unit between its ratings, beside the row's own margin."
    )
    center_rewards_coefficient: float = _option(
        0.01, "Weight of (r_i + r_j)^2, which keeps scores around 0; 0 switches it off."
    )
    max_length: int | None = _option(1024, "Tokens of a prompt with its completion at most.")
    truncate: bool = _option(False, "Keep the end of longer texts, instead of refusing them.")
    append_eos: bool = _option(
        False, "End every text with the end token; TRL and plain transformers do not know of it."
    )
    disable_dropout: bool = _option(True, "Set every dropout to 0.")
    drop_ties: bool = _option(False, "Leave out rows without a preference, and say how many.")
    validation_split: float = _option(
        0.0, "Share of the prompts held out where no eval_dataset is given."
    )
    shuffle_dataset: bool = _option(True, "Shuffle the sets in each epoch.")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy"
        super().__post_init__()
        if self.model_init_kwargs is not None and not isinstance(self.model_init_kwargs, dict):
            fail("model_init_kwargs", "a dict or a JSON object", repr(self.model_init_kwargs))
        if self.preference_loss not in PREFERENCE_LOSSES:
            fail("preference_loss", " or ".join(PREFERENCE_LOSSES), repr(self.preference_loss))
        for name in ("margin_scale", "center_rewards_coefficient"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < float("inf"):
                fail(name, "a finite number >= 0", repr(value))
        if self.preference_loss == "plackett_luce" and self.margin_scale:
            fail("margin_scale", "0 with plackett_luce, which has no margins", self.margin_scale)
        if not is_number(self.validation_split) or not 0 <= self.validation_split < 1:
            fail("validation_split", "a number in [0, 1)", repr(self.validation_split))
        if self.max_length is not None and self.max_length < 1:
            fail("max_length", "None or an integer >= 1", self.max_length)
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name):
                fail(name, "none", repr(getattr(self, name)), "scores are read from whole rows.")
        if self.remove_unused_columns:
            fail("remove_unused_columns", "False", True, "it would drop the completions.")
        if self.auto_find_batch_size:
            fail("auto_find_batch_size", "False", True, "it would change the order of the sets.")

    def render(self, limit: int | None) -> Render:
        """How texts become tokens, for a model that reads `limit` of them at most."""
        lengths = [value for value in (self.max_length, limit) if value is not None]
        return Render(self.append_eos, min(lengths, default=None), self.truncate)
