"""Which completions a forward is needed for, and how much of a window the backbone computes.

A completion of advantage 0 adds nothing to a loss without a KL and without an entropy bonus: every
objective is a multiple of the advantage. Nor does one whose tokens are all masked. Both leave the
micro-batch before it is packed; the denominators count them all the same, so that loss and
gradients are what they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.objective import weights
from grpo_fast.rollout.rollouts import Rollouts

from .window import MicroBatch


def _kept(rollouts: Rollouts, whole: bool) -> list[list[bool]]:
    """Whether each token of each completion counts; with `whole` only of those that ended."""
    masks = rollouts.mask or [[True] * len(ids) for ids in rollouts.completion_ids]
    if not whole:
        return masks
    pairs = zip(masks, rollouts.truncated, strict=True)
    return [[kept and not cut for kept in mask] for mask, cut in pairs]


def count_of(rollouts: Rollouts, config: LossConfig, whole: bool) -> Tensor:
    """What all completions of a micro-batch add to the denominator: see `weights.count`.

    Args:
        rollouts: of the micro-batch.
        config: of the loss.
        whole: whether completions that were cut off are masked.
    """
    masks = _kept(rollouts, whole)
    bounds = torch.tensor([0, *map(len, masks)]).cumsum(0)
    mask = torch.tensor([kept for row in masks for kept in row], dtype=torch.bool)
    return weights.count(config, mask, bounds)


def active_part(rollouts: Rollouts, advantages: Tensor, whole: bool) -> tuple[Rollouts, Tensor]:
    """The completions that can have a gradient, and their advantages; those alone need a forward.

    Where there is none, one prompt stays with an empty completion and the advantage 0: a
    micro-batch of one padding token, with which a rank takes part in the forward of the others.

    Args:
        rollouts: of the micro-batch, B completions.
        advantages: (B,). NaN counts as a gradient.
        whole: whether completions that were cut off are masked.
    """
    masks = _kept(rollouts, whole)
    rows = [i for i, mask in enumerate(masks) if advantages[i] != 0 and any(mask)]
    if rows:
        return rollouts.take(rows), advantages[rows]
    nothing = None if rollouts.logp is None else [[]]
    masked = None if rollouts.mask is None else [[]]
    empty = Rollouts(rollouts.prompt_ids[:1], [[]], [False], nothing, masked, rollouts.version)
    return empty, torch.zeros_like(advantages[:1])


def forward_share(rollouts: Rollouts, micro_batches: list[MicroBatch]) -> float:
    """Tokens that the backbone computes in a forward of the window, over those of all sequences.

    Below 1 where prompts are shared or completions without a gradient are left out, above it where
    rows are padded; NaN without any completion token.
    """
    pairs = zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
    whole = sum(len(p) + len(c) - 1 for p, c in pairs if c)
    done = sum(micro.packed.input_ids.numel() for micro in micro_batches)
    return done / whole if whole else float("nan")
