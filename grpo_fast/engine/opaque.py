"""What torch.compile sees of every public function: one op, without a graph break, in which nothing
is traced. The op runs a row of `TABLE` as it is, checks and host syncs included.

Absent tensors are left out of the op's list, and `names` says which are there: `Tensor?[]` would
get no gradient. Numbers have a place each in the schema: `float[]` compiles anew for each value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.types import Number

NUMBERS = ("lora_scale", "softcap", "logit_scale", "temperature", "entropy_threshold")
NUMBERS = (*NUMBERS, "denominator", "max_rows", "workspace_bytes")
PLAIN = ("lora_scale", "softcap", "logit_scale", "max_rows", "workspace_bytes")
_SCHEMA = (
    "(Tensor[] tensors, str function, str names, str text, bool[] wanted, ScalarType? autocast, "
    "float? lora_scale, float? softcap, float? logit_scale, float? temperature, "
    "Scalar? entropy_threshold, Scalar? denominator, SymInt? max_rows, SymInt? workspace_bytes) "
    "-> Tensor[]"
)


class Given(NamedTuple):
    """The arguments of a call, as an op can hold them."""

    tensors: dict[str, Tensor]
    text: str
    """What is constant from call to call."""
    numbers: dict[str, Number | None]
    wanted: Sequence[bool]
    """Which leaves want a gradient."""
    autocast: torch.dtype | None
    """Of the region that the call was traced in: compiled code runs outside of it."""

    def either(self, name: str) -> Tensor | Number | None:
        """An argument that may be a tensor or a number."""
        return self.tensors.get(name, self.numbers.get(name))


class Function(NamedTuple):
    """What the op has to know of a function."""

    run: Callable[[Given], list[Tensor]]
    fake: Callable[[Given], list[Tensor]]
    """The shapes of the results, while tracing; wrong shapes of the arguments are refused here."""
    leaves: tuple[str, ...] = ()
    """The tensors that may want a gradient."""
    differentiable: int = 0
    """How many of the results, the first ones, are differentiated; `results` names the others."""
    results: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """What backward needs, of the arguments and the results."""
    gradients: Callable[[Given, Sequence[Tensor | None]], list[Tensor]] | None = None
    """From what was kept and the upstream gradients: those of the wanted leaves."""


TABLE: dict[str, Function] = {}


def call(function: str, arguments: dict, text: str = "", autocast=None) -> list[Tensor]:
    """The op, as a public function calls it while it is traced; the first argument is a tensor."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name in PLAIN:
            refuse(name, "a number", "a tensor")
        if value is not None and not isinstance(value, Tensor) and name not in NUMBERS:
            refuse(name, "a tensor", type(value).__name__)
    here = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    numbers = [None if name in here else arguments.get(name) for name in NUMBERS]
    asked = TABLE[function].leaves if torch.is_grad_enabled() else ()
    wanted = [n in asked and n in here and here[n].requires_grad for n in TABLE[function].leaves]
    kind = next(iter(here.values())).device.type
    if torch.is_autocast_enabled(kind):
        autocast = torch.get_autocast_dtype(kind)
    named = (list(here.values()), function, " ".join(here))
    return torch.ops.grpo_fast.opaque(*named, text, wanted, autocast, *numbers)


def refuse(name: str, expected: str, got: object) -> NoReturn:
    """`checks.fail`, of what torch.compile cannot have; it traces no error class of ours."""
    raise ValueError(f"{name}: expected {expected} under torch.compile, got {got}.")


def _given(tensors, names, text, wanted, autocast, numbers) -> Given:
    here = dict(zip(names.split(" "), tensors, strict=True))
    return Given(here, text, dict(zip(NUMBERS, numbers, strict=True)), wanted, autocast)


@torch.library.custom_op("grpo_fast::opaque", mutates_args=(), schema=_SCHEMA)
def _opaque(tensors, function, names, text, wanted, autocast, *numbers):
    again = nullcontext() if autocast is None else torch.autocast(tensors[0].device.type, autocast)
    with torch.no_grad(), again:
        return TABLE[function].run(_given(tensors, names, text, wanted, autocast, numbers))


@_opaque.register_fake
def _(tensors, function, names, text, wanted, autocast, *numbers):
    return TABLE[function].fake(_given(tensors, names, text, wanted, autocast, numbers))


def _setup(ctx, inputs, output) -> None:
    tensors, function, names, text, wanted, autocast, *numbers = inputs
    row, ctx.given = TABLE[function], _given(tensors, names, text, wanted, autocast, numbers)
    others = output[row.differentiable :]
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    everything = {**ctx.given.tensors, **dict(zip(row.results, others, strict=False))}
    kept = {name: everything[name] for name in row.kept if name in everything}
    ctx.row, ctx.names, ctx.order = row, list(kept), list(ctx.given.tensors)
    ctx.like = {name: (t.dtype, t.shape) for name, t in ctx.given.tensors.items()}
    ctx.given = ctx.given._replace(tensors={})
    ctx.save_for_backward(*kept.values())


def _backward(ctx, upstream):
    row, grads = ctx.row, dict.fromkeys(ctx.order)
    upstream = list(upstream[: row.differentiable])
    if any(g is not None for g in upstream):
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        found = iter(row.gradients(ctx.given._replace(tensors=kept), upstream))
        for name, flag in zip(row.leaves, ctx.given.wanted, strict=True):
            if flag:
                dtype, shape = ctx.like[name]
                grads[name] = next(found).to(dtype).view(shape)
    return list(grads.values()), *(None,) * (len(NUMBERS) + 5)


_opaque.register_autograd(_backward, setup_context=_setup)
