"""An lm_head in float32 under a model in half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.checks import fail

from .head import innermost


def _widen(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(module.weight.dtype), *args[1:])


class _Narrow:
    """Embeddings of a tied weight in the dtype of the layers. A class, so that deepcopy and pickle
    know what it is."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(self.dtype)


def cast_head_to_fp32(model: nn.Module) -> None:
    """Hold the weight of the lm_head in float32, and compute its products in float32.

    The hidden states are widened before the head. With tied embeddings the shared weight is
    float32, and what the embedding returns is rounded to the dtype that the layers had, so that
    they compute as before. Nothing happens to a head in float32.

    Raises:
        ValueError: the head is quantised, or carries an adapter.

    Source: The Art of Scaling Reinforcement Learning Compute for LLMs (2025).
    """
    lm = innermost(model)
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        expected = "False for a head that is no plain linear layer"
        fail("cast_lm_head_to_fp32", expected, type(head).__name__)
    before = head.weight.dtype
    if before == torch.float32:
        return
    tied = embedding.weight is head.weight
    head.float()
    if tied:
        embedding.weight = head.weight
        embedding.register_forward_hook(_Narrow(before))
    head.register_forward_pre_hook(_widen)
