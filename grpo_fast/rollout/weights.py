"""The policy's weights as a plain checkpoint, for an engine that loads them from a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from grpo_fast.checks import fail
from grpo_fast.models.head import innermost


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names that the model has without adapters; LoRA layers as weight + s B A.

    The model itself is left as it is: adding an adapter in place and taking it out again would
    round its weights.

    Raises:
        ValueError: an adapter whose layers cannot be added up to plain weights.
    """
    lm = innermost(model)
    merged: dict[str, Tensor] = {}
    for name, module in lm.named_modules():
        base = getattr(module, "base_layer", None)
        if base is None:
            continue
        if not hasattr(module, "get_delta_weight"):
            fail("peft_config", "an adapter that adds to weights, as LoRA", type(module).__name__)
        weight = base.weight.detach()
        for adapter in module.active_adapters:
            if adapter in module.lora_A or adapter in getattr(module, "lora_embedding_A", {}):
                delta = module.get_delta_weight(adapter)
                # in fp32, rounded once
                weight = (weight.float() + delta.float()).to(base.weight.dtype)
        merged[f"{name}.base_layer.weight"] = weight
    out = {}
    for name, value in lm.state_dict().items():
        if any(part.startswith(("lora_", "modules_to_save")) for part in name.split(".")):
            continue
        out[name.replace(".base_layer.", ".")] = merged.get(name, value)
    return out


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the policy into `folder` as safetensors and config.json, as plain transformers would.

    The folder appears whole or not at all.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    innermost(model).save_pretrained(part, state_dict=plain_state(model))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
