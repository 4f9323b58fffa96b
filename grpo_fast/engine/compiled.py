"""The log-prob functions as torch.compile sees them: rows of `opaque.TABLE`, backwards too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fast.checks import check_shapes, wide

from . import logprob, opaque
from .chunks import Needs
from .head import LEAVES, Head
from .opaque import Function, Given

UPSTREAM = ("dlogp", "dentropy", "dlse")
RESULTS = ("stats", "row_ids", "row_mask", "slope", "inverse")


def _keeps_slope(wanted: Sequence[bool]) -> bool:
    return tuple(wanted) == (True, False, False, False, False)


def _forward(given: Given) -> list[Tensor]:
    """logp, entropy, lse and `RESULTS`, of which a tensor of nothing stands for an absent one."""
    t, numbers = given.tensors, given.numbers
    ids, mask, temperature = t["ids"], t.get("mask"), given.either("temperature")
    if "logits" in t:
        checked = logprob.check_given(t["logits"], ids, mask, temperature)
        stats = logprob.logits_forward(*checked.tensors, checked.rows.ids, checked.options, True)
        slope = None
    else:
        rest = (ids, mask, temperature, numbers["workspace_bytes"], True)
        checked = logprob.check_linear(t["hidden"], Head.of(t, numbers), *rest)
        needs = Needs(*given.wanted)
        stats, slope = logprob.linear_forward(checked.tensors, checked.rows, checked.options, needs)
    rows, inverse = checked.rows, checked.options["inv_temperature"]
    optional = (slope, inverse if "temperature" in t else None)
    kept = [stats.new_empty(0) if k is None else k for k in optional]
    return [*logprob.named(stats), stats, rows.ids, rows.mask, *kept]


def _fake_forward(given: Given) -> list[Tensor]:
    t = given.tensors
    like, n = t["hidden"] if "hidden" in t else t["logits"], t["ids"].numel()
    check_shapes(tuple(like.shape[:-1]), t, ("mask",))
    dtype, slope = wide(like), _keeps_slope(given.wanted)
    return [
        *(like.new_empty(n, dtype=dtype) for _ in range(3)),
        like.new_empty((4, n), dtype=dtype),
        t["ids"].new_empty(n, dtype=torch.int64),
        like.new_empty(n, dtype=torch.bool),
        like.new_empty((n, like.shape[-1]) if slope else (0,), dtype=dtype),
        like.new_empty(n if "temperature" in t else 0, dtype=torch.float32),
    ]


def _gradients(given: Given) -> list[Tensor]:
    """The backward of both, of what `_forward` kept; `text` names the leaves that want one."""
    t, numbers, wanted = given.tensors, given.numbers, given.text.split(" ")
    upstream = tuple(t.get(name) for name in UPSTREAM)
    rows, one = (t["row_ids"], t["row_mask"]), numbers["temperature"]
    if "logits" in t:
        cube = t["logits"] if t["logits"].dim() == 3 else t["logits"][None]
        inverse = t["inverse"] if one is None else 1.0 / one
        options = {"active": rows[1] if "mask" in t else None, "inv_temperature": inverse}
        grad = logprob.logits_backward(cube, rows[0], t["stats"], options, upstream)
        return [grad.view_as(t["logits"])]
    hidden, flags = t["hidden"], [name in wanted for name in LEAVES]
    temperature = (1.0, t["inverse"]) if one is None else (one, None)
    head, n_bytes = Head.of(t, numbers), numbers["workspace_bytes"]
    options = logprob.head_options(hidden, head, n_bytes, *temperature, True)
    tensors = (hidden.reshape(-1, hidden.shape[-1]), *(t.get(name) for name in LEAVES[1:]))
    kept = (t["stats"], t["slope"] if _keeps_slope(flags) else None)
    found = logprob.linear_backward(tensors, *rows, kept, options, Needs(*flags), upstream)
    by_name = dict(zip(LEAVES, found, strict=True))
    return [by_name[name].view(t[name].shape) for name in wanted]


def _fake_gradients(given: Given) -> list[Tensor]:
    like = [given.tensors[name] for name in given.text.split(" ")]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]


for _name, _leaves in (("linear_logprob", LEAVES), ("logprob", ("logits",))):

    def _ask(given: Given, upstream: Sequence[Tensor | None], name: str = _name) -> list[Tensor]:
        here = {**given.tensors, **dict(zip(UPSTREAM, upstream, strict=True)), **given.numbers}
        leaves = zip(opaque.TABLE[name].leaves, given.wanted, strict=True)
        wanted = " ".join(leaf for leaf, flag in leaves if flag)
        return opaque.call(f"{name}_backward", here, wanted, given.autocast)

    kept = (*_leaves, "mask", *RESULTS)
    opaque.TABLE[_name] = Function(_forward, _fake_forward, _leaves, 3, RESULTS, kept, _ask)
    opaque.TABLE[f"{_name}_backward"] = Function(_gradients, _fake_gradients)
