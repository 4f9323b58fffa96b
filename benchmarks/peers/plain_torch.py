"""Plain torch: eager, compiled, and its own linear cross-entropy."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.peers.peer import (
    IGNORED,
    LogitsBatch,
    Peer,
    clipped_loss,
    labels,
    no_compiler,
    on_logp,
)


def _eager(function: Callable) -> Callable:
    return function


def _compiled(function: Callable) -> Callable:
    # Every case is a specialization of the same few code objects, and Dynamo keeps 8 of each.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, dynamic=False, fullgraph=True)


def _selected(logits: Tensor, ids: Tensor) -> Tensor:
    """(B, T, V) -> (B, T) log-probs of ids in fp32; the softmax casts, so that no copy does."""
    return F.log_softmax(logits, -1, dtype=torch.float32).gather(-1, ids[..., None])[..., 0]


def _torch_linear(case: Case, mode: Callable) -> Callable[[Batch], Tensor]:
    bounds, beta = case.config.ratio_bounds, case.beta

    def run(batch: Batch) -> Tensor:
        logp = _selected(F.linear(batch.hidden, batch.weight), batch.ids)
        return clipped_loss(logp, batch, bounds, beta)

    return mode(run)


def _torch_logits(case: Case, mode: Callable) -> Callable[[LogitsBatch], tuple[Tensor, Tensor]]:
    bounds, beta = case.config.ratio_bounds, case.beta

    def loss(leaf: Tensor, batch: LogitsBatch) -> Tensor:
        # Padding the ids, as transformers does with labels, saves a copy of logits[:, :-1].
        logp = _selected(leaf, F.pad(batch.ids, (0, 1)))[:, :-1]
        return clipped_loss(logp, batch, bounds, beta)

    loss = mode(loss)

    def run(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
        leaf = batch.logits.detach().requires_grad_()
        return loss(leaf, batch), leaf

    return run


def _torch_logprob(case: Case, mode: Callable) -> Callable[[Batch], Tensor]:
    return mode(lambda batch: _selected(F.linear(batch.hidden, batch.weight), batch.ids))


def _torch(mode: Callable) -> dict[str, Callable[[Case], Callable]]:
    levels = {"linear": _torch_linear, "logits": _torch_logits, "logprob": _torch_logprob}
    return {level: functools.partial(build, mode=mode) for level, build in levels.items()}


def _torch_lce(case: Case) -> Callable[[Batch], Tensor]:
    # Chunks of tokens, as its documentation advises where N >= H and V > H.
    options = torch.nn.LinearCrossEntropyOptions()

    def run(batch: Batch) -> Tensor:
        nll = F.linear_cross_entropy(
            batch.hidden.view(-1, batch.hidden.shape[-1]),
            batch.weight,
            labels(batch).view(-1),
            reduction="none",
            ignore_index=IGNORED,
            options=options,
        )
        return -nll.view_as(batch.ids)

    return run


def _torch_lce_missing(case: Case, level: str, device: torch.device) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 brought it."


CONTESTANTS: tuple[Peer, ...] = (
    Peer(
        "torch",
        "torch",
        "F.linear, log_softmax in fp32, gather, loss; every position, all logits in memory",
        _torch(_eager),
    ),
    Peer(
        "torch.compile",
        "torch",
        "torch.compile(fullgraph=True, dynamic=False) of the lines of `torch`",
        _torch(_compiled),
        no_compiler,
    ),
    Peer(
        "torch LCE",
        "torch",
        "F.linear_cross_entropy(reduction='none', options=LinearCrossEntropyOptions()); loss in"
        " torch",
        on_logp(_torch_lce),
        _torch_lce_missing,
    ),
)
