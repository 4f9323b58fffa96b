"""Bytes that a decoder keeps for backward, counted by running it on tensors that have no memory.

Two and three layers of the real widths run forward and backward under torch's `FakeTensorMode`, and
a dispatch hook adds up what is alive. The difference of the two is one layer, and two lengths tell
what grows with tokens from what does not. So a family needs no formula of its own; the closed
formulas of docs/memory.md are what this gives for some of them, and a test compares.

Attention is counted as a kernel that keeps q, k, v, its output and a log-sum-exp of each row, as
flash attention and sdpa without a mask do. A mask is counted where rows are planned.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_fast.checks import ArgumentError

from .architecture import Architecture

# tokens: where gradients of weights are the larger part of backward's peak, and where they are not
_FEW, _MANY = 256, 8192
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# what a name without a mask function gets from transformers: no mask
_ATTENTION = "grpo_fast_counted"


@dataclass(frozen=True)
class Line:
    """slope x tokens + fixed, in bytes."""

    slope: float
    fixed: float

    def at(self, tokens: int) -> int:
        """Bytes for so many tokens."""
        return max(0, math.ceil(self.slope * tokens + self.fixed))

    @classmethod
    def through(cls, at: tuple[int, int], values: list[int]) -> Line:
        """The line through the values at two lengths."""
        slope = (values[1] - values[0]) / (at[1] - at[0])
        return cls(slope, values[0] - slope * at[0])

    def __sub__(self, other: Line) -> Line:
        return Line(self.slope - other.slope, self.fixed - other.fixed)

    def times(self, factor: int) -> Line:
        """So many of it."""
        return Line(self.slope * factor, self.fixed * factor)


@dataclass(frozen=True)
class Costs:
    """What one forward and backward of the decoder keeps, without its head."""

    layer: Line
    """Kept for backward by a layer."""
    rest: Line
    """Kept by the embedding, the last norm and their output."""
    transients: tuple[Line, Line]
    """Above what is kept, at the worst moment of backward, gradients that exist already apart: for
    few tokens, where a gradient of a weight decides, and for many."""
    forward: Line
    """The worst moment of a forward that keeps nothing, autocast's copies of weights apart."""

    def kept(self, layers: int, tokens: int) -> int:
        """Bytes of so many layers at the end of the forward."""
        return self.rest.at(tokens) + layers * self.layer.at(tokens)

    def transient(self, tokens: int) -> int:
        """Bytes above it at the worst moment of backward."""
        return max(line.at(tokens) for line in self.transients)


def costs(
    architecture: Architecture,
    *,
    dtype: str = "fp32",
    rank: int = 0,
    checkpointing: bool = False,
    autocast: bool = False,
    tile: int | None = None,
) -> Costs:
    """Count them.

    Args:
        architecture: the model; its attention and MLP are those of its family.
        dtype: of the weights, "fp32" or "bf16".
        rank: of a LoRA adapter at every linear layer but the head; 0 for full training.
        checkpointing: each layer keeps its input alone and runs again in backward.
        autocast: under torch's bf16 autocast.
        tile: tokens of an MLP that are alive at once; None: all.

    Raises:
        ValueError: a family whose layers look at values (a mixture of experts routes by them), so
            that nothing can be counted without weights.
    """
    try:
        return _costs(_Key(architecture), dtype, rank, checkpointing, autocast, tile)
    # the boundary to the families: a layer that reads a value fails in its own way
    except Exception as error:
        expected = "a family whose layers can be counted without weights"
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else repr(error)
        raise ArgumentError("MODEL", expected, f"{architecture.family} ({reason})") from error


class _Key:
    """An architecture by its config's values, for the cache."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture, self.text = architecture, architecture.config.to_json_string()

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=64)
def _costs(
    key: _Key, dtype: str, rank: int, checkpointing: bool, autocast: bool, tile: int | None
) -> Costs:
    two, three = (
        _Counter(key.architecture, layers, dtype, rank, checkpointing, autocast, tile)
        for layers in (2, 3)
    )
    # both lengths of a line are beyond the tile, or neither is
    few, many = (
        (n, 2 * n) for n in (_FEW if tile is None else 2 * tile, max(_MANY, 4 * (tile or 0)))
    )
    kept2, kept3 = (Line.through(few, [c.kept(T) for T in few]) for c in (two, three))
    layer = kept3 - kept2
    transients = tuple(Line.through(at, [three.transient(T) for T in at]) for at in (few, many))
    forward = Line.through(many, [three.forward(T) for T in many])
    if autocast and dtype == "fp32":
        # the copies of three layers
        forward = Line(forward.slope, 0)
    return Costs(layer, kept3 - layer.times(3), transients, forward)


class _Counter:
    """A decoder of a few layers that can be asked what it keeps at a length."""

    def __init__(
        self,
        architecture: Architecture,
        layers: int,
        dtype: str,
        rank: int,
        checkpointing: bool,
        autocast: bool,
        tile: int | None,
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        from grpo_fast.models.tiling import tile_mlp

        self.body, self.autocast = _body(architecture, layers, dtype, rank), autocast
        if checkpointing:
            self.body.gradient_checkpointing_enable({"use_reentrant": False})
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            _without_memory(self.body)
        if tile is not None:
            tile_mlp(self.body, tile)
        self.body.train()
        held = [*self.body.parameters(), *self.body.buffers()]
        self.before = [*held, *(p.grad for p in self.body.parameters() if p.grad is not None)]
        self.ran: dict[int, tuple[int, int]] = {}

    def _mixed(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def _run(self, tokens: int) -> tuple[int, int]:
        if tokens not in self.ran:
            with self.fake, Alive(*self.before) as alive:
                ids = torch.zeros(1, tokens, dtype=torch.int64)
                with self._mixed():
                    hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
                kept, alive.peak = alive.now, 0
                hidden.backward(torch.empty_like(hidden))
                self.ran[tokens] = kept, alive.peak
        return self.ran[tokens]

    def kept(self, tokens: int) -> int:
        """Bytes that are alive after a forward."""
        return self._run(tokens)[0]

    def transient(self, tokens: int) -> int:
        """Bytes above them in backward, at most."""
        kept, peak = self._run(tokens)
        return peak - kept

    def forward(self, tokens: int) -> int:
        """Most bytes of a forward that keeps nothing."""
        with self.fake, Alive(*self.before) as alive, self._mixed(), torch.no_grad():
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            self.body(input_ids=ids, use_cache=False)
        return alive.peak


def _body(architecture: Architecture, layers: int, dtype: str, rank: int) -> nn.Module:
    from transformers import AttentionInterface, AutoModelForCausalLM

    if _ATTENTION not in AttentionInterface():
        AttentionInterface.register(_ATTENTION, _attention)
    config = architecture.with_layers(layers)
    config.vocab_size, config.pad_token_id = 8, None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=_DTYPES[dtype], attn_implementation=_ATTENTION
        )
        if rank:
            from peft import LoraConfig, get_peft_model

            adapter = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            get_peft_model(model, adapter)
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def _without_memory(body: nn.Module) -> None:
    """Parameters of meta become fake ones of the CPU, each with a gradient if it wants one."""
    for module in body.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fake.grad = torch.empty_like(fake) if tensor.requires_grad else None
                held[name] = fake


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    return _Kernel.apply(query, key, value), None


class _Kernel(torch.autograd.Function):
    """Attention by what it keeps: q, k, v, the output (B, T, heads, D) and fp32 (B, heads, T)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.transpose(1, 2).shape)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3]).float())
        return out

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class Alive(TorchDispatchMode):
    """Adds up the bytes of tensors that were made inside the `with` and are still alive."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.before = {t.untyped_storage()._cdata for t in before}
        self.held: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        self.held = {k: v for k, v in self.held.items() if not v[0].expired()}
        return sum(size for _, size in self.held.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.before:
                    self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out
