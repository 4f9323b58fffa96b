"""grpo_fast itself, with its defaults and with `skip_inactive_forward`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case, tokens
from benchmarks.peers.peer import LogitsBatch, Peer
from grpo_fast import linear_logprob, linear_policy_loss, policy_loss


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


CONTESTANTS: tuple[Peer, ...] = (
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
)
