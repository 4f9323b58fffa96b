"""All contestants: grpo_fast, plain torch, and the other libraries of peers_packages.py.

Nothing of another library is imported before its contestant is built. One that cannot run stays
in `PEERS`, and `reason` says in a sentence why.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Batch, Case, tokens
from benchmarks.peers.liger import PACKAGES
from benchmarks.peers.peer import (
    IGNORED,
    LogitsBatch,
    Peer,
    clipped_loss,
    labels,
    no_compiler,
    on_logp,
    torch_loss,
)
from grpo_fast import __version__, linear_logprob, linear_policy_loss, policy_loss

__all__ = ["PEERS", "LogitsBatch", "Peer", "reason", "torch_loss", "version"]


def _ours_linear(case: Case, skip: bool = False) -> Callable[[Batch], Tensor]:
    config = case.config

    def run(batch: Batch) -> Tensor:
        given = {"mask": batch.mask, "old_logp": batch.old_logp, "ref_logp": batch.ref_logp}
        return linear_policy_loss(
            batch.hidden,
            batch.weight,
            batch.ids,
            batch.advantages,
            config=config,
            skip_inactive_forward=skip,
            **given,
        )[0]

    return run


def _nothing_to_skip(case: Case, level: str, device: torch.device) -> str | None:
    every, active = tokens(case)
    if case.beta or every == active:
        return "Every row of this case has a gradient: there is none to skip."
    return None


def _ours_logits(case: Case) -> Callable[[LogitsBatch], tuple[Tensor, Tensor]]:
    config = case.config

    def run(batch: LogitsBatch) -> tuple[Tensor, Tensor]:
        leaf = batch.logits[:, :-1].detach().requires_grad_()
        given = {"mask": batch.mask, "old_logp": batch.old_logp, "ref_logp": batch.ref_logp}
        loss, _ = policy_loss(leaf, batch.ids, batch.advantages, config=config, **given)
        return loss, leaf

    return run


def _ours_logprob(case: Case) -> Callable[[Batch], Tensor]:
    return lambda batch: linear_logprob(batch.hidden, batch.weight, batch.ids, mask=batch.mask).logp


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


PEERS: tuple[Peer, ...] = (
    Peer(
        "grpo_fast",
        "grpo_fast",
        "linear_policy_loss, policy_loss (not in place), linear_logprob; defaults",
        {"linear": _ours_linear, "logits": _ours_logits, "logprob": _ours_logprob},
    ),
    Peer(
        "grpo_fast, active rows",
        "grpo_fast",
        "linear_policy_loss(skip_inactive_forward=True): no metrics of rows that cannot contribute",
        {"linear": functools.partial(_ours_linear, skip=True)},
        _nothing_to_skip,
    ),
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
    *PACKAGES,
)


def reason(peer: Peer, case: Case, level: str, device: torch.device | str) -> str | None:
    """Why `peer` cannot run this, in a sentence; None when it can."""
    if level not in peer.build:
        return f"{peer.name} offers nothing for the level {level!r}."
    refusal = peer.refuses(case, level, torch.device(device))
    if refusal is not None:
        return refusal
    try:
        peer.build[level](case)
    # The boundary to packages that are optional: a missing one is a line in a table, no failure.
    except ImportError as error:
        return f"{peer.package} cannot be imported: {str(error).rstrip('.')}."
    return None


def version(peer: Peer) -> str | None:
    """The installed version of the contestant's package, None when there is none."""
    # A checkout on the path has no metadata.
    if peer.package == "grpo_fast":
        return __version__
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return None
