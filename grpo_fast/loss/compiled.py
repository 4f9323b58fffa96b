"""The losses as custom ops, which is what torch.compile sees of them: no graph break, and nothing
inside is traced.

An op runs the public function as it is, checks and host syncs included, and returns with the loss
its metrics and the fp32 gradients; its backward multiplies those by the upstream scalar. Eager
calls do not come through here.
"""

import functools
import json
import warnings

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.engine.handover import TRACED, handed_over

from . import metrics
from .linear import linear_policy_loss as eager_linear
from .logits import policy_loss as eager_logits
from .tracing import (
    OptDtype,
    OptFloat,
    OptInt,
    OptNumber,
    OptTensor,
    autocast_again,
    autocast_of,
    check_shapes,
    either,
    fake_gradients,
    gradients_or_empty,
    refuse,
    scaled,
    split,
    traced_wanted,
    wide,
)

DEFAULT = LossConfig()


@functools.lru_cache(maxsize=64)
def _config(text: str) -> LossConfig:
    with warnings.catch_warnings():
        # the caller heard it where the configuration was made
        warnings.simplefilter("ignore")
        return LossConfig(**json.loads(text))


def _stacked(loss_: Tensor, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the metrics that are numbers and those that count, each in their order."""
    numbers = torch.stack([v for k, v in found.items() if k not in metrics.COUNTS])
    counts = torch.stack([v.long() for k, v in found.items() if k in metrics.COUNTS])
    return loss_.detach().clone(), numbers, counts


def _fake_stacked(like: Tensor, has_ref: bool, has_rollout: bool) -> tuple[Tensor, ...]:
    known = metrics.names(has_ref, has_rollout)
    n = sum(name in metrics.COUNTS for name in known)
    dtype = wide(like)
    return (
        like.new_empty((), dtype=dtype),
        like.new_empty((len(known) - n,), dtype=dtype),
        like.new_empty((n,), dtype=torch.int64),
    )


def _named(numbers: Tensor, counts: Tensor, has_ref: bool, has_rollout: bool) -> dict[str, Tensor]:
    known = metrics.names(has_ref, has_rollout)
    values = list(numbers.detach().unbind())
    whole = list(counts.unbind())
    return {name: (whole if name in metrics.COUNTS else values).pop(0) for name in known}


@torch.library.custom_op("grpo_fast::linear_policy_loss", mutates_args=())
def _linear(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    mask: OptTensor,
    cu_seqlens: OptTensor,
    old_logp: OptTensor,
    ref_logp: OptTensor,
    ref_hidden: OptTensor,
    ref_weight: OptTensor,
    rollout_logp: OptTensor,
    bias: OptTensor,
    lora_A: OptTensor,
    lora_B: OptTensor,
    lora_scale: float,
    temperature: OptTensor,
    softcap: OptFloat,
    logit_scale: float,
    threshold: OptTensor,
    threshold_number: OptNumber,
    denominator: OptTensor,
    denominator_number: OptNumber,
    skip_inactive_forward: bool,
    max_rows: OptInt,
    workspace_bytes: OptInt,
    config: str,
    autocast: OptDtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with handed_over(tuple(wanted)) as context, autocast_again(hidden, autocast):
        loss_, found = eager_linear.__wrapped__(
            hidden,
            weight,
            ids,
            advantages,
            config=_config(config),
            mask=mask,
            cu_seqlens=cu_seqlens,
            old_logp=old_logp,
            ref_logp=ref_logp,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            rollout_logp=rollout_logp,
            bias=bias,
            lora=None if lora_A is None else (lora_A, lora_B, lora_scale),
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            entropy_threshold=either(threshold, threshold_number),
            denominator=either(denominator, denominator_number),
            skip_inactive_forward=skip_inactive_forward,
            max_rows=max_rows,
            workspace_bytes=workspace_bytes,
        )
    return *_stacked(loss_, found), *gradients_or_empty(hidden, context.gradients, 5)


@_linear.register_fake
def _(hidden, weight, ids, advantages, *given):
    names = _names(_linear)[4:]
    given = dict(zip(names, given, strict=True))
    shape = tuple(hidden.shape[:-1])
    fields = ("mask", "old_logp", "ref_logp", "rollout_logp")
    check_shapes(shape, ids, **{name: given[name] for name in fields})
    has_ref = given["ref_logp"] is not None or given["ref_hidden"] is not None
    stacked = _fake_stacked(hidden, has_ref, given["rollout_logp"] is not None)
    flat = hidden.reshape(-1, hidden.shape[-1])
    tensors = (flat, weight, given["bias"], given["lora_A"], given["lora_B"])
    return *stacked, *fake_gradients(hidden, tensors, given["wanted"])


@functools.cache
def _names(op) -> list[str]:
    return [a.name for a in op._opoverload._schema.arguments]


def register_loss_gradient(op, names: tuple[str, ...]) -> None:
    """Backward of a loss op, whose last outputs are the gradients of these arguments."""

    def setup(ctx, inputs, output):
        # inputs are named in the order of the schema
        given = dict(zip(_names(op), inputs, strict=True))
        ctx.like = [None if given[n] is None else (given[n].dtype, given[n].shape) for n in names]
        ctx.flags = given["wanted"]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[3:])

    def backward(ctx, upstream, *_):
        gradients = list(ctx.saved_tensors)
        # fp16 logits: the power of two that `chunks.fp16_scale` chose
        scale = gradients.pop() if len(gradients) > len(names) else None
        factor = upstream if scale is None or upstream is None else upstream / scale
        out = dict.fromkeys(_names(op))
        for name, grad, like, flag in zip(names, gradients, ctx.like, ctx.flags, strict=True):
            if flag and factor is not None:
                out[name] = scaled(grad, factor).to(like[0]).view(like[1])
        return tuple(out.values())

    op.register_autograd(backward, setup_context=setup)


register_loss_gradient(_linear, ("hidden", "weight", "bias", "lora_A", "lora_B"))


def linear_policy_loss(
    hidden,
    weight,
    ids,
    advantages,
    *,
    config=None,
    mask=None,
    cu_seqlens=None,
    old_logp=None,
    ref_logp=None,
    ref_hidden=None,
    ref_weight=None,
    rollout_logp=None,
    bias=None,
    lora=None,
    temperature=None,
    softcap=None,
    logit_scale=1.0,
    entropy_threshold=None,
    denominator=None,
    skip_inactive_forward=False,
    max_rows=None,
    main_grad=None,
    grad_scale=1.0,
    workspace_bytes=None,
    tp_group=None,
    per_token=False,
    explain=False,
):
    """`loss.linear_policy_loss` as torch.compile traces it."""
    if per_token:
        refuse("per_token", "False", per_token)
    if explain:
        refuse("explain", "False", explain)
    if main_grad is not None:
        refuse("main_grad", "None", "a tensor")
    if grad_scale != 1.0:
        refuse("grad_scale", "1.0", grad_scale)
    if tp_group is not None:
        refuse("tp_group", "None", "a process group")
    lora_A, lora_B, lora_scale = (None, None, 1.0) if lora is None else lora
    loss_, numbers, counts, *_ = torch.ops.grpo_fast.linear_policy_loss(
        hidden,
        weight,
        ids,
        advantages,
        mask,
        cu_seqlens,
        old_logp,
        ref_logp,
        ref_hidden,
        ref_weight,
        rollout_logp,
        bias,
        lora_A,
        lora_B,
        lora_scale,
        temperature,
        softcap,
        logit_scale,
        *split(entropy_threshold),
        *split(denominator),
        skip_inactive_forward,
        max_rows,
        workspace_bytes,
        (DEFAULT if config is None else config).text,
        autocast_of(hidden),
        traced_wanted(hidden, weight, bias, lora_A, lora_B),
    )
    has_ref = ref_logp is not None or ref_hidden is not None
    return loss_, _named(numbers, counts, has_ref, rollout_logp is not None)


@torch.library.custom_op("grpo_fast::policy_loss", mutates_args=())
def _logits(
    logits: Tensor,
    ids: Tensor,
    advantages: Tensor,
    mask: OptTensor,
    cu_seqlens: OptTensor,
    old_logp: OptTensor,
    ref_logp: OptTensor,
    rollout_logp: OptTensor,
    temperature: OptTensor,
    threshold: OptTensor,
    threshold_number: OptNumber,
    denominator: OptTensor,
    denominator_number: OptNumber,
    skip_inactive_forward: bool,
    max_rows: OptInt,
    config: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with handed_over(tuple(wanted)) as context:
        loss_, found = eager_logits.__wrapped__(
            logits,
            ids,
            advantages,
            config=_config(config),
            mask=mask,
            cu_seqlens=cu_seqlens,
            old_logp=old_logp,
            ref_logp=ref_logp,
            rollout_logp=rollout_logp,
            temperature=temperature,
            entropy_threshold=either(threshold, threshold_number),
            denominator=either(denominator, denominator_number),
            skip_inactive_forward=skip_inactive_forward,
            max_rows=max_rows,
        )
    grad = logits.new_empty(0) if context.gradients is None else context.gradients[0]
    scale = loss_.new_ones(()) if context.scale is None else context.scale
    return *_stacked(loss_, found), grad, scale


@_logits.register_fake
def _(logits, ids, advantages, *given):
    given = dict(zip(_names(_logits)[3:], given, strict=True))
    fields = {name: given[name] for name in ("mask", "old_logp", "ref_logp", "rollout_logp")}
    check_shapes(tuple(logits.shape[:-1]), ids, **fields)
    has_ref, has_rollout = (fields[name] is not None for name in ("ref_logp", "rollout_logp"))
    stacked = _fake_stacked(logits, has_ref, has_rollout)
    grad = logits.new_empty(logits.shape if given["wanted"][0] else (0,))
    return *stacked, grad, torch.empty_like(stacked[0])


register_loss_gradient(_logits, ("logits",))


def policy_loss(
    logits,
    ids,
    advantages,
    *,
    config=None,
    mask=None,
    cu_seqlens=None,
    old_logp=None,
    ref_logp=None,
    rollout_logp=None,
    temperature=None,
    entropy_threshold=None,
    denominator=None,
    skip_inactive_forward=False,
    max_rows=None,
    inplace=False,
    per_token=False,
):
    """`logits_loss.policy_loss` as torch.compile traces it."""
    if per_token:
        refuse("per_token", "False", per_token)
    if inplace:
        refuse("inplace", "False", inplace)
    loss_, numbers, counts, *_ = torch.ops.grpo_fast.policy_loss(
        logits,
        ids,
        advantages,
        mask,
        cu_seqlens,
        old_logp,
        ref_logp,
        rollout_logp,
        temperature,
        *split(entropy_threshold),
        *split(denominator),
        skip_inactive_forward,
        max_rows,
        (DEFAULT if config is None else config).text,
        traced_wanted(logits),
    )
    return loss_, _named(numbers, counts, ref_logp is not None, rollout_logp is not None)


TRACED["linear_policy_loss"] = linear_policy_loss
TRACED["policy_loss"] = policy_loss
