"""Hugging Face causal language models as policies: `head_fn`, loading, the reference policy.

`attach(model)` adds one keyword to `forward`: with `head_fn` the model runs its backbone, never
computes logits, and returns `head_fn(hidden, head)`. The keyword travels through PEFT, DDP and
FSDP wrappers, so their hooks fire as in any other forward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from .head import TRANSFORM, Head, backbone, check_head, evaluating, find_head, innermost

__all__ = [
    "Head",
    "ReferencePolicy",
    "attach",
    "check_head",
    "detach",
    "evaluating",
    "find_head",
    "innermost",
    "is_attached",
    "load_policy",
    "load_processing",
]

_MARK = "_grpo_fast_previous"


def attach(
    model: nn.Module, *, softcap: float | None = None, logit_scale: float | None = None
) -> None:
    """Give the forward of the innermost causal language model the keyword `head_fn`.

    `model(input_ids=..., position_ids=..., head_fn=fn)` then returns `fn(hidden, head)` with
    hidden (R, L, H) in the dtype of the head weight; without `head_fn` the forward is as before.
    The head is checked first (`check_head`). Attaching twice changes nothing; attach again after
    something else has replaced `forward` (Liger kernels do). Call it before Accelerate, DDP or
    FSDP take the model: under their autocast the check would see rounded logits.

    Args:
        model: the model, wrapped or not. Not copied, and no class is changed.
        softcap: overrides what the family is known for.
        logit_scale: overrides what the family is known for.

    Raises:
        ValueError: see `innermost`, `backbone`, `find_head` and `check_head`; or the config asks
            for the router loss of a mixture of experts, which this forward does not return.
    """
    lm = innermost(model)
    if getattr(lm.config.get_text_config(decoder=True), "output_router_logits", False):
        raise ValueError(
            "model: expected config.output_router_logits=False, got True: the auxiliary router "
            "loss would be dropped"
        )
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
        raise ValueError("model: forward has been wrapped since attach; remove that wrapper first")
    previous = getattr(ours, _MARK)
    del lm.forward
    if previous is not None:
        bound = isinstance(previous, MethodType)
        lm.forward = MethodType(previous.__func__, lm) if bound else previous


def is_attached(model: nn.Module) -> bool:
    """Whether the model takes `head_fn`."""
    return _ours(innermost(model)) is not None


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

    def forward(self: PreTrainedModel, *args: Any, head_fn: Any = None, **kwargs: Any) -> Any:
        if head_fn is None:
            return inner(self, *args, **kwargs)
        return _through_head(self, args, kwargs, head_fn)

    # `generate` reads the signature to learn whether the model takes a mask and positions.
    signature = inspect.signature(lm.forward)
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [inspect.Parameter("head_fn", inspect.Parameter.KEYWORD_ONLY, default=None)]
    parameters += [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    forward.__signature__ = signature.replace(parameters=parameters)
    setattr(forward, _MARK, previous)
    return forward


def _through_head(
    lm: PreTrainedModel, args: tuple, kwargs: Mapping[str, Any], head_fn: Callable[..., Any]
) -> Any:
    # PEFT passes every argument of a causal model on, most of them None.
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name in ("labels", "logits_to_keep", "past_key_values"):
        if name in given:
            raise ValueError(f"{name}: has no meaning together with head_fn, got it anyway")
    if given.setdefault("use_cache", False):
        raise ValueError("use_cache: a cache switches packed attention off; expected False or None")
    hidden = backbone(lm)(*args, **given)[0]
    head = find_head(lm)
    return head_fn(hidden.to(head.weight.dtype), head)


def load_policy(
    name_or_path: str,
    *,
    attn_implementation: str | None = None,
    gguf_file: str | None = None,
    **init_kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model to be trained.

    Args:
        name_or_path: a hub name or a folder.
        attn_implementation: None picks flash_attention_2 when flash-attn is installed, a GPU is
            there and `dtype` is fp16 or bf16 (its kernels take nothing else); otherwise what
            transformers prefers for the family, sdpa where it can.
        gguf_file: a GGUF file in that place. Its weights are unpacked to `dtype`, and the model
            carries no quantization config, so it can be trained and saved.
        init_kwargs: passed to `from_pretrained`. `dtype` is float32 unless given.
    """
    init_kwargs.setdefault("dtype", torch.float32)
    half = str(init_kwargs["dtype"]).removeprefix("torch.") in ("float16", "bfloat16")
    if attn_implementation is None and half and torch.cuda.is_available():
        attn_implementation = "flash_attention_2" if is_flash_attn_2_available() else None
    if gguf_file is None:
        return AutoModelForCausalLM.from_pretrained(
            name_or_path, attn_implementation=attn_implementation, **init_kwargs
        )
    # Newer versions keep the blocks packed, untrainable, when a kernel for them is at hand.
    config_class = getattr(transformers, "GgufConfig", None)
    if config_class is not None:
        init_kwargs["quantization_config"] = config_class(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        name_or_path, gguf_file=gguf_file, attn_implementation=attn_implementation, **init_kwargs
    )
    if getattr(loaded, "hf_quantizer", None) is None:
        return loaded
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(
        config, dtype=loaded.dtype, attn_implementation=loaded.config._attn_implementation
    )
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.to(loaded.device).eval()


def load_processing(name_or_path: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with padding on the left and a pad token (the EOS when it has none).

    Raises:
        ValueError: the tokenizer has neither a pad token nor an EOS token.
    """
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left", **extra)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"name_or_path: the tokenizer of {name_or_path} has no EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class ReferencePolicy:
    """The policy that the KL term compares with.

    A full model is copied once, frozen and in eval mode. Of a PEFT model nothing is copied: the
    reference is the same model with its adapter switched off.
    """

    def __init__(self, model: nn.Module, peft: bool) -> None:
        self.peft = peft
        if peft:
            while not hasattr(model, "disable_adapter"):
                if not isinstance(getattr(model, "module", None), nn.Module):
                    raise ValueError(f"model: expected a PeftModel, got {type(model).__name__}")
                model = model.module
            self.model = model
        else:
            self.model = copy.deepcopy(model).requires_grad_(False).eval()

    def logprobs(self, fn: Callable[[nn.Module], Any]) -> Any:
        """Return `fn(reference)`, without gradients, in eval mode and without the adapter."""
        if not self.peft:
            with torch.no_grad():
                return fn(self.model)
        with torch.no_grad(), evaluating(self.model), self.model.disable_adapter():
            return fn(self.model)

    @torch.no_grad()
    def sync(self, model: nn.Module, alpha: float) -> None:
        """`reference = (1 - alpha) * reference + alpha * model`, parameter by parameter.

        The moving reference of "Learn Your Reference Model for Real Good Alignment" (TR-DPO, 2024).

        Raises:
            ValueError: alpha is not in (0, 1]; the reference is an adapter switched off; or the
                parameters of `model` have other names or shapes.
        """
        if self.peft:
            raise ValueError("sync: the reference of a PEFT model is its base and cannot move")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: expected a number in (0, 1], got {alpha}")
        ours = dict(innermost(self.model).named_parameters())
        theirs = dict(innermost(model).named_parameters())
        if [(n, p.shape) for n, p in ours.items()] != [(n, p.shape) for n, p in theirs.items()]:
            raise ValueError("model: its parameters are not those the reference was made from")
        for name, reference in ours.items():
            reference.lerp_(theirs[name].to(reference), alpha)

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the weights of the reference, or None when it is an adapter switched off."""
        return None if self.peft else self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: a PEFT reference is given weights, or a full one is given None.
        """
        if (state is None) != self.peft:
            kind = "None" if self.peft else "a state dict"
            raise ValueError(f"state: expected {kind} for this reference, got the other")
        if state is not None:
            self.model.load_state_dict(state)
