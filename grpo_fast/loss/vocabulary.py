"""The policy loss over data-parallel ranks that split the vocabulary between them.

Each rank has tokens of its own and some rows of the lm_head, which never leave it: hidden states
(N, H) of all ranks are gathered, each rank computes its rows' part for everyone, and dhidden is
reduce-scattered. Nothing of the size V x H is held whole or moved:

    moved     N H gathered in forward and N H reduce-scattered, against V H and V H
    computed  N rows times V / W columns on each rank: 6NHV in all, as before
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.checks import FLOATS, fail, no_double_backward
from grpo_fast.config import LossConfig
from grpo_fast.engine.head import Head
from grpo_fast.engine.logprob import LogProbs, linear_logprob

from .linear import linear_policy_loss

# in the order in which they travel; the presence of each is compared before anything is gathered
_PER_TOKEN = ("mask", "old_logp", "ref_logp", "rollout_logp")


@dataclass(frozen=True)
class Everyone:
    """How many tokens and sequences each rank of a group has."""

    group: dist.ProcessGroup
    tokens: tuple[int, ...]
    sequences: tuple[int, ...]

    @property
    def rank(self) -> int:
        """This process among them."""
        return dist.get_rank(self.group)

    @property
    def own(self) -> slice:
        """The tokens of this rank among those of all."""
        first = sum(self.tokens[: self.rank])
        return slice(first, first + self.tokens[self.rank])

    def gather(self, value: Tensor, counts: tuple[int, ...] | None = None) -> Tensor:
        """(n of this rank, ...) -> (sum of n, ...), in the order of the ranks; no gradient.

        Args:
            counts: n of each rank; None: their tokens.
        """
        counts = self.tokens if counts is None else counts
        padded = value.new_zeros(max(counts), *value.shape[1:])
        padded[: value.shape[0]] = value.detach()
        parts = padded.new_empty(len(counts), *padded.shape)
        dist.all_gather(list(parts.unbind(0)), padded, group=self.group)
        if len(set(counts)) == 1:
            return parts.flatten(0, 1)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class _GatherHidden(torch.autograd.Function):
    """hidden (N_r, H) of each rank -> (N, H) of all; back goes the rank's own slice, `factor` times
    it. The slice is complete: the loss has summed dhidden over the ranks."""

    @staticmethod
    def forward(ctx, hidden, everyone, factor):
        ctx.own, ctx.factor = everyone.own, factor
        return everyone.gather(hidden)

    @staticmethod
    @no_double_backward
    def backward(ctx, grad):
        return grad[ctx.own] * ctx.factor, None, None


def _agree(group: dist.ProcessGroup, facts: dict[str, int], device: torch.device) -> list[list]:
    """The facts of every rank, the same but for the first two (counts of tokens, sequences)."""
    if not isinstance(group, dist.ProcessGroup):
        fail("group", "a torch.distributed.ProcessGroup that this process is in", repr(group))
    own = torch.tensor(list(facts.values()), device=device)
    table = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(table.unbind(0)), own, group=group)
    seen = table.tolist()
    for place, name in list(enumerate(facts))[2:]:
        for rank, row in enumerate(seen):
            if row[place] != seen[0][place]:
                got = f"{seen[0][place]} on rank 0 and {row[place]} on rank {rank}"
                fail(name.split()[0], f"the same {name} on every rank of the group", got)
    return seen


def _everyone(
    group: dist.ProcessGroup, hidden: Tensor, ids: Tensor, cu_seqlens: Tensor | None, **given: Any
) -> Everyone:
    # a rank that raised alone would leave the others waiting: all facts are compared first
    packed = hidden.dim() == 2 and ids.shape == hidden.shape[:1]
    facts = {
        "tokens": hidden.shape[0] if hidden.dim() else 0,
        "sequences": 0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        "hidden shape": int(packed),
        "hidden width": hidden.shape[-1] if hidden.dim() else 0,
        "hidden dtype": FLOATS.index(hidden.dtype) if hidden.dtype in FLOATS else -1,
    }
    for name, value in given.items():
        whole = isinstance(value, Tensor) and value.shape == ids.shape
        facts[f"{name} shape"] = 0 if value is None else 1 if whole else 2
    seen = _agree(group, facts, hidden.device)
    if not packed:
        got = f"{tuple(hidden.shape)} and {tuple(ids.shape)}"
        fail("hidden", "packed (N, H) with ids (N,)", got, "pack a batch with hidden[mask]")
    for name, value in given.items():
        if name in _PER_TOKEN and facts[f"{name} shape"] == 2:
            fail(name, f"None or shaped like ids, {tuple(ids.shape)}", tuple(value.shape))
    return Everyone(group, tuple(row[0] for row in seen), tuple(row[1] for row in seen))


def _of(head: Tensor | Head, group: dist.ProcessGroup, rows: tuple[int, ...] | None) -> Head:
    head = head if isinstance(head, Head) else Head(head)
    if head.tp_group is not None and head.tp_group is not group:
        fail("weight", "a Head without a tp_group of its own", "another group")
    return replace(head, tp_group=group, tp_tokens=rows)


def sharded_policy_loss(
    hidden: Tensor,
    weight: Tensor | Head,
    ids: Tensor,
    advantages: Tensor,
    *,
    group: dist.ProcessGroup,
    cu_seqlens: Tensor,
    config: LossConfig | None = None,
    averaged: bool = True,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all ranks' tokens, with the lm_head split over the same ranks by the vocabulary.

        loss = linear_policy_loss(cat(hidden of all ranks), cat(weight of all ranks), ...)

    to rounding, and the same number on every rank. Ranks may hold unequally many tokens (none,
    too) and rows. No rank holds more of the head than its rows, their gradient and the logits of a
    chunk of tokens for its rows. Deterministic.

    Args:
        hidden: (N_r, H), this rank's tokens, packed.
        weight: (V_r, H), this rank's rows in the order of the ranks, a DTensor Shard(0) over the
            group too; or a `Head` of them, whose bias and adapter's B are this rank's rows too.
        ids: (N_r,) in [0, V). advantages: (S_r,) or (N_r,).
        group: the ranks; every one of them makes the call.
        cu_seqlens: (S_r+1,) boundaries of this rank's sequences.
        config: as for `linear_policy_loss`.
        averaged: the engine averages gradients over the ranks (DDP, FSDP2, ZeRO): the gradient of
            hidden is then W times its own, so that the average is right. The gradient of the
            weight is complete, and nobody may average or divide it again. An adapter's A has the
            same, complete gradient on every rank.
        options: `mask`, `old_logp`, `ref_logp`, `rollout_logp` of this rank's tokens, (N_r,), and
            `denominator`, the count over all ranks, not divided by their number; None: that of
            this call. `workspace_bytes`, `per_token` (whose terms are those of all ranks).

    Returns:
        As `linear_policy_loss`: loss 0-d fp32, and metrics over the tokens of all ranks.

    Raises:
        ValueError: an argument of the wrong shape or range, or another kind of it on another rank;
            on every rank.
    """
    known = {*_PER_TOKEN, "denominator", "workspace_bytes", "per_token"}
    if foreign := sorted(set(options) - known):
        fail(foreign[0], f"one of {', '.join(sorted(known))}", "another option")
    given = {name: options.pop(name, None) for name in _PER_TOKEN}
    everyone = _everyone(group, hidden, ids, cu_seqlens, advantages=advantages, **given)
    tensors = _gathered(everyone, ids, given)
    sequences = advantages.numel() == cu_seqlens.numel() - 1
    counts = everyone.sequences if sequences else everyone.tokens
    bounds = _bounds(everyone, cu_seqlens)
    factor = float(len(everyone.tokens)) if averaged else 1.0
    return linear_policy_loss(
        _GatherHidden.apply(hidden, everyone, factor),
        _of(weight, group, everyone.tokens),
        tensors.pop("ids"),
        everyone.gather(advantages, counts),
        config=config,
        cu_seqlens=bounds,
        **tensors,
        **options,
    )


def _gathered(
    everyone: Everyone, ids: Tensor, given: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """ids and what stands beside them, of all ranks: one collective. float64 holds every id, every
    fp32 log-prob and every flag."""
    there = {"ids": ids, **{name: t for name, t in given.items() if t is not None}}
    together = torch.stack([t.detach().double() for t in there.values()], dim=1)  # (N_r, K)
    columns = everyone.gather(together).unbind(1)
    return {
        name: column.contiguous().to(torch.bool if name == "mask" else there[name].dtype)
        for name, column in zip(there, columns, strict=True)
    }


def _bounds(everyone: Everyone, cu_seqlens: Tensor) -> Tensor:
    lengths = everyone.gather(cu_seqlens.to(torch.int64).diff(), everyone.sequences)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


@torch.no_grad()
def sharded_logprob(
    hidden: Tensor,
    weight: Tensor | Head,
    ids: Tensor,
    *,
    group: dist.ProcessGroup,
    mask: Tensor | None = None,
    **options: Any,
) -> LogProbs:
    """Log-probs of this rank's tokens, with the lm_head split over the ranks; no gradients.

    `linear_logprob(hidden, cat(weight of all ranks), ids)`, bit for bit the same as computed by any
    other rank for the same token.

    Args:
        hidden, weight, ids, group: see `sharded_policy_loss`.
        mask: (N_r,), non-zero where a token counts.
        options: `temperature`, `entropy`, `workspace_bytes` of `linear_logprob`.

    Returns:
        LogProbs of (N_r,) each, on the rank that has the tokens.

    Raises:
        ValueError: as `sharded_policy_loss`.
    """
    everyone = _everyone(group, hidden, ids, None, mask=mask)
    tensors = _gathered(everyone, ids, {"mask": mask})
    head = _of(weight, group, None)
    out = linear_logprob(everyone.gather(hidden), head, tensors.pop("ids"), **tensors, **options)
    return LogProbs(*(None if t is None else t[everyone.own] for t in out))
