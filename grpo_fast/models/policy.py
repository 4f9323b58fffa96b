"""Hugging Face causal language models as policies: `head_fn`, loading, the reference policy.

`attach(model)` adds a keyword to `forward`: with `head_fn` the model runs its backbone, never
computes logits, and returns `head_fn(hidden, head)`. A second one beside it, `layout`, divides the
one row into `Segments`. The keywords travel through PEFT, DDP and
FSDP wrappers, so their hooks fire as in any other forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from grpo_fast.checks import fail

from .attention import install
from .head import TRANSFORM, backbone, check_head, find_head, innermost
from .rope import check_positions
from .segments import Segments, laid_out
from .sharding import as_forward_of, is_unit

_MARK = "_grpo_fast_previous"


def attach(
    model: nn.Module, *, softcap: float | None = None, logit_scale: float | None = None
) -> None:
    """Give the forward of the innermost causal language model the keyword `head_fn`.

    `model(input_ids=..., position_ids=..., head_fn=fn)` then returns `fn(hidden, head)` with
    hidden (R, L, H) in the dtype of the head weight; without `head_fn` the forward is as before.
    With `router_fn` beside it a mixture of experts returns both `head_fn(hidden, head)` and
    `router_fn(router_logits)`.
    The head is checked first (`check_head`). Attaching twice changes nothing; attach again after
    something else has replaced `forward` (Liger kernels do). Call it before Accelerate, DDP or
    FSDP take the model: under their autocast the check would see rounded logits.

    Args:
        model: the model, wrapped or not. Not copied, and no class is changed.
        softcap: overrides what the family is known for.
        logit_scale: overrides what the family is known for.

    Raises:
        ValueError: see `innermost`, `backbone`, `find_head` and `check_head`; or the config asks
            for the router logits of a mixture of experts, which `router_fn` alone is given.
    """
    lm = innermost(model)
    if getattr(lm.config.get_text_config(decoder=True), "output_router_logits", False):
        hint = "router_aux_loss_coef asks for the router loss, which would be dropped here."
        fail("model", "config.output_router_logits=False", True, hint)
    override = {"softcap": softcap, "logit_scale": logit_scale}
    override = {name: float(value) for name, value in override.items() if value is not None}
    if not override and _ours(lm) is not None:
        return
    before = lm.__dict__.get(TRANSFORM, {})
    setattr(lm, TRANSFORM, {**before, **override})
    try:
        check_head(lm, find_head(lm))
    except ValueError:
        setattr(lm, TRANSFORM, before)
        raise
    if _ours(lm) is None:
        lm.forward = MethodType(_with_head_fn(lm), lm)


def detach(model: nn.Module) -> None:
    """Undo `attach`: the forward is what it was before. Nothing happens when it is not attached.

    Raises:
        ValueError: something has wrapped `forward` since, and must be removed first.
    """
    lm = innermost(model)
    ours = _ours(lm)
    lm.__dict__.pop(TRANSFORM, None)
    if ours is None:
        return
    if lm.forward.__func__ is not ours:
        got, hint = "one that has been wrapped since", "remove that wrapper first."
        fail("model", "the forward that attach left", got, hint)
    previous = getattr(ours, _MARK)
    del lm.forward
    if previous is not None:
        bound = isinstance(previous, MethodType)
        lm.forward = MethodType(previous.__func__, lm) if bound else previous


def is_attached(model: nn.Module) -> bool:
    """Whether the model takes `head_fn`."""
    return _ours(innermost(model)) is not None


def takes_segments(lm: PreTrainedModel) -> bool:
    """Whether the attention implementation of a model has been taught to take `Segments`."""
    config = lm.config.get_text_config(decoder=True)
    return install(config._attn_implementation or "eager")


def _ours(lm: PreTrainedModel) -> Callable[..., Any] | None:
    # Accelerate wraps forward for mixed precision and leaves the inner one in `__wrapped__`.
    forward = lm.forward
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        if hasattr(forward, _MARK):
            return forward
        forward = getattr(forward, "__wrapped__", None)
    return None


def _with_head_fn(lm: PreTrainedModel) -> Callable[..., Any]:
    """Build the new forward. It holds functions and no instance, so that deepcopy stays correct."""
    previous = lm.__dict__.get("forward")
    if previous is None:
        inner = type(lm).forward
    elif isinstance(previous, MethodType):
        inner = previous.__func__
    else:
        inner = lambda self, *args, **kwargs: previous(*args, **kwargs)  # noqa: E731

    def forward(
        self: PreTrainedModel, *args: Any, head_fn: Any = None, layout: Any = None, **kwargs: Any
    ) -> Any:
        if head_fn is not None:
            return _through_head(self, args, kwargs, head_fn, layout)
        if layout is not None:
            fail("layout", "None without head_fn", type(layout).__name__)
        return inner(self, *args, **kwargs)

    # `generate` reads the signature to learn whether the model takes a mask and positions.
    signature = inspect.signature(lm.forward)
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name in ("head_fn", "layout"):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
    parameters += [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    forward.__signature__ = signature.replace(parameters=parameters)
    setattr(forward, _MARK, previous)
    return forward


def _through_head(
    lm: PreTrainedModel,
    args: tuple,
    kwargs: Mapping[str, Any],
    head_fn: Callable[..., Any],
    layout: Segments | None,
) -> Any:
    # PEFT passes every argument of a causal model on, most of them None.
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name in ("labels", "logits_to_keep", "past_key_values"):
        if name in given:
            expected = "None with head_fn, beside which it has no meaning"
            fail(name, expected, type(given[name]).__name__)
    if given.setdefault("use_cache", False):
        hint = "a cache switches packed attention off."
        fail("use_cache", "False or None", given["use_cache"], hint)
    several = layout is not None and layout.sequences > 1
    check_positions(lm, given.get("position_ids"), several)
    if layout is not None and not takes_segments(lm):
        got = lm.config._attn_implementation
        fail("layout", "an attention implementation that takes segments", got)
    router_fn = given.pop("router_fn", None)
    if router_fn is not None:
        given.update(output_router_logits=True, return_dict=True)
    with laid_out(layout):
        out = backbone(lm)(*args, **given)

    def score(states: Tensor) -> Any:
        head = find_head(lm, partitioned=True)
        return head_fn(states.to(head.weight.dtype), head)

    module = lm.get_output_embeddings()
    result = as_forward_of(module, score, out[0]) if is_unit(module) else score(out[0])
    return result if router_fn is None else (result, router_fn(out.router_logits))
