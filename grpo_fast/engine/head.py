"""The last layer of a model as one argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from grpo_fast.checks import describe, fail

from . import opaque

# the tensors of a linear call that may want a gradient, in the order of `chunks.Needs`
LEAVES = ("hidden", "weight", "bias", "lora_A", "lora_B")


@dataclass(frozen=True)
class Head:
    """The last layer: `z = softcap * tanh(logit_scale * (h @ weight.T + bias) / softcap)`.

    The `linear_*` functions take it in place of the weight.

    Args:
        weight: (V, H), the live parameter, so that its gradient is the model's gradient.
        bias: (V,) or None.
        softcap: bound of the logits, or None for no bound.
        logit_scale: factor applied before the soft cap.
        lora: (A (r, H), B (V, r), s) of a LoRA adapter on the head: W + s B A stands for W.
        tp_group: the ranks over which the vocabulary is split, see `linear_logprob`.
        tp_tokens: of the rows of hidden, how many each rank of tp_group brought, in their order:
            the gradient of hidden is then reduce-scattered, and complete in a rank's own rows
            alone. None: it is complete everywhere.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    lora: tuple[Tensor, Tensor, float] | None = None
    tp_group: dist.ProcessGroup | None = None
    tp_tokens: tuple[int, ...] | None = None

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """Its tensors, by the names of `LEAVES`."""
        A, B = (None, None) if self.lora is None else self.lora[:2]
        return {"weight": self.weight, "bias": self.bias, "lora_A": A, "lora_B": B}

    def traced(self) -> dict[str, Tensor | None]:
        """`tensors`, for torch.compile, which has no process groups."""
        if self.tp_group is not None:
            opaque.refuse("tp_group", "None", "a process group")
        return self.tensors

    @property
    def numbers(self) -> dict[str, float | None]:
        """Its numbers; the scale of an absent adapter is 1."""
        scale = 1.0 if self.lora is None else self.lora[2]
        return {"lora_scale": scale, "softcap": self.softcap, "logit_scale": self.logit_scale}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Head:
        """The head of `tensors` and `numbers`, in which absent tensors are missing."""
        lora = None
        if "lora_A" in tensors:
            lora = (tensors["lora_A"], tensors["lora_B"], numbers["lora_scale"])
        bias, softcap = tensors.get("bias"), numbers["softcap"]
        return cls(tensors["weight"], bias, softcap, numbers["logit_scale"], lora)


def as_head(
    weight: Tensor | Head,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
    softcap: float | None,
    logit_scale: float,
    tp_group: dist.ProcessGroup | None,
) -> Head:
    """The head of a call, from a `Head` or from its parts.

    Raises:
        ValueError: a part beside a `Head`, which has its own.
    """
    if not isinstance(weight, Head):
        return Head(weight, bias, softcap, logit_scale, lora, tp_group)
    for name, value, default in (
        ("bias", bias, None),
        ("lora", lora, None),
        ("softcap", softcap, None),
        ("logit_scale", logit_scale, 1.0),
        ("tp_group", tp_group, None),
    ):
        if value is not default and not (default == 1.0 and value == 1.0):
            fail(name, f"{default} beside a Head, which has its own", describe(value))
    return weight
