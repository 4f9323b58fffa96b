"""What a model's config says about its memory: shapes and parameters, counted without weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_fast.checks import ArgumentError, fail

# families whose bytes per layer were compared with the closed formulas of docs/memory.md
VERIFIED = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """A causal language model, by its config alone.

    Args:
        config: the transformers config of its text model.
        name: what it was asked for by.
    """

    config: Any = field(repr=False)
    name: str = "model"

    @property
    def family(self) -> str:
        """`model_type` of the config."""
        return self.config.model_type

    @property
    def H(self) -> int:
        """Width of the hidden states."""
        return self.config.hidden_size

    @property
    def V(self) -> int:
        """Vocabulary."""
        return self.config.vocab_size

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.config.num_hidden_layers

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return self.config.intermediate_size

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        heads = self.config.num_attention_heads
        return getattr(self.config, "head_dim", None) or self.H // heads

    @property
    def KV(self) -> int:
        """Width of the keys, and of the values, of a token in a layer."""
        heads = getattr(self.config, "num_key_value_heads", None)
        return (heads or self.config.num_attention_heads) * self.head_dim

    @property
    def context(self) -> int | None:
        """Tokens of the longest sequence that the config allows."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def tied(self) -> bool:
        """Whether the head is the table of the embeddings."""
        return bool(self.config.tie_word_embeddings)

    @property
    def verified(self) -> bool:
        """Whether the closed formulas were compared with counted bytes for this family."""
        return self.family in VERIFIED

    @cached_property
    def counts(self) -> Counts:
        """Parameters, of a model that is built on the meta device."""
        return _count(self)

    def with_layers(self, layers: int) -> Any:
        """A copy of the config with so many layers, the first of this model's."""
        import copy

        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        kinds = getattr(config, "layer_types", None)
        if kinds:
            config.layer_types = (list(kinds) * layers)[:layers]
        return config


@dataclass(frozen=True)
class Counts:
    """Parameters, in numbers of elements."""

    total: int
    """A tied table counts once."""
    embeddings: int
    """Table of the embeddings."""
    head: int
    """The head where it is no part of the table, else 0."""
    linear: int
    """Weights of the linear layers but the head: what a quantized base packs."""
    largest_linear: int
    """The largest of them."""
    adapter: int
    """LoRA parameters for each unit of rank, an adapter at each of those linear layers."""

    @property
    def layer_parameters(self) -> int:
        """What is neither table nor head."""
        return self.total - self.embeddings - self.head


def read(model: str) -> Architecture:
    """The architecture that a folder, a config.json or a name on the hub describes.

    Args:
        model: a folder with a config.json, that file itself, or a hub name.

    Raises:
        ValueError: there is no config, it has no shapes of a decoder, or transformers does not
            know its family.
    """
    from transformers import AutoConfig

    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        fail("MODEL", "a folder with a config.json", f"{model!r}, which has none")
    if path.suffix == ".json" and not path.is_file():
        fail("MODEL", "a config.json", f"{model!r}, where there is no file")
    try:
        config = AutoConfig.from_pretrained(model)
    # the boundary to transformers, whose errors for one missing file are of several kinds
    except (OSError, ValueError, KeyError) as error:
        expected = "a folder or hub name with a config.json of a family that transformers knows"
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ArgumentError("MODEL", expected, f"{model!r} ({first})") from error
    return of_config(config, model)


def of_config(config: Any, name: str = "model") -> Architecture:
    """The architecture of a config that is loaded already.

    Args:
        config: of a causal language model, or of a larger one that holds it.
        name: for reports.

    Raises:
        ValueError: a shape that every planner needs is missing.
    """
    if getattr(config, "is_encoder_decoder", False):
        fail("MODEL", "a decoder-only model", config.model_type)
    text = config.get_text_config(decoder=True)
    needed = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
    for name_of_shape in (*needed, "intermediate_size"):
        if not isinstance(getattr(text, name_of_shape, None), int):
            got = f"none for {text.model_type}"
            fail("MODEL", f"a config with {name_of_shape}", got, "its memory cannot be counted.")
    return Architecture(text, name)


def _count(architecture: Architecture) -> Counts:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(architecture.config)
        except ValueError as error:
            expected = "a family with a causal language model"
            got = architecture.family
            raise ArgumentError("MODEL", expected, got) from error
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is table.weight or architecture.tied
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    total = sum(p.numel() for p in model.parameters())
    if tied and head is not None and head.weight is not table.weight:
        total -= head.weight.numel()
    return Counts(
        total=total,
        embeddings=table.weight.numel(),
        head=0 if tied else head.weight.numel(),
        linear=sum(m.weight.numel() for m in linears),
        largest_linear=max((m.weight.numel() for m in linears), default=0),
        adapter=sum(m.in_features + m.out_features for m in linears),
    )
