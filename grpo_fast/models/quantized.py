"""A base model whose linear layers are packed, for an adapter to be trained over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grpo_fast.checks import ArgumentError, fail

QUANTIZATIONS = ("nf4", "int8")


def quantization_config(kind: str, compute_dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes as `quantization_config`.

    `nf4` is 4-bit NormalFloat with double quantization, 0.516 bytes a weight, of "QLoRA: Efficient
    Finetuning of Quantized LLMs" (2023), by bitsandbytes. `int8` is weight-only int8, one byte a
    weight and a scale a row, by torchao: products run in the dtype of the activations, so that
    equal inputs give equal bits. LLM.int8 (bitsandbytes' load_in_8bit) is not offered, see
    `settle_quantized`.

    Args:
        kind: "nf4" or "int8".
        compute_dtype: of the unpacked weights and so of the products.

    Raises:
        ValueError: another kind, or the package is not installed.
    """
    if kind not in QUANTIZATIONS:
        fail("quantization", f"one of {', '.join(QUANTIZATIONS)}", repr(kind))
    if kind == "nf4":
        _require("bitsandbytes", kind)
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    _require("torchao", kind)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def _require(package: str, kind: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        hint = f"pip install {package}."
        raise ArgumentError("quantization", f"{package} for {kind}", "no such package", hint)


def settle_quantized(model: nn.Module, adapter: bool) -> None:
    """Make packed layers compute the same in training as without a gradient, or refuse them.

    On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit weights at the first forward in eval mode,
    with their scales rounded to bf16, and multiplies by other code from then on: old and reference
    log-probs would not be those of the policy that trains. That is switched off here. LLM.int8
    cannot be settled: on a CPU its activations are int8 in eval mode and not in training (ratios
    off 1 by up to 3 % and a KL of 2e-4 at equal weights), and on a GPU it looks for outliers in
    all rows of a batch together, so that a token's log-prob depends on what else is in the batch.

    Args:
        model: the policy, wrapped or not.
        adapter: whether an adapter is trained over it.

    Raises:
        ValueError: its weights are packed and there is no adapter; it is an LLM.int8 model; or a
            forward has repacked its 4-bit weights already.
    """
    kinds = {type(m).__name__ for m in model.modules()}
    if "Linear8bitLt" in kinds:
        hint = "load it as nf4, or as int8 of torchao (quantization='int8')."
        expected = (
            "weights whose products do not depend on the other rows of a batch or on whether a "
            "gradient is wanted"
        )
        fail("model", expected, "LLM.int8 (bitsandbytes load_in_8bit)", hint)
    packed = getattr(model, "hf_quantizer", None) is not None or "Linear4bit" in kinds
    if packed and not adapter:
        hint = "give a peft_config (lora_r on the command line)."
        fail("model", "an adapter over packed weights, which cannot be trained", "none", hint)
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            hint = "load it again, and run nothing before the trainer has it."
            got = "weights that a forward has repacked, with scales in bf16"
            fail("model", "4-bit weights as they were loaded", got, hint)
        module.support_avx512bf16_for_cpu = False
