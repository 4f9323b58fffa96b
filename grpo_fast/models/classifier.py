"""Sequence classifiers with one label as reward models: packed scores, padding, saving.

    score_s = w . h_last(s)         h (R, L, H) of a packed forward, last(s) the last token

Transformers looks for the last token that is not the padding token, and so reads another one when
a text ends with it: `own_padding` gives the model a padding token that no text contains.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_fast.checks import ArgumentError, fail

from .critic import Critic, check_critic_packing
from .head import backbone, innermost
from .loading import load_policy
from .packing import PackedBatch, default_row_length, pack

PAD = "<|grpo_fast_pad|>"
_MARK = "_grpo_fast_rows"


def load_classifier(name: str, **init_kwargs: Any) -> PreTrainedModel:
    """A classifier with one label from a checkpoint: a reward model, or a language model that gets
    a new score.

    Args:
        name: hub name or folder.
        init_kwargs: of `from_pretrained`; `dtype` is float32 unless given. With `gguf_file` the
            checkpoint is a language model.

    Raises:
        ValueError: the checkpoint has more labels, or is no decoder with a linear score.
    """
    init_kwargs.setdefault("dtype", torch.float32)
    if "gguf_file" in init_kwargs:
        return classifier_of(load_policy(name, **init_kwargs))
    config = AutoConfig.from_pretrained(name)
    trained = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    if trained and config.num_labels != 1:
        fail("model", "a reward model with one label", f"{config.num_labels} of {name}")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, output_loading_info=True, **init_kwargs
    )
    check_classifier(model)
    if any(key.split(".")[0] == "score" for key in info["missing_keys"]):
        new_score(model)
    return model


def classifier_of(lm: PreTrainedModel) -> PreTrainedModel:
    """A classifier with one label on a copy of a causal language model's backbone, its score new.

    Raises:
        ValueError: transformers has no classifier of this family, or one of another kind.
    """
    lm = innermost(lm)
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=lm.dtype, attn_implementation=lm.config._attn_implementation
        )
    # transformers lists the hundred families that it has
    except ValueError as error:
        expected = "a family that transformers has a sequence classifier of"
        raise ArgumentError("model", expected, type(lm).__name__) from error
    check_classifier(model)
    body = getattr(model, model.base_model_prefix)
    body.load_state_dict(getattr(lm, lm.base_model_prefix).state_dict())
    config = model.config
    config.architectures = [type(model).__name__]
    new_score(model)
    return model.to(lm.device)


def check_classifier(model: nn.Module) -> None:
    """Refuse what is not a decoder with a linear score of one label.

    Raises:
        ValueError: naming the class and what it has.
    """
    inner = innermost(model)
    score = getattr(inner, "score", None)
    # an adapter holds it in a wrapper
    score = getattr(score, "original_module", score)
    if not isinstance(score, nn.Linear):
        hint = "give AutoModelForSequenceClassification of a decoder-only family."
        fail("model", "a decoder with a linear `score`", type(inner).__name__, hint)
    if score.out_features != 1:
        fail("model", "a score of one label", f"{score.out_features} labels")


def new_score(model: PreTrainedModel) -> None:
    """Draw the score from N(0, 1 / sqrt(H + 1)): Stiennon et al., 2020."""
    weight = model.score.weight
    with torch.no_grad():
        weight.normal_(0, (weight.shape[1] + 1) ** -0.5)
        if model.score.bias is not None:
            model.score.bias.zero_()


def own_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a classifier and its tokenizer a padding token that ends no text.

    The tokenizer's own stays, unless there is none or it is the end or the unknown token too. A new
    one takes an unused row of the embedding where there is one, or makes it larger.
    """
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        tokenizer.add_special_tokens({"pad_token": PAD})
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        # the mean of the others would be computed for a row that nothing attends to
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def check_classifier_packing(model: nn.Module, pad_id: int) -> None:
    """Refuse a backbone that cannot hold several sequences in a row.

    Raises:
        ValueError: its hidden states depend on what else is in the row.
    """
    body = backbone(model)
    width = body.config.get_text_config(decoder=True).hidden_size
    try:
        check_critic_packing(Critic(width, body), pad_id)
    except ArgumentError as error:
        raise error.about("model") from error


def attach_rows(model: nn.Module) -> None:
    """Give the forward of the innermost classifier the keyword `score_rows`.

    `model(input_ids=..., position_ids=..., score_rows=rows)` returns the scores (S,) of the hidden
    states at `rows` (S,) of the R * L, in the dtype of the model; without it the forward is as
    before. It travels through PEFT and DDP, so that their hooks fire. Twice changes nothing.
    """
    inner = innermost(model)
    if getattr(inner, _MARK, False):
        return
    plain = type(inner).forward

    def forward(self: PreTrainedModel, *args: Any, score_rows: Any = None, **kwargs: Any) -> Any:
        if score_rows is None:
            return plain(self, *args, **kwargs)
        # PEFT passes what a classifier takes on, most of it None
        given = {name: value for name, value in kwargs.items() if value is not None}
        given.pop("return_dict", None)
        given["use_cache"] = False
        hidden = backbone(self)(*args, **given)[0]
        return self.score(hidden.flatten(0, 1).index_select(0, score_rows)).squeeze(-1)

    inner.forward = MethodType(forward, inner)
    setattr(inner, _MARK, True)


def detach_rows(model: nn.Module) -> None:
    """Undo `attach_rows`."""
    inner = innermost(model)
    if getattr(inner, _MARK, False):
        del inner.forward
        delattr(inner, _MARK)


def pack_texts(ids: list[list[int]], model: nn.Module, pad_id: int) -> PackedBatch:
    """Texts packed whole; `rows` (S,) are those of their last tokens."""
    # the one token of a completion predicts nothing and is not fed: the text stands before it
    return pack(
        ids,
        [[pad_id]] * len(ids),
        pad_id=pad_id,
        row_length=default_row_length(model),
        device=innermost(model).device,
    )


def packed_scores(model: nn.Module, packed: PackedBatch) -> Tensor:
    """Scores (S,) float32 of `pack_texts`, one forward through the wrapped model."""
    return model(**packed.inputs(), score_rows=packed.rows).float()
