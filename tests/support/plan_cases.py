"""Configs that the planner is asked about, and what their layers keep by a formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# the public config of Qwen3-8B, as far as memory depends on it
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
}
# its parameters by hand: table and head, and in each layer q, o, k, v, the MLP and four norms
QWEN3_8B_PARAMETERS = (
    2 * 151936 * 4096
    + 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
    + 4096
)


def written(folder: Path, config: dict[str, Any]) -> str:
    """The config as a folder that a planner can be given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def kept_by_formula(config: Any, dtype: str) -> float:
    """Bytes a token and layer that backward needs: docs/memory.md, with every small term.

    A norm keeps its input, what it normalised and 1 / rms; q and k norms of Qwen3 do so for each
    head; each product keeps its input, SiLU and the gate's product theirs; attention q, k, v, its
    output and a log-sum-exp.
    """
    H, width = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    D = getattr(config, "head_dim", None) or H // heads
    Q, KV = heads * D, kv * D
    normed = config.model_type == "qwen3"
    if dtype == "fp32":
        small = 4 * heads + 2 * 4 + (4 * (heads + kv) if normed else 0)
        return 24 * H + 16 * width + (16 if normed else 8) * (Q + KV) + small
    small = 4 * heads + 2 * 4 + (4 * (heads + kv) if normed else 0)
    return 16 * H + 8 * width + (10 if normed else 4) * (Q + KV) + small
