"""Tiny random language models of real families, in fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FALCON_H1 = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 1,
    "mamba_chunk_size": 8,
    "head_dim": 8,
    "lm_head_multiplier": 0.3,
}

# family -> what its config adds to SHAPE
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 4},
    "Cohere": {"logit_scale": 0.0625},
    "Granite": {"logits_scaling": 8.0},
    "HyperCLOVAX": {"logits_scaling": 3.0, "head_dim": 8},
    "FalconH1": FALCON_H1,
    # The third layer is the first with attention.
    "RecurrentGemma": {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 7.0},
    "Phi": {},
    "GPT2": {"n_positions": 64},
    "MiniCPM3": {
        "dim_model_base": 8,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


# family -> the softcap and the scale of its logits
TRANSFORMS = {
    "Llama": (None, 1.0),
    "Qwen3": (None, 1.0),
    "Gemma2": (5.0, 1.0),
    "Cohere": (None, 0.0625),
    "Granite": (None, 1 / 8),
    "HyperCLOVAX": (None, 3.0),
    "FalconH1": (None, 0.3),
    "RecurrentGemma": (7.0, 1.0),
    "Phi": (None, 1.0),
    "GPT2": (None, 1.0),
    "MiniCPM3": (None, 0.25),
}


def tiny(family: str = "Llama", seed: int = 0, **changes: Any) -> tf.PreTrainedModel:
    """A random model of `family` whose hidden states depend on what attention sees."""
    if not hasattr(tf, f"{family}Config"):
        pytest.skip(f"transformers {tf.__version__} has no {family}")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = getattr(tf, f"{family}Config")(**{**SHAPE, **FAMILIES.get(family, {}), **changes})
    model = getattr(tf, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(config)
    # The usual initialisation is so small that attention hardly shows; a bias would be zero.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "conv" not in name:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif name.endswith("lm_head.bias"):
                parameter.normal_(0, 1)
    torch.random.set_rng_state(state)
    return model.eval()


def lora(model: nn.Module, **options: Any) -> nn.Module:
    """The model with adapters of rank 4 whose B is not zero."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model
