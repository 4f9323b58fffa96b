"""Named shapes, and batches of them with peaked logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """N scored tokens of a model with hidden size H and vocabulary V."""

    name: str
    N: int
    V: int
    H: int
    active: float
    """Share of the tokens whose advantage is not 0."""


CPU_CASES = (
    Case("smollm2-all-active", 512, 49152, 576, 1.0),
    Case("smollm2-half-active", 512, 49152, 576, 0.5),
    Case("smollm2-tenth-active", 512, 49152, 576, 0.1),
)


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), ids (N,), advantages (N,).

    Hidden states point at their target with a strength drawn so that half of the tokens are near
    certain: random logits would flatter whoever skips small probabilities.
    """
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(case.V, case.H, generator=g) / case.H**0.5
    ids = torch.randint(case.V, (case.N,), generator=g)
    lead = 24 * torch.rand(case.N, 1, generator=g)
    hidden = lead * weight[ids] + torch.randn(case.N, case.H, generator=g)
    advantages = torch.randn(case.N, generator=g)
    advantages[torch.rand(case.N, generator=g) >= case.active] = 0.0
    return hidden, weight, ids, advantages
