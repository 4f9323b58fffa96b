"""Liger-Kernel: its chunked loss, its Triton loss from logits, and its cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.peers.peer import (
    IGNORED,
    LogitsBatch,
    Peer,
    cuda_only,
    labels,
    no_compiler,
    on_logp,
)


def _liger(case: Case, compiled: bool) -> Callable[[Batch], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    low, high = case.config.ratio_bounds
    loss = LigerFusedLinearGRPOLoss(
        beta=case.beta,
        compiled=compiled,
        use_ref_model=case.beta > 0,
        epsilon_low=1 - low,
        epsilon_high=high - 1,
        loss_type="dapo",
        temperature=1.0,
        use_bias_correction_kl=True,
    )

    def run(batch: Batch) -> Tensor:
        return loss(
            batch.hidden,
            batch.weight,
            batch.ids,
            batch.mask,
            batch.advantages,
            ref_per_token_logps=batch.ref_logp,
            old_per_token_logps=batch.old_logp,
        )[0]

    return run


def _liger_eager(case: Case) -> Callable[[Batch], Tensor]:
    return _liger(case, compiled=False)


def _liger_compiled(case: Case) -> Callable[[Batch], Tensor]:
    return _liger(case, compiled=True)


def _liger_tf32(case: Case) -> Callable[[Batch], Tensor]:
    loss = _liger(case, compiled=False)

    def run(batch: Batch) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        # The gradients are computed here too; backward only hands them over.
        try:
            return loss(batch)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def _liger_logits(case: Case) -> Callable[[LogitsBatch], tuple[Tensor, Tensor]]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    low, high = case.config.ratio_bounds

    def run(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
        leaf = batch.logits.detach().requires_grad_()
        loss, _ = triton_grpo_loss(
            leaf,
            batch.old_logp,
            batch.ref_logp,
            batch.ids,
            batch.advantages,
            batch.mask,
            temperature=1.0,
            beta=case.beta,
            eps_low=1 - low,
            eps_high=high - 1,
            inplace=False,
            loss_type="dapo",
            reduce=True,
            use_bias_correction_kl=True,
        )
        return loss, leaf

    return run


def _liger_grid(case: Case, level: str, device: torch.device) -> str | None:
    if device.type == "cuda" and case.T > 65535:
        return "Its launch grid is (B, T), and CUDA's second dimension ends at 65,535."
    return cuda_only(case, level, device)


def _liger_flce(case: Case) -> Callable[[Batch], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    nll = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="none")

    def run(batch: Batch) -> Tensor:
        flat = batch.hidden.view(-1, batch.hidden.shape[-1])
        return -nll(batch.weight, flat, labels(batch).view(-1)).view_as(batch.ids)

    return run


_LIGER = "LigerFusedLinearGRPOLoss(loss_type='dapo', use_bias_correction_kl=True, chunk_size=1"


CONTESTANTS: tuple[Peer, ...] = (
    Peer("Liger", "liger-kernel", f"{_LIGER}, compiled=False)", {"linear": _liger_eager}),
    Peer(
        "Liger compiled",
        "liger-kernel",
        f"{_LIGER}, compiled=True)",
        {"linear": _liger_compiled},
        no_compiler,
    ),
    Peer(
        "Liger TF32",
        "liger-kernel",
        f"{_LIGER}, compiled=False), its fp32 products in TF32",
        {"linear": _liger_tf32},
        lambda case, level, device: (
            None if device.type == "cuda" else "TF32 is a mode of NVIDIA's tensor cores."
        ),
    ),
    Peer(
        "Liger Triton",
        "liger-kernel",
        "triton_grpo_loss(loss_type='dapo', reduce=True, inplace=False)",
        {"logits": _liger_logits},
        _liger_grid,
    ),
    Peer(
        "Liger FLCE",
        "liger-kernel",
        "LigerFusedLinearCrossEntropyLoss(reduction='none'); loss in torch",
        on_logp(_liger_flce),
        cuda_only,
    ),
)
