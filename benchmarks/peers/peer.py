"""What a contestant is, and the loss over log-probs that those get who have none of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case

IGNORED = -100


class LogitsBatch(NamedTuple):
    """What every contestant of the level "logits" is given, and none writes to."""

    logits: Tensor
    """(B, T + 1, V) contiguous, no grad; the last position predicts nothing, as a model's does."""
    ids: Tensor
    mask: Tensor
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None


def never(case: Case, level: str, device: torch.device) -> str | None:
    """Refuses nothing."""
    return None


def no_compiler(case: Case, level: str, device: torch.device) -> str | None:
    """Refuses a CPU without the C++ compiler that torch.compile needs there."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(name) for name in names):
        return f"torch.compile needs a C++ compiler on a CPU, and there is no {' or '.join(names)}."
    return None


def cuda_only(case: Case, level: str, device: torch.device) -> str | None:
    """Refuses every device but a GPU."""
    return None if device.type == "cuda" else "Its kernels are Triton and need a GPU."


def unavailable(case: Case) -> Callable:
    """Stands for a function that `Peer.refuses` never lets anyone build."""
    raise NotImplementedError("listed with its reason only")


@dataclass(frozen=True)
class Peer:
    """A contestant: its name in tables, and for each level how a function is made of it.

    "linear": fn(Batch) -> 0-d loss whose backward fills hidden.grad and, if trainable, weight.grad.
    "logits": fn(LogitsBatch) -> (0-d loss, leaf); leaf.grad[:, :T] is dlogits after backward.
    "logprob": fn(Batch) -> differentiable log-probs (B, T), or (N,) of the unmasked in order.
    """

    name: str
    package: str
    """Distribution whose version is recorded."""
    what: str
    """The function that is called, and its options."""
    build: dict[str, Callable[[Case], Callable]]
    """By level; raises ImportError where the package is missing."""
    refuses: Callable[[Case, str, torch.device], str | None] = never
    """A sentence about why this case, level or device is impossible, or None. Imports nothing."""


def torch_loss(logp: Tensor, batch: Batch | LogitsBatch, case: Case) -> Tensor:
    """The dapo loss over log-probs: the same lines for every contestant without a loss of its own.

    Args:
        logp: (B, T), finite where masked, or (N,) of the unmasked tokens in order.
    """
    return clipped_loss(logp, batch, case.config.ratio_bounds, case.beta)


def clipped_loss(
    logp: Tensor, batch: Batch | LogitsBatch, bounds: tuple[float, float], beta: float
) -> Tensor:
    """`torch_loss` by its numbers: clipped ratio, k3 weighted by the ratio, mean over tokens."""
    advantages, old, ref = batch.advantages[:, None], batch.old_logp, batch.ref_logp
    if logp.dim() == 1:
        tokens = batch.mask.nonzero(as_tuple=True)
        advantages = advantages.expand_as(batch.ids)[tokens]
        old, ref = (None if x is None else x[tokens] for x in (old, ref))
    ratio = torch.exp(logp - (logp.detach() if old is None else old))
    loss = -torch.minimum(ratio * advantages, ratio.clamp(*bounds) * advantages)
    if beta:
        gap = ref - logp
        loss = loss + beta * ratio * (gap.exp() - gap - 1)
    if logp.dim() == 2:
        loss = loss * batch.mask
    return loss.sum() / batch.mask.sum()


def labels(batch: Batch) -> Tensor:
    """(B, T) ids with -100 where masked, the form in which most libraries take a mask."""
    return batch.ids.masked_fill(~batch.mask, IGNORED)


def on_logp(build_logp: Callable[[Case], Callable]) -> dict[str, Callable[[Case], Callable]]:
    """Levels of a library that gives log-probs of Batch: the loss over them is `torch_loss`."""

    def linear(case: Case) -> Callable[[Batch], Tensor]:
        logp = build_logp(case)
        return lambda batch: torch_loss(logp(batch), batch, case)

    return {"linear": linear, "logprob": build_logp}
