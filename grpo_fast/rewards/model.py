"""RewardModel: a sequence classifier with one label as a reward function."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_fast.checks import fail

from .render import Render

# bounds the activations of one forward; a generation batch may hold thousands of completions
_ROWS = 32
# keywords that say which files are read, and whether their code is run
_SOURCE = ("revision", "code_revision", "trust_remote_code", "token", "cache_dir")


class RewardModel:
    """reward_i = classifier(prompt_i + completion_i).logits[0].

    Plain strings are joined as they are, without special tokens; conversations are rendered with
    the reward model's own chat template: see `Render`, whose settings the configuration of a model
    of `RewardModelTrainer` holds. Rows are padded on the right and read in eval mode without a
    graph, in the dtype of the model.

    Args:
        model: checkpoint folder or hub name, loaded with `num_labels=1`, or a model with one label.
        tokenizer: its tokenizer; None loads it from the checkpoint.
        device: where the model is moved; None leaves it where it is.
        init_kwargs: keyword arguments of `from_pretrained` for a checkpoint; its tokenizer is of
            the same revision.
        chat_template_kwargs: further arguments of the chat template.

    Raises:
        ValueError: for more than one label, a checkpoint without classifier weights (they would be
            random), or a tokenizer with neither padding nor end token.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: torch.device | str | None = None,
        init_kwargs: dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = _load(model, init_kwargs or {})
        config = getattr(model, "config", None)
        if getattr(config, "num_labels", None) != 1:
            labels = getattr(config, "num_labels", None)
            got = f"{type(model).__name__} with num_labels={labels}"
            fail("reward_funcs", "sequence classifiers with num_labels=1 as reward models", got)
        source = config.name_or_path
        self.__name__ = source.rstrip("/").split("/")[-1] or type(model).__name__
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(
            source, **_of_tokenizer(config, init_kwargs or {})
        )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                got = f"none for reward model {self.__name__!r}"
                fail("reward_processing_classes", "a tokenizer with a padding token", got)
            tokenizer.pad_token = tokenizer.eos_token
        # decoder classifiers find the last real token by this id
        config.pad_token_id = tokenizer.pad_token_id
        self.tokenizer, self._template = tokenizer, chat_template_kwargs or {}
        self.model = model.eval() if device is None else model.eval().to(device)

    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[float]:
        """One number per completion."""
        render = Render.of(self.model.config)
        pairs = zip(prompts, completions, strict=True)
        rows = [render(self.tokenizer, *pair, **self._template) for pair in pairs]
        rewards: list[float] = []
        for start in range(0, len(rows), _ROWS):
            rewards += self._score(rows[start : start + _ROWS], start)
        return rewards

    def _score(self, rows: list[list[int]], start: int) -> list[float]:
        lengths = torch.tensor([len(ids) for ids in rows])
        input_ids = torch.full((len(rows), int(lengths.max())), self.tokenizer.pad_token_id)
        for row, ids in zip(input_ids, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and lengths.max() > limit:
            row = int(lengths.argmax())
            raise ValueError(
                f"completion {start + row} with its prompt has {int(lengths[row])} tokens, more "
                f"than the reward model's context of {limit}."
            )
        with torch.inference_mode():
            device = self.model.device
            out = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device))
            return out.logits[:, 0].float().tolist()


def _of_tokenizer(config: Any, init_kwargs: dict[str, Any]) -> dict[str, Any]:
    # the commit that the model came from, so that both are of one revision
    commit = getattr(config, "_commit_hash", None)
    known = {} if commit is None else {"revision": commit}
    return {**known, **{k: v for k, v in init_kwargs.items() if k in _SOURCE}}


def _load(name: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, output_loading_info=True, **init_kwargs
        )
    # transformers reports a missing or unreadable checkpoint as OSError
    except OSError as error:
        raise ValueError(
            f"reward {name!r}: no reward model could be loaded from this checkpoint: {error}"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"reward {name!r}: the checkpoint has no weights for {missing}, which would be random; "
            "expected a trained sequence classifier."
        )
    return model
