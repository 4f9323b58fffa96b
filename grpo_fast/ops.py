"""The losses as custom ops, which is what torch.compile sees of them: no graph break, and nothing
inside is traced.

An op runs the public function as it is, checks and host syncs included, and returns with the loss
its metrics and the fp32 gradients; its backward multiplies those by the upstream scalar. Eager
calls do not come through here.
"""

import functools
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Optional

import torch
from torch import Tensor
from torch.types import Number

from . import inputs, loss, metrics
from .config import LossConfig
from .gradients import TRACED, handed_over

DEFAULT = LossConfig()
# the spelling of an optional argument from which every torch.library reads a schema
OptTensor = Optional[Tensor]  # noqa: UP045
OptNumber = Optional[Number]  # noqa: UP045
OptFloat = Optional[float]  # noqa: UP045
OptInt = Optional[int]  # noqa: UP045
OptDtype = Optional[torch.dtype]  # noqa: UP045


@functools.lru_cache(maxsize=64)
def _config(text: str) -> LossConfig:
    with warnings.catch_warnings():
        # the caller heard it where the configuration was made
        warnings.simplefilter("ignore")
        return LossConfig(**json.loads(text))


def split(value: object) -> tuple[Tensor | None, object]:
    """(tensor, None) or (None, number) of an argument that may be either."""
    return (value, None) if isinstance(value, Tensor) else (None, value)


def either(tensor: Tensor | None, number: object) -> object:
    """Inverse of `split`."""
    return number if tensor is None else tensor


def autocast_of(like: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region a call is traced in: compiled code runs outside of it."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextmanager
def autocast_again(like: Tensor, dtype: torch.dtype | None) -> Iterator[None]:
    """The autocast region of `autocast_of` around an op that runs."""
    if dtype is None:
        yield
        return
    with torch.autocast(like.device.type, dtype):
        yield


def traced_wanted(*tensors: Tensor | None) -> list[bool]:
    """Which tensors want a gradient, as the argument of an op."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def wide(like: Tensor) -> torch.dtype:
    """fp32, or fp64: what losses and gradients of an input are computed in."""
    return torch.promote_types(like.dtype, torch.float32)


def check_shapes(shape: tuple[int, ...], ids: Tensor, **fields: Tensor | None) -> None:
    """ValueError while tracing for what does not depend on values; the op checks the rest."""
    inputs.check_tensor("ids", ids, shape, ids.device, floating=False)
    for name, value in fields.items():
        if value is not None and tuple(value.shape) != shape:
            inputs.fail(name, f"tensor {shape}", inputs.describe(value))


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


def gradients_or_empty(like: Tensor, gradients: list[Tensor | None] | None, n: int) -> list[Tensor]:
    """n tensors, with nothing in those that nobody wants."""
    gradients = [None] * n if gradients is None else gradients
    return [like.new_empty(0, dtype=wide(like)) if g is None else g for g in gradients]


def refuse(name: str, expected: str, got: object) -> NoReturn:
    """`inputs.fail`, of what torch.compile cannot have."""
    inputs.fail(name, f"{expected} under torch.compile", got)
    raise AssertionError


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
        loss_, found = loss.linear_policy_loss.__wrapped__(
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


def fake_gradients(like: Tensor, tensors, flags: list[bool]) -> list[Tensor]:
    """Shapes of `gradients_or_empty`."""
    return [
        like.new_empty(t.shape if flag else (0,), dtype=wide(like))
        for t, flag in zip(tensors, flags, strict=True)
    ]


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


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, by way of fp32 for half precision."""
    if grad.dtype.itemsize >= 4:
        return grad * factor.to(grad.dtype)
    return grad.float() * factor


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
    workspace_bytes=None,
    explain=False,
):
    """`loss.linear_policy_loss` as torch.compile traces it."""
    if explain:
        refuse("explain", "False", explain)
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
        loss_, found = loss.policy_loss.__wrapped__(
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
):
    """`loss.policy_loss` as torch.compile traces it."""
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
