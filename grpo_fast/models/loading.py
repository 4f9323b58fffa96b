"""Loading a causal language model and its tokenizer, from a hub name, a folder or a GGUF file."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from grpo_fast.checks import fail


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


def config_of(model: Any, init_kwargs: dict[str, Any] | None) -> Any:
    """The configuration of a model, or of a name or folder of which no weight is loaded.

    Args:
        init_kwargs: arguments of `load_policy`, of which those that find the file are looked at.
    """
    if not isinstance(model, str):
        return model.config
    found_by = ("gguf_file", "revision", "trust_remote_code", "subfolder")
    given = {name: v for name, v in (init_kwargs or {}).items() if name in found_by}
    return AutoConfig.from_pretrained(model, **given)


# keywords of from_pretrained that say which files are read, and whether their code is run
_SOURCE = (
    *("revision", "code_revision", "trust_remote_code", "token", "cache_dir"),
    *("local_files_only", "force_download", "proxies"),
)


def tokenizer_kwargs(config: Any = None, init_kwargs: dict[str, Any] | None = None) -> dict:
    """Keywords of from_pretrained with which a tokenizer is that of its model.

    Args:
        config: of a model that is loaded; the commit it came from is the revision.
        init_kwargs: those that the model was or will be loaded with, which win.
    """
    commit = getattr(config, "_commit_hash", None)
    known = {} if commit is None else {"revision": commit}
    return {**known, **{k: v for k, v in (init_kwargs or {}).items() if k in _SOURCE}}


def load_processing(
    name_or_path: str, gguf_file: str | None = None, **source: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with padding on the left and a pad token (the EOS when it has none).

    Args:
        name_or_path: a hub name or a folder.
        gguf_file: a GGUF file in that place.
        source: see `tokenizer_kwargs`.

    Raises:
        ValueError: the tokenizer has neither a pad token nor an EOS token.
    """
    extra = source if gguf_file is None else {"gguf_file": gguf_file, **source}
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left", **extra)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            expected = "a tokenizer with a padding or an EOS token"
            fail("name_or_path", expected, f"{name_or_path}, which has neither")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
