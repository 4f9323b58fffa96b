"""Groups of completions, models that differ in their attention, and what a forward keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import tiny
from torch import Tensor, nn

from grpo_fast.models.packing import PackedBatch, pack
from grpo_fast.models.policy import attach

# Families whose attention differs: q/k norms, biases, scales, two norms, fused projections, layers
# without positions, one norm for attention and MLP.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Granite": {"logits_scaling": 8.0},
    "Olmo2": {},
    "Phi3": {},
    "SmolLM3": {},
    "Cohere": {"logit_scale": 0.0625},
}


def model(family: str = "Llama", **changes: Any) -> nn.Module:
    """A tiny attached model of a family, in fp32 and train mode."""
    made = tiny(family, **{**FAMILIES.get(family, {}), **changes})
    attach(made)
    return made.train()


def groups(
    prompts: list[int], lengths: list[list[int]], seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts of these lengths, each repeated, and completions of these lengths."""
    draw = torch.Generator().manual_seed(seed)
    token = lambda n: torch.randint(3, 97, (n,), generator=draw).tolist()  # noqa: E731
    given = [token(n) for n in prompts]
    pairs = [(p, token(n)) for p, row in zip(given, lengths, strict=True) for n in row]
    return [p for p, _ in pairs], [c for _, c in pairs]


def separately(
    policy: nn.Module, prompts: list[list[int]], completions: list[list[int]]
) -> list[PackedBatch]:
    """Each sequence alone in a row of its own."""
    pairs = zip(prompts, completions, strict=True)
    return [pack([p], [c], pad_id=0, row_length=None, device="cpu") for p, c in pairs]


def hidden(policy: nn.Module, batches: list[PackedBatch]) -> Tensor:
    """Hidden states (N, H) that predict the completions, one forward for each batch."""
    rows = [policy(**b.inputs(), head_fn=lambda h, head, b=b: b.select(h)) for b in batches]
    return torch.cat(rows)


def gradients(policy: nn.Module, out: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Of every parameter, for an upstream gradient (N, H); the model keeps none."""
    policy.zero_grad()
    out.backward(upstream)
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def kept_for_backward(forward: Callable[[], Any]) -> list[Tensor]:
    """The tensors that autograd keeps of a forward, each storage once, parameters left out."""
    seen: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            seen.setdefault(value.untyped_storage().data_ptr(), value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        out = forward()
    # what is kept lives as long as the graph
    del out
    return list(seen.values())
