"""cut-cross-entropy: its kernels with and without the filter, and its torch version."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.peers.peer import IGNORED, Peer, cuda_only, labels, no_compiler, on_logp


def _cce(**options: object) -> Callable[[Case], Callable[[Batch], Tensor]]:
    def build(case: Case) -> Callable[[Batch], Tensor]:
        from cut_cross_entropy import linear_cross_entropy

        def run(batch: Batch) -> Tensor:
            # It drops the rows with ignored labels itself.
            return -linear_cross_entropy(
                batch.hidden,
                batch.weight,
                labels(batch),
                ignore_index=IGNORED,
                reduction="none",
                **options,
            )

        return run

    return build


def _cce_kernels(case: Case, level: str, device: torch.device) -> str | None:
    if device.type == "cuda" and case.dtype == torch.float32:
        return "Its backward kernel takes bf16 or fp16 hidden states, and these are fp32."
    return cuda_only(case, level, device)


CONTESTANTS: tuple[Peer, ...] = (
    Peer(
        "CCE",
        "cut-cross-entropy",
        "linear_cross_entropy(impl='cce', reduction='none'), its filter on; loss in torch",
        on_logp(_cce(impl="cce")),
        _cce_kernels,
    ),
    Peer(
        "CCE exact",
        "cut-cross-entropy",
        "linear_cross_entropy(impl='cce', filter_eps=None, reduction='none'); loss in torch",
        on_logp(_cce(impl="cce", filter_eps=None)),
        _cce_kernels,
    ),
    Peer(
        "CCE torch",
        "cut-cross-entropy",
        "linear_cross_entropy(impl='torch_compile', reduction='none'); loss in torch",
        on_logp(_cce(impl="torch_compile")),
        no_compiler,
    ),
)
