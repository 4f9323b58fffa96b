"""What RewardModelTrainer is given, made ready: sets, tokenizer, classifier, micro-batches."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo_fast.checks import fail
from grpo_fast.models.classifier import (
    attach_rows,
    check_classifier,
    check_classifier_packing,
    classifier_of,
    load_classifier,
    own_padding,
)
from grpo_fast.models.head import innermost
from grpo_fast.models.packing import PackedBatch

from .preferences import RankedSet, ranked_sets, split_by_prompt
from .reward_config import RewardModelConfig
from .setup import disable_dropout

logger = logging.getLogger(__name__)


@dataclass
class Encoded:
    """A ranked set with the token ids of each of its answers."""

    ranked: RankedSet
    ids: list[list[int]]


@dataclass
class PreferenceBatch:
    """M sets with S answers in all: one packed forward.

    Args:
        packed: the answers with their prompts; `rows` (S,) are those of the scores.
        places: (M, K) int64, where in S each answer of a set is.
        ratings: (M, K), NaN behind the last answer of a set.
        margins: (M, K, K).
        lengths: (S,) tokens.
        denominator: 0-d, sets of the optimizer step over all ranks, by the number of ranks.
    """

    packed: PackedBatch
    places: Tensor
    ratings: Tensor
    margins: Tensor
    lengths: Tensor
    denominator: Tensor | None = None

    # Trainer counts tokens and operations of `inputs["input_ids"]`: its batches are mappings

    def __contains__(self, name: str) -> bool:
        return name == "input_ids"

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self.packed.input_ids


def sets_of(
    args: RewardModelConfig, train: Any, held_out: Any
) -> tuple[list[RankedSet], dict[str, list[RankedSet]], int]:
    """The sets to train on, those held out by name, and how many rows say nothing."""
    sets, dropped = ranked_sets("train_dataset", train, args.drop_ties)
    if args.preference_loss == "plackett_luce" and any(one.margin for one in sets):
        fail("train_dataset", "no margins with plackett_luce", "a column 'margin'")
    named = held_out if isinstance(held_out, dict) else {"": held_out} if held_out else {}
    if named and args.validation_split:
        fail("validation_split", "0 beside an eval_dataset", args.validation_split)
    found = {}
    for name, rows in named.items():
        found[name], ties = ranked_sets(name or "eval_dataset", rows, args.drop_ties)
        dropped += ties
    if args.validation_split:
        sets, found[""] = split_by_prompt(sets, args.validation_split, args.seed)
    if dropped:
        logger.warning("drop_ties: %d rows without a preference are left out", dropped)
    return sets, found, dropped


def classifier_tokenizer(
    model: Any, given: Any, args: RewardModelConfig
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer given, or that of the model's checkpoint."""
    if given is not None:
        if not isinstance(given, PreTrainedTokenizerBase):
            fail("processing_class", "a tokenizer", type(given).__name__)
        return copy.deepcopy(given)
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if not name:
        fail("processing_class", "a tokenizer for a model without a checkpoint", None)
    file = (args.model_init_kwargs or {}).get("gguf_file")
    return AutoTokenizer.from_pretrained(name, **({"gguf_file": file} if file else {}))


def classifier_for(
    model: Any, args: RewardModelConfig, tokenizer: Any, peft_config: Any
) -> nn.Module:
    """The classifier: loaded or made, padded, checked, in its adapter when peft_config is given."""
    if isinstance(model, str):
        model = load_classifier(model, **(args.model_init_kwargs or {}))
    elif getattr(innermost(model), "score", None) is None:
        model = classifier_of(model)
    check_classifier(model)
    own_padding(innermost(model), tokenizer)
    if args.disable_dropout:
        disable_dropout(model)
    attach_rows(model)
    check_classifier_packing(model, tokenizer.pad_token_id)
    if peft_config is not None:
        from peft import get_peft_model

        if str(getattr(peft_config.task_type, "value", peft_config.task_type)) != "SEQ_CLS":
            expected = "task_type SEQ_CLS, which trains the score as a whole"
            fail("peft_config", expected, str(peft_config.task_type))
        model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
    return model


def encoded(name: str, sets: list[RankedSet], tokenizer: Any, render: Any) -> list[Encoded]:
    """Sets with token ids; a text that cannot be read is named by its set."""
    out = []
    for index, one in enumerate(sets):
        try:
            ids = [render(tokenizer, one.prompt, answer) for answer in one.completions]
        except ValueError as error:
            raise ValueError(f"{name}, set {index}: {error}") from error
        out.append(Encoded(one, ids))
    return out
