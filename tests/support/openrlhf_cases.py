"""Tiny actors and batches for OpenRLHF, and how far two results are apart."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from openrlhf.models import Actor
from peft import LoraConfig, get_peft_model
from tiny import SHAPE, tiny
from torch import Tensor

V, B, L, A = SHAPE["vocab_size"], 4, 14, 9


def actor(family: str = "Qwen3", *, packed: bool = False, lora: bool = False, **more: Any) -> Actor:
    """A tiny model of a family in an Actor, as OpenRLHF prepares it; more is the Actor's."""
    model = mixture() if family == "Qwen3Moe" else tiny(family)
    model.config.use_cache = False
    if lora:
        torch.manual_seed(3)
        adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
        model.enable_input_require_grads()
        model = get_peft_model(model, adapter)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    made = Actor(model, **more)
    made.packing_samples = packed
    return made


def mixture() -> tf.PreTrainedModel:
    """A mixture of experts that returns its router loss, as OpenRLHF sets it."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = tf.Qwen3MoeConfig(**SHAPE, head_dim=8, **experts, initializer_range=0.2)
    config.output_router_logits = True
    return tf.Qwen3MoeForCausalLM(config)


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Sequences (B, L) padded on both sides, and an action mask (B, A) with a hole."""
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(3, V, (B, L), generator=generator)
    attention = torch.ones(B, L, dtype=torch.long)
    attention[1, :3], attention[1, -4:] = 0, 0
    attention[2, -7:] = 0
    # what is padding is no action, and a tool's answer is none either
    actions = attention[:, 1:][:, -A:].clone()
    actions[0, :2] = 0
    actions[3, 3:5] = 0
    return {
        "sequences": sequences * attention,
        "action_mask": actions,
        "attention_mask": attention,
    }


def scored(one: Actor, entropy: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Log-probs, entropies, router loss and the gradients of all parameters through them."""
    data, generator = batch(seed), torch.Generator().manual_seed(7)
    one.zero_grad()
    logp, output = one(**data, return_output=True, return_entropy=entropy)
    upstream = torch.randn(logp.shape, generator=generator)
    loss, out = (logp * upstream).sum(), {"logp": logp.detach()}
    if entropy:
        # what the trainer reads of it
        out["entropy"] = output.entropy[:, -A:] * data["action_mask"]
        loss = loss + (out["entropy"] * upstream.flip(1)).sum()
        out["entropy"] = out["entropy"].detach()
    if getattr(output, "aux_loss", None) is not None:
        out["aux_loss"] = output.aux_loss.detach()
        loss = loss + output.aux_loss
    loss.backward()
    for name, parameter in one.named_parameters():
        if parameter.grad is not None:
            out[f"grad {name}"] = parameter.grad.clone()
    return out


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2; NaN counts as far."""
    gap = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12)
    return torch.nan_to_num(gap, nan=torch.inf).item()


def distances(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """One for each name, and one for all gradients together: a bias of keys has a gradient that is
    rounding and nothing else."""
    assert ours.keys() == theirs.keys()
    grads = [name for name in ours if name.startswith("grad ")]
    out = {n: distance(ours[n], theirs[n]) for n in ours if n not in grads}
    whole = [torch.cat([side[n].flatten() for n in grads]) for side in (ours, theirs)]
    return {**out, "gradients": distance(*whole)} if grads else out
