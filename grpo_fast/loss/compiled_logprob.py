"""The log-prob ops as custom ops, which is what torch.compile sees of them; see `ops.py`.

Forward and backward are one op each, and run the functions of `logprob.py` as they are.
"""

import torch
from torch import Tensor

from grpo_fast.engine.backend import select
from grpo_fast.engine.chunks import Needs, autocast_dtype
from grpo_fast.engine.handover import TRACED, Handover, handed_over
from grpo_fast.engine.logprob import LogProbs, _LinearLogProb, _LogProb
from grpo_fast.engine.logprob import linear_logprob as eager_linear
from grpo_fast.engine.logprob import logprob as eager_logits

from .tracing import (
    OptDtype,
    OptFloat,
    OptInt,
    OptTensor,
    autocast_again,
    autocast_of,
    check_shapes,
    either,
    refuse,
    split,
    traced_wanted,
    wide,
)


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    """value, or a tensor of nothing: an op has no optional results."""
    return like.new_empty(0) if value is None else value


def _flat(out: LogProbs) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(value.detach().reshape(-1) for value in out)


def _keeps_slope(wanted: list[bool]) -> bool:
    return list(wanted) == [True, False, False, False, False]


def _fake_results(like: Tensor, n: int) -> list[Tensor]:
    dtype = wide(like)
    results = [like.new_empty(n, dtype=dtype) for _ in range(3)]
    ids = like.new_empty(n, dtype=torch.int64)
    return [*results, like.new_empty((4, n), dtype=dtype), ids]


@torch.library.custom_op("grpo_fast::linear_logprob", mutates_args=())
def _linear(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: OptTensor,
    bias: OptTensor,
    lora_A: OptTensor,
    lora_B: OptTensor,
    lora_scale: float,
    temperature: OptTensor,
    temperature_number: OptFloat,
    softcap: OptFloat,
    logit_scale: float,
    workspace_bytes: OptInt,
    autocast: OptDtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with handed_over(tuple(wanted)) as context, autocast_again(hidden, autocast):
        out = eager_linear.__wrapped__(
            hidden,
            weight,
            ids,
            mask=mask,
            bias=bias,
            lora=None if lora_A is None else (lora_A, lora_B, lora_scale),
            temperature=either(temperature, temperature_number),
            softcap=softcap,
            logit_scale=logit_scale,
            entropy=True,
            workspace_bytes=workspace_bytes,
        )
    *_, ids, stats, u = context.saved_tensors
    inverse = context.options["inv_temperature"]
    return *_flat(out), stats, ids, context.mask, _or_empty(u, stats), _or_empty(inverse, stats)


@_linear.register_fake
def _(hidden, weight, ids, mask, *given):
    shape = tuple(hidden.shape[:-1])
    check_shapes(shape, ids, mask=mask)
    flat = hidden.reshape(-1, hidden.shape[-1])
    n = flat.shape[0]
    results = _fake_results(hidden, n)
    u = hidden.new_empty(flat.shape if _keeps_slope(given[-1]) else (0,), dtype=wide(hidden))
    inverse = hidden.new_empty(0 if given[4] is None else n, dtype=torch.float32)
    return *results, hidden.new_empty(n, dtype=torch.bool), u, inverse


@torch.library.custom_op("grpo_fast::linear_logprob_backward", mutates_args=())
def _linear_backward(
    dlogp: OptTensor,
    dentropy: OptTensor,
    dlse: OptTensor,
    hidden: Tensor,
    weight: Tensor,
    bias: OptTensor,
    lora_A: OptTensor,
    lora_B: OptTensor,
    stats: Tensor,
    ids: Tensor,
    mask: Tensor,
    u: OptTensor,
    inverse: OptTensor,
    lora_scale: float,
    temperature: float,
    softcap: OptFloat,
    logit_scale: float,
    workspace_bytes: OptInt,
    autocast: OptDtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    flat = hidden.reshape(-1, hidden.shape[-1])
    context = Handover(tuple(wanted))
    context.needs = Needs(*wanted)
    context.saved_tensors = (flat, weight, bias, lora_A, lora_B, ids, stats, u)
    context.mask = mask
    with autocast_again(hidden, autocast):
        context.options = {
            "backend": select(hidden.device),
            "workspace_bytes": workspace_bytes,
            "softcap": softcap,
            "logit_scale": float(logit_scale),
            "temperature": temperature,
            "inv_temperature": inverse,
            "autocast_dtype": autocast_dtype(hidden),
            "lora_scale": lora_scale,
            "shard": None,
        }
        with torch.no_grad():
            grads = _LinearLogProb.backward(context, dlogp, dentropy, dlse)[:5]
    return tuple(_or_empty(g, hidden) for g in grads)


@_linear_backward.register_fake
def _(dlogp, dentropy, dlse, hidden, weight, bias, lora_A, lora_B, *given):
    tensors = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, lora_A, lora_B)
    flags = given[-1]
    return tuple(
        t.new_empty(t.shape) if flag else hidden.new_empty(0)
        for t, flag in zip(tensors, flags, strict=True)
    )


def _linear_setup(ctx, inputs, output):
    hidden, weight, _, _, bias, lora_A, lora_B, *numbers = inputs
    ctx.numbers, ctx.wanted = numbers, numbers[-1]
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    *saved, u, inverse = output[3:]
    # what nobody gave is None and not a tensor of nothing: a batch may be empty
    u = u if _keeps_slope(ctx.wanted) else None
    inverse = None if numbers[1] is None else inverse
    ctx.save_for_backward(hidden, weight, bias, lora_A, lora_B, *saved, u, inverse)


def _linear_gradient(ctx, dlogp, dentropy, dlse, *_):
    none = [None] * 15
    if dlogp is None and dentropy is None and dlse is None:
        return tuple(none)
    scale, _, number, softcap, logit_scale, n_bytes, autocast, wanted = ctx.numbers
    grads = torch.ops.grpo_fast.linear_logprob_backward(
        dlogp,
        dentropy,
        dlse,
        *ctx.saved_tensors,
        scale,
        1.0 if number is None else number,
        softcap,
        logit_scale,
        n_bytes,
        autocast,
        wanted,
    )
    hidden = ctx.saved_tensors[0]
    places = (0, 1, 4, 5, 6)
    for place, flag, grad in zip(places, wanted, grads, strict=True):
        if flag:
            none[place] = grad.view(hidden.shape) if place == 0 else grad
    return tuple(none)


_linear.register_autograd(_linear_gradient, setup_context=_linear_setup)


@torch.library.custom_op("grpo_fast::logprob", mutates_args=())
def _logits(
    logits: Tensor,
    ids: Tensor,
    mask: OptTensor,
    temperature: OptTensor,
    temperature_number: OptFloat,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with handed_over(tuple(wanted)) as context:
        out = eager_logits.__wrapped__(
            logits,
            ids,
            mask=mask,
            temperature=either(temperature, temperature_number),
            entropy=True,
        )
    _, ids, active, stats = context.saved_tensors
    inverse = context.options["inv_temperature"] if temperature is not None else None
    return *_flat(out), stats, ids, _or_empty(active, ids).bool(), _or_empty(inverse, stats)


@_logits.register_fake
def _(logits, ids, mask, temperature, temperature_number, wanted):
    check_shapes(tuple(logits.shape[:-1]), ids, mask=mask)
    n = ids.numel()
    active = logits.new_empty(0 if mask is None else n, dtype=torch.bool)
    inverse = logits.new_empty(0 if temperature is None else n, dtype=torch.float32)
    return *_fake_results(logits, n), active, inverse


@torch.library.custom_op("grpo_fast::logprob_backward", mutates_args=())
def _logits_backward(
    dlogp: OptTensor,
    dentropy: OptTensor,
    dlse: OptTensor,
    logits: Tensor,
    stats: Tensor,
    ids: Tensor,
    active: OptTensor,
    inverse: OptTensor,
    temperature: float,
) -> Tensor:
    context = Handover((True,))
    cube = logits if logits.dim() == 3 else logits[None]
    context.saved_tensors = (cube, ids, active, stats)
    context.options = {"inv_temperature": 1.0 / temperature if inverse is None else inverse}
    with torch.no_grad():
        return _LogProb.backward(context, dlogp, dentropy, dlse)[0].view(logits.shape)


@_logits_backward.register_fake
def _(dlogp, dentropy, dlse, logits, *given):
    return logits.new_empty(logits.shape)


def _logits_setup(ctx, inputs, output):
    logits, _, mask, temperature, number, _ = inputs
    ctx.number = 1.0 if number is None else number
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    *saved, active, inverse = output[3:]
    active = None if mask is None else active
    ctx.save_for_backward(logits, *saved, active, None if temperature is None else inverse)


def _logits_gradient(ctx, dlogp, dentropy, dlse, *_):
    none = (None,) * 5
    if dlogp is None and dentropy is None and dlse is None:
        return None, *none
    saved = ctx.saved_tensors
    grad = torch.ops.grpo_fast.logprob_backward(dlogp, dentropy, dlse, *saved, ctx.number)
    return grad, *none


_logits.register_autograd(_logits_gradient, setup_context=_logits_setup)


def linear_logprob(
    hidden,
    weight,
    ids,
    *,
    mask=None,
    bias=None,
    lora=None,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    entropy=False,
    workspace_bytes=None,
    tp_group=None,
):
    """`logprob.linear_logprob` as torch.compile traces it."""
    if tp_group is not None:
        refuse("tp_group", "None", "a process group")
    lora_A, lora_B, lora_scale = (None, None, 1.0) if lora is None else lora
    logp, ent, lse, *_ = torch.ops.grpo_fast.linear_logprob(
        hidden,
        weight,
        ids,
        mask,
        bias,
        lora_A,
        lora_B,
        lora_scale,
        *split(temperature),
        softcap,
        logit_scale,
        workspace_bytes,
        autocast_of(hidden),
        traced_wanted(hidden, weight, bias, lora_A, lora_B),
    )
    shape = hidden.shape[:-1]
    return LogProbs(logp.view(shape), ent.view(shape) if entropy else None, lse.view(shape))


def logprob(logits, ids, *, mask=None, temperature=1.0, entropy=False):
    """`logprob.logprob` as torch.compile traces it."""
    given = (logits, ids, mask, *split(temperature), traced_wanted(logits))
    logp, ent, lse, *_ = torch.ops.grpo_fast.logprob(*given)
    shape = logits.shape[:-1]
    return LogProbs(logp.view(shape), ent.view(shape) if entropy else None, lse.view(shape))


TRACED["linear_logprob"] = linear_logprob
TRACED["logprob"] = logprob
