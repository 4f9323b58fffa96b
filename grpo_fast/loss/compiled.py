"""The losses as torch.compile sees them: rows of `opaque.TABLE`, which compute loss, metrics and
gradients in one go. Their backward multiplies the gradients by the upstream scalar."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fast.checks import check_shapes, wide
from grpo_fast.config import LossConfig
from grpo_fast.engine import opaque
from grpo_fast.engine.chunks import Needs
from grpo_fast.engine.head import LEAVES, Head
from grpo_fast.engine.opaque import Given
from grpo_fast.objective.tokens import Tokens, Totals

from . import metrics
from .call import Call, Execution

_TOKENS, _TOTALS = tuple(Tokens.__dataclass_fields__), tuple(Totals.__dataclass_fields__)


def traced(name: str, call: Call, **refused: tuple[object, object]) -> tuple[Tensor, dict]:
    """A loss, a key of `opaque.TABLE`, as torch.compile traces it. refused: options that it cannot
    have, each with its value and the default that is expected."""
    run, tokens = call.execution, call.tokens
    tensor = None if run.main_grad is None else "a tensor"
    number = None if isinstance(tokens.temperature, Tensor) else tokens.temperature
    refused |= {"main_grad": (tensor, None), "grad_scale": (run.grad_scale, 1.0)}
    refused["temperature"] = (number, None)
    for option, (value, default) in refused.items():
        if value != default:
            opaque.refuse(option, str(default), value)
    if not isinstance(run.skip_inactive_forward, bool):
        opaque.refuse("skip_inactive_forward", "True or False", run.skip_inactive_forward)
    head = {} if call.head is None else {**call.head.traced(), **call.head.numbers}
    arguments = {
        "logits" if call.head is None else "hidden": call.source,
        **head,
        "ref_hidden": call.ref_hidden,
        "ref_weight": call.ref_weight,
        **{field: getattr(tokens, field) for field in _TOKENS},
        **{field: getattr(call.totals, field) for field in _TOTALS},
        "max_rows": run.max_rows,
        "workspace_bytes": run.workspace_bytes,
    }
    text = ("1" if run.skip_inactive_forward else "0") + call.config.text
    loss, numbers, counts, *_ = opaque.call(name, arguments, text)
    has_ref = tokens.ref_logp is not None or call.ref_hidden is not None
    values, whole = list(numbers.detach().unbind()), list(counts.unbind())
    named = metrics.names(has_ref, tokens.rollout_logp is not None)
    return loss, {n: (whole if n in metrics.COUNTS else values).pop(0) for n in named}


def _call(given: Given) -> Call:
    """The call again, inside the op."""
    t, numbers = given.tensors, given.numbers
    return Call(
        t["hidden"] if "hidden" in t else t["logits"],
        Head.of(t, numbers) if "hidden" in t else None,
        Tokens(**{field: t.get(field) for field in _TOKENS}),
        LossConfig.of_text(given.text[1:]),
        Totals(**{field: given.either(field) for field in _TOTALS}),
        Execution(given.text[0] == "1", numbers["max_rows"], numbers["workspace_bytes"]),
        t.get("ref_hidden"),
        t.get("ref_weight"),
    )


def _run(given: Given) -> list[Tensor]:
    """The loss, metrics that are numbers, metrics that count, a scale, the wanted gradients."""
    from . import linear, logits

    call = _call(given)
    if call.head is None:
        done = logits.compute(logits.check(call), tuple(given.wanted))
    else:
        done = linear.compute(linear.check(call), Needs(*given.wanted))
    found = done.metrics
    numbers = torch.stack([v for k, v in found.items() if k not in metrics.COUNTS])
    counts = torch.stack([v.long() for k, v in found.items() if k in metrics.COUNTS])
    # fp16 logits: the power of two that `gradients.fp16_scale` chose
    scale = done.loss.new_ones(()) if done.scale is None else done.scale
    kind = wide(call.source)
    gradients = [g for g, flag in zip(done.gradients, given.wanted, strict=True) if flag]
    if call.head is not None:
        gradients = [g.to(kind) for g in gradients]
    return [done.loss.clone(), numbers, counts, scale, *gradients]


def _fake(given: Given) -> list[Tensor]:
    t = given.tensors
    source = t["hidden"] if "hidden" in t else t["logits"]
    shaped = ("mask", "old_logp", "ref_logp", "rollout_logp")
    check_shapes(tuple(source.shape[:-1]), t, shaped)
    known = metrics.names("ref_logp" in t or "ref_hidden" in t, "rollout_logp" in t)
    n, dtype = sum(name in metrics.COUNTS for name in known), wide(source)
    shapes = ((), (len(known) - n,), (n,), ())
    kinds = (dtype, dtype, torch.int64, dtype)
    out = [source.new_empty(s, dtype=k) for s, k in zip(shapes, kinds, strict=True)]
    if "logits" in t:
        return out + [source.new_empty(source.shape)] * given.wanted[0]
    flat = {**t, "hidden": source.reshape(-1, source.shape[-1])}
    wanted = [flat[name].shape for name, flag in zip(LEAVES, given.wanted, strict=True) if flag]
    return out + [source.new_empty(shape, dtype=dtype) for shape in wanted]


def _scaled(given: Given, upstream: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients times the upstream scalar, by way of fp32 for half precision."""
    scale, *gradients = given.tensors.values()
    factor = upstream[0] / scale
    return [
        g * factor.to(g.dtype) if g.dtype.itemsize >= 4 else g.float() * factor for g in gradients
    ]


_GRADIENTS = ("scale", *(f"gradient_{place}" for place in range(len(LEAVES))))
for _name, _leaves in (("linear_policy_loss", LEAVES), ("policy_loss", ("logits",))):
    kept = ("numbers", "counts", *_GRADIENTS), _GRADIENTS
    opaque.TABLE[_name] = opaque.Function(_run, _fake, _leaves, 1, *kept, _scaled)
