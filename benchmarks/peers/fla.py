"""flash-linear-attention: its GRPO loss from logits; its cross-entropy cannot take part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.peers.peer import LogitsBatch, Peer, cuda_only, unavailable


def _fla_logits(case: Case) -> Callable[[LogitsBatch], tuple[Tensor, Tensor]]:
    from fla.modules.grpo import fused_grpo_loss

    def run(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
        leaf = batch.logits.detach().requires_grad_()
        # Its kernel reads reference log-probs even where beta is 0.
        ref = torch.zeros_like(batch.ids, dtype=torch.float32)
        loss = fused_grpo_loss(
            leaf, ref, batch.ids, batch.advantages, beta=0.0, completion_mask=batch.mask
        )
        return loss.sum() / batch.mask.sum(), leaf

    return run


def _fla_limits(case: Case, level: str, device: torch.device) -> str | None:
    if device.type == "cuda" and case.old:
        return "It is on-policy only: it has neither a ratio nor a clip."
    if device.type == "cuda" and case.beta:
        return "Its KL is not weighted by the ratio, as the KL of this case is."
    return cuda_only(case, level, device)


def _fla_scalar(case: Case, level: str, device: torch.device) -> str | None:
    return "It returns one mean or sum over all tokens, so that none can have its own advantage."


CONTESTANTS: tuple[Peer, ...] = (
    Peer(
        "fla",
        "fla-core",
        "fused_grpo_loss(beta=0, inplace=False)",
        {"logits": _fla_logits},
        _fla_limits,
    ),
    Peer(
        "fla CE",
        "fla-core",
        "fused_linear_cross_entropy_loss",
        {"linear": unavailable, "logprob": unavailable},
        _fla_scalar,
    ),
)
