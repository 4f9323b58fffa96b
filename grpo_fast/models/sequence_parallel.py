"""Ulysses: the tokens of a packed row split over ranks, attention split by heads instead.

Rank w of W holds columns w L / W to (w + 1) L / W of every row. Everything but attention looks at
one token at a time and runs on the slice. Attention exchanges twice, by all-to-all:

    q, k, v   (R, heads, L / W, D)  ->  (R, heads / W, L, D)     whole rows, some of the heads
    out       (R, heads / W, L, D)  ->  (R, heads, L / W, D)

so a row may be split in the middle of a sequence ("DeepSpeed Ulysses: System Optimizations for
Enabling Training of Extreme Long Sequence Transformer Models", 2023). Where a sequence ends is read
from the position_ids of the whole row, which each rank is given.

A loss whose tokens need their own log-prob alone is then the sum of what the ranks have, each with
the denominator of all: sum the gradients over the ranks. Ratios of whole sequences would need the
log-probs of other ranks, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig

from .head import innermost
from .packing import PackedBatch

ATTENTION = "grpo_fast_ulysses"


@dataclass
class _Split:
    """What the attention of every layer needs in the forward that runs now."""

    group: dist.ProcessGroup
    borders: list[list[int]]
    """Of each row, where its sequences begin, and L."""


_NOW: list[_Split] = []


@dataclass(frozen=True)
class Shard:
    """One rank's slice of a `PackedBatch`, and the completion tokens that are predicted there.

    Args:
        input_ids, position_ids: (R, L / W) int64.
        whole_position_ids: (R, L) int64, of the rows before they were split.
        rows: (n,) int64, index into the R * L / W hidden states of this rank.
        ids: (n,) int64, the completion tokens they predict.
        tokens: (n,) int64, their places among the N tokens of the batch: `x[shard.tokens]` is this
            rank's part of any tensor (N,) that a loss takes.
        sequence: (n,) int64, the sequence of each token, for advantages of sequences.
    """

    input_ids: Tensor
    position_ids: Tensor
    whole_position_ids: Tensor
    rows: Tensor
    ids: Tensor
    tokens: Tensor
    sequence: Tensor

    def inputs(self) -> dict[str, Any]:
        """Keywords of the forward, as `PackedBatch.inputs`."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": None,
            "use_cache": False,
        }

    def select(self, hidden: Tensor) -> Tensor:
        """(n, H), the hidden states that predict `ids`, from hidden (R, L / W, H)."""
        return hidden.flatten(0, 1).index_select(0, self.rows)


def split(batch: PackedBatch, rank: int, world: int) -> Shard:
    """This rank's slice of a packed batch; every rank has the whole batch, which is small.

    The width is padded to a multiple of `world` with tokens that go on with the last sequence of a
    row, none of whose tokens looks at what follows it.

    Args:
        batch: from `pack`.
        rank, world: of the sequence-parallel group.

    Raises:
        ValueError: rank is not in [0, world).
    """
    if not 0 <= rank < world:
        fail("rank", f"an integer in [0, {world})", rank)
    R, L = batch.input_ids.shape
    part = -(-L // world)
    more = part * world - L
    ids = nn.functional.pad(batch.input_ids, (0, more))
    further = torch.arange(1, more + 1, device=ids.device)
    positions = torch.cat((batch.position_ids, batch.position_ids[:, -1:] + further), 1)
    row, column = batch.rows // L, batch.rows % L
    tokens = (column // part == rank).nonzero().squeeze(1)
    sequence = torch.repeat_interleave(
        torch.arange(len(batch.cu_seqlens) - 1, device=ids.device), batch.cu_seqlens.diff()
    )
    columns = slice(rank * part, (rank + 1) * part)
    return Shard(
        input_ids=ids[:, columns].contiguous(),
        position_ids=positions[:, columns].contiguous(),
        whole_position_ids=positions,
        rows=row[tokens] * part + column[tokens] % part,
        ids=batch.ids[tokens],
        tokens=tokens,
        sequence=sequence[tokens],
    )


def check_sequence_parallel(
    model: nn.Module, world: int, config: LossConfig | None = None, rollout: bool = False
) -> None:
    """Refuse what a split sequence would make wrong.

    Args:
        model: the model, wrapped or not.
        world: ranks of the sequence-parallel group.
        config: the loss; None: not looked at.
        rollout: whether the sampler's log-probs are given.

    Raises:
        ValueError: `world` does not divide the heads or the key-value heads; a layer has a sliding
            window or no softmax attention; or the loss looks at whole sequences: their ratio, their
            length (sequence_mean), or a correction of them.
    """
    text = innermost(model).config.get_text_config(decoder=True)
    kv = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    for name, heads in (("attention", text.num_attention_heads), ("key-value", kv)):
        if heads % world:
            fail("world", f"a divisor of the {heads} {name} heads", world)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        got = ", ".join(sorted(kinds - {"full_attention"}))
        fail("model", "full attention in every layer", got, "its slices are not whole sequences.")
    if config is None:
        return
    hint = "its tokens lie on several ranks; use a token-level loss."
    if config.level != "token":
        fail("importance_sampling_level", "token with sequence parallelism", config.level, hint)
    if config.weights == "sequence_mean":
        expected = "token_mean, sequence_sum or constant_length with sequence parallelism"
        fail("aggregation", expected, "sequence_mean", "a length is spread over the ranks.")
    if config.top_entropy_quantile < 1.0:
        fail("top_entropy_quantile", "1 with sequence parallelism", config.top_entropy_quantile)
    if config.off_policy_mask_threshold is not None:
        got = config.off_policy_mask_threshold
        fail("off_policy_mask_threshold", "None with sequence parallelism", got, hint)
    if rollout and not config.rollout_correction.startswith("token"):
        got = config.rollout_correction
        fail("rollout_correction", "one of tokens with sequence parallelism", got, hint)


@contextmanager
def sequence_parallel(
    model: nn.Module, whole_position_ids: Tensor, group: dist.ProcessGroup
) -> Iterator[None]:
    """Let the attention of every layer exchange heads for tokens; forward and backward inside.

    Every rank of the group runs the same number of forwards and backwards. With activation
    checkpointing backward has to be inside too, since it runs attention again.

    Args:
        model: the model, wrapped or not.
        whole_position_ids: (R, L), from `split`.
        group: the ranks that share the rows.

    Raises:
        ValueError: see `check_sequence_parallel`.
    """
    check_sequence_parallel(model, dist.get_world_size(group))
    _register()
    config = innermost(model).config.get_text_config(decoder=True)
    before, config._attn_implementation = config._attn_implementation, ATTENTION
    _NOW.append(_Split(group, _borders(whole_position_ids)))
    try:
        yield
    finally:
        _NOW.pop()
        config._attn_implementation = before


def _register() -> None:
    from transformers import AttentionInterface

    # transformers makes no mask for a name without a mask function
    if ATTENTION not in AttentionInterface():
        AttentionInterface.register(ATTENTION, _attention)


def _borders(positions: Tensor) -> list[list[int]]:
    # packed rows start again at 0, which is how transformers finds the borders too
    length = positions.shape[1]
    starts = [(row == 0).nonzero().squeeze(1).tolist() for row in positions]
    return [[*found, length] if found[:1] == [0] else [0, *found, length] for found in starts]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    if not _NOW:
        fail("model", "a forward inside sequence_parallel(...)", "one outside")
    now = _NOW[-1]
    query, key, value = (_exchange(t, 1, 2, now.group) for t in (query, key, value))
    # one call for each sequence, causal and without a mask, whose L x L pairs would be the most
    options = {"dropout_p": dropout, "scale": scaling, "is_causal": True}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    rows = []
    for row, borders in enumerate(now.borders):
        parts = [
            nn.functional.scaled_dot_product_attention(
                *(t[row : row + 1, :, start:stop] for t in (query, key, value)), **options
            )
            for start, stop in zip(borders[:-1], borders[1:], strict=True)
        ]
        rows.append(torch.cat(parts, 2))
    out = torch.cat(rows)
    return _exchange(out, 2, 1, now.group).transpose(1, 2).contiguous(), None


class _AllToAll(torch.autograd.Function):
    """Part i of every rank goes to rank i; the gradient takes the way back."""

    @staticmethod
    def forward(ctx, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(parts)
        dist.all_to_all_single(out, parts, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grad)
        dist.all_to_all_single(out, grad.contiguous(), group=ctx.group)
        return out, None


def _exchange(x: Tensor, scatter: int, gather: int, group: dist.ProcessGroup) -> Tensor:
    """Scatter one dimension over the ranks and gather another."""
    parts = torch.stack(x.chunk(dist.get_world_size(group), scatter)).contiguous()
    return torch.cat(_AllToAll.apply(parts, group).unbind(0), gather)
