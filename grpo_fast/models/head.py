"""The last layer of a Hugging Face causal language model: where it is and what it does.

    z = softcap * tanh(scale * (h @ W.T + b) / softcap)            logits of a head

What `scale` and `softcap` are depends on the model family. `check_head` compares the result with
the model's own logits before the first step, so a family this file does not know is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from grpo_fast.checks import fail
from grpo_fast.engine.head import Head
from grpo_fast.engine.logprob import linear_logprob

# (prefix of model_type, attribute of the text config, True when the logits are divided by it).
# MiniCPM3 and Inkling divide the hidden states instead: the same thing while the head has no bias.
_SCALES = (
    ("cohere", "logit_scale", False),
    ("granite", "logits_scaling", True),
    ("hyperclovax", "logits_scaling", False),
    ("falcon_h1", "lm_head_multiplier", False),
    ("muse_", "output_multiplier", False),
    ("minicpm3", "logits_scaling", True),
    ("inkling", "logits_mup_width_multiplier", True),
)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
TRANSFORM = "_grpo_fast_transform"


def innermost(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside PEFT, DDP, FSDP, torch.compile or `.module` wrappers.

    Raises:
        ValueError: no `PreTrainedModel` is inside, it is an encoder-decoder, or the PEFT method
            adds virtual tokens (prompt and prefix tuning), which a packed row cannot hold.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            if inner.active_peft_config.is_prompt_learning:
                kind = inner.active_peft_config.peft_type
                hint = "it prepends virtual tokens and cannot be packed."
                fail("model", "a PEFT method that changes layers, such as LoRA", kind, hint)
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            expected = "a transformers PreTrainedModel, or a wrapper that holds one as `.module`"
            fail("model", expected, type(model).__name__)
    if inner.config.is_encoder_decoder:
        fail("model", "a decoder-only model", type(inner).__name__)
    return inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch every module to eval mode, and give each its own flag back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def backbone(model: nn.Module) -> nn.Module:
    """Return the part of the model below its head: token ids to the last hidden state.

    Raises:
        ValueError: the class names no backbone (`base_model_prefix` is missing or wrong).
    """
    lm = innermost(model)
    body = lm.base_model
    if body is lm:
        got = f"{type(lm).__name__}, which has no submodule {lm.base_model_prefix!r}"
        fail("model", "a backbone of its own, named by base_model_prefix", got)
    # OPT, BART and their relatives go past it, to the decoder inside
    inner = getattr(body, "decoder", None)
    return inner if isinstance(inner, PreTrainedModel) else body


def find_head(model: nn.Module, *, partitioned: bool = False) -> Head:
    """Return the head of the model with the transforms of its family.

    Cheap: it is read again on every forward, so a resized or reloaded head is never stale.

    Args:
        model: the model, wrapped or not.
        partitioned: take a weight that DeepSpeed's ZeRO-3 has partitioned as it is, for
            `linear_logprob`, which gathers it; refused otherwise.

    Raises:
        ValueError: the model has no output embedding; an adapter other than LoRA or a full copy
            (`modules_to_save`) sits on it; or its weight is quantized or partitioned away.
    """
    lm = innermost(model)
    module = lm.get_output_embeddings()
    if module is None:
        fail("model", "an output embedding (lm_head)", f"{type(lm).__name__} without one")
    lora = None
    if hasattr(module, "base_layer") or hasattr(module, "token_adapter"):
        module, lora = _adapted(lm, module)
    # a DTensor stays one: the `linear_*` functions gather it and average its gradient, while that
    # of full_tensor() is each rank's own
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            "model: expected an unquantized (V, H) lm_head weight, got none on the "
            f"{type(module).__name__} {_name_of(lm, module)}"
        )
    if weight.is_meta:
        raise ValueError(
            "model: expected an lm_head that holds its numbers, got one that is offloaded or was "
            f"never loaded (device meta) on {_name_of(lm, module)}"
        )
    if hasattr(weight, "ds_id") and not partitioned:
        fail("model", "a whole lm_head", "one that ZeRO-3 partitions", "use FSDP or ZeRO-2.")
    shape = getattr(weight, "ds_shape", weight.shape)
    if len(shape) != 2 or weight.element_size() < 2 or not weight.is_floating_point():
        got = f"{weight.dtype} of shape {tuple(shape)}"
        fail("model", "an unquantized (V, H) lm_head weight", got)
    text = lm.config.get_text_config(decoder=True)
    # Inkling pads the vocabulary of its weight and drops the padding from its logits.
    vocab = getattr(text, "unpadded_vocab_size", None) or shape[0]
    if vocab < shape[0]:
        if hasattr(weight, "full_tensor"):
            got, hint = f"a padded one of {shape[0]}", "leave it in the group of the whole model."
            fail("model", f"an lm_head of {vocab} rows under FSDP2", got, hint)
        weight, bias = weight[:vocab], None if bias is None else bias[:vocab]
        lora = None if lora is None else (lora[0], lora[1][:vocab], lora[2])
    return Head(weight, bias, **_transform(lm, text), lora=lora)


def _adapted(lm: PreTrainedModel, module: nn.Module) -> tuple[nn.Module, tuple | None]:
    """The layer under an adapter of the head, and the adapter where it is a plain active LoRA."""
    base, got = getattr(module, "base_layer", None), type(module).__name__
    active = [
        a for a in getattr(module, "active_adapters", ()) if a in getattr(module, "lora_A", ())
    ]
    if not hasattr(module, "lora_A") or not isinstance(base, nn.Linear):
        reason = "is none"
    elif module.disable_adapters or module.merged or not active:
        return base, None
    elif len(active) > 1:
        reason = f"is {len(active)} at once ({', '.join(active)})"
    elif active[0] in module.lora_variant or module.lora_B[active[0]].bias is not None:
        reason = "has more to it (DoRA, a bias or another variant)"
    elif not isinstance(module.lora_dropout[active[0]], nn.Identity):
        reason = "has a dropout (expected lora_dropout=0)"
    else:
        name = active[0]
        return base, (module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
    got = f"{got} on {_name_of(lm, module)}, which {reason}"
    hint = "leave it out of target_modules, or train a full copy of it with modules_to_save."
    fail("model", "a plain lm_head or one LoRA adapter on it", got, hint)


def _transform(lm: PreTrainedModel, text: Any) -> dict[str, Any]:
    softcap = next((c for n in _SOFTCAPS if (c := getattr(text, n, None))), None)
    scale = 1.0
    for prefix, attribute, divide in _SCALES:
        if text.model_type.startswith(prefix) or lm.config.model_type.startswith(prefix):
            factor = getattr(text, attribute, None)
            scale = 1.0 if factor is None else (1.0 / factor if divide else float(factor))
    family = {"softcap": None if softcap is None else float(softcap), "logit_scale": scale}
    return {**family, **lm.__dict__.get(TRANSFORM, {})}


def _name_of(lm: nn.Module, module: nn.Module) -> str:
    return next(name for name, child in lm.named_modules() if child is module)


def check_head(model: nn.Module, head: Head, *, run_backbone: bool = True) -> None:
    """Compare the log-probabilities of `head` with those of the model's own logits.

    Eight tokens, twice: with the model's own hidden states, and with random ones put in their
    place whose logits have a standard deviation of 10. The second is what finds a soft cap or a
    scale in a freshly initialised model, whose logits are too small to show either.

    The bound is `4 * eps * max|logit|` with eps 1e-5 (fp32; 2**-10 where TF32 is allowed),
    2**-10 (fp16), 2**-8 (bf16): the rounding of the model's logits, not of ours.

    Args:
        run_backbone: False leaves the first comparison out, for a model whose attention has no
            kernel where it lies (flash-attn on a CPU).

    Raises:
        ValueError: the two differ by more than the bound, and by how much.
    """
    lm = innermost(model)
    vocab, width = head.weight.shape
    count = min(8, vocab)
    tokens = torch.arange(count, device=lm.device)[None]
    targets = torch.linspace(0, vocab - 1, count, device=head.weight.device).long()
    with torch.no_grad(), evaluating(lm):
        parts = {"weight": head.weight, "bias": head.bias}
        whole = {n: t.full_tensor() for n, t in parts.items() if hasattr(t, "full_tensor")}
        head = replace(head, **whole)
        own = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(1, count, width, generator=own, device="cpu")
        noise = noise.to(head.weight)
        plain = (noise[0] @ head.weight.T).float() * head.logit_scale
        loud = noise * (10.0 / plain.std().clamp(min=1e-6)).to(noise)
        for hidden in (None, loud) if run_backbone else (loud,):
            with _hidden_states(lm, hidden, run_backbone) as seen:
                logits = lm(input_ids=tokens, use_cache=False).logits[0].float()
            if not seen:
                raise ValueError(
                    f"model: expected one whose forward calls its {type(backbone(lm)).__name__}, "
                    f"got {type(lm).__name__}, which goes past it"
                )
            _compare(lm, head, seen.pop()[0], logits, targets)


@dataclass
class _Output(BaseModelOutputWithPast):
    """Whatever else a model reads of its layers is None, as most of it is in most calls."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@contextmanager
def _hidden_states(lm: nn.Module, hidden: Tensor | None, run: bool) -> Iterator[list[Tensor]]:
    """Last hidden states of the forward passes inside the block, with `hidden` in their place."""
    seen: list[Tensor] = []

    def exchange(_: nn.Module, __: Any, output: Any) -> Any:
        seen.append(output[0] if hidden is None else hidden.expand_as(output[0]))
        if hidden is None:
            return output
        if isinstance(output, tuple):
            return (seen[-1], *output[1:])
        output.last_hidden_state = seen[-1]
        return output

    body = backbone(lm)
    handle = body.register_forward_hook(exchange)
    before = body.__dict__.get("forward")
    if not run:
        body.forward = lambda *_, **__: _Output(last_hidden_state=hidden)
    try:
        yield seen
    finally:
        handle.remove()
        if not run:
            del body.forward
            if before is not None:
                body.forward = before


def _compare(lm: PreTrainedModel, head: Head, hidden: Tensor, logits: Tensor, ids: Tensor) -> None:
    hidden = hidden.to(head.weight.dtype)
    if logits.shape != (len(ids), head.weight.shape[0]):
        got = f"{tuple(logits.shape)} from {type(lm).__name__}"
        fail("model", f"logits {len(ids), head.weight.shape[0]}, as its head has rows", got)
    if logits.isnan().any():
        broken = [n for n, p in lm.named_parameters() if not p.is_meta and p.isnan().any()]
        got = f"NaN in {', '.join(broken[:3])}" if broken else "NaN logits of finite weights"
        raise ValueError(f"model: expected weights that give finite logits, got {got}")
    ours = linear_logprob(hidden, head, ids).logp
    theirs = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    error = (ours - theirs).abs().max().item()
    tf32 = hidden.is_cuda and torch.backends.cuda.matmul.allow_tf32
    eps = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
    allowed = eps.get(hidden.dtype, 2.0**-10 if tf32 else 1e-5)
    allowed *= 4 * max(1.0, logits[logits.isfinite()].abs().max().item())
    # `not <=` and not `>`, so that a NaN is refused too.
    if not error <= allowed:
        raise ValueError(
            f"model: log-probabilities from the hidden states of {type(lm).__name__} (softcap="
            f"{head.softcap}, logit_scale={head.logit_scale:.6g}) differ from those of its own "
            f"logits by up to {error:.3g} nats, {allowed:.2g} allowed: its head does something "
            "unknown. Name it with attach(model, softcap=..., logit_scale=...) if it is one of "
            "those; otherwise compute logits yourself and use policy_loss"
        )
