"""Epochs over one window: in each its completions are dealt onto other micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from grpo_fast.checks import fail
from grpo_fast.models.packing import PackedBatch

from .window import MicroBatch, Window

# what a micro-batch has for each of its tokens
_OF_TOKENS = (
    "advantages",
    "mask",
    "old_logp",
    "ref_logp",
    "rollout_logp",
    "values",
    "returns",
)
Pack = Callable[[list[list[int]], list[list[int]]], PackedBatch]


@dataclass
class DealtBatch(MicroBatch):
    """A micro-batch that can be packed anew.

    Args:
        prompts: token ids of the S prompts; None where the window is not dealt anew.
    """

    prompts: list[list[int]] | None = None


class DealtWindow(Window):
    """A window whose completions are dealt anew onto its micro-batches when an epoch begins.

    The first epoch is as it was sampled. The order of every other one follows from the seed, the
    rank, the number of the window and that of the epoch, so that nothing but the micro-batches has
    to be in a checkpoint. A window of one micro-batch stays as it is.

    Args:
        pack: prompts and completions of a micro-batch -> the packed batch.
        seed: of the run, and of the rank.
    """

    def __init__(
        self, kind: type[DealtBatch], size: int, uses: int, device: Any, *, pack: Pack, seed: str
    ) -> None:
        super().__init__(kind, size, uses, device)
        self.pack, self.seed = pack, seed

    def next(self) -> MicroBatch:
        """The micro-batch of the next micro-step."""
        window, place = divmod(self.served, self.uses)
        epoch, first = divmod(place, self.size)
        if self.size > 1 and epoch and not first:
            sequences = sum(m.packed.cu_seqlens.numel() - 1 for m in self.micro_batches)
            order = list(range(sequences))
            Random(f"{self.seed}:{window}:{epoch}").shuffle(order)
            self.micro_batches = deal(self.micro_batches, order, self.pack)
        return super().next()


def deal(micro_batches: list[DealtBatch], order: list[int], pack: Pack) -> list[DealtBatch]:
    """The same sequences in another order, in micro-batches of the sizes that there are.

    Args:
        micro_batches: with their prompts, and all else of them for each token.
        order: a permutation of all their sequences.
        pack: prompts and completions -> the packed batch.

    Raises:
        ValueError: a micro-batch lacks its prompts, or has something that is not of tokens.
    """
    bounds = [m.packed.cu_seqlens.tolist() for m in micro_batches]
    starts, stops, first = [], [], 0
    for of_batch in bounds:
        for low, high in pairwise(of_batch):
            starts.append(first + low)
            stops.append(first + high)
        first += of_batch[-1]
    ids = [token for m in micro_batches for token in m.packed.ids.tolist()]
    prompts = [prompt for m in micro_batches for prompt in _prompts(m)]
    columns = {name: _joined(name, micro_batches) for name in _OF_TOKENS}
    dealt, begin = [], 0
    for of_batch in bounds:
        chosen = order[begin : begin + len(of_batch) - 1]
        begin += len(chosen)
        places = [t for s in chosen for t in range(starts[s], stops[s])]
        index = torch.tensor(places, dtype=torch.int64, device=micro_batches[0].packed.ids.device)
        own = [prompts[s] for s in chosen]
        dealt.append(
            type(micro_batches[0])(
                packed=pack(own, [ids[starts[s] : stops[s]] for s in chosen]),
                prompts=own,
                **{name: None if c is None else c[index] for name, c in columns.items()},
            )
        )
    return dealt


def _prompts(micro: DealtBatch) -> list[list[int]]:
    known = (*_OF_TOKENS, "packed", "denominator", "prompts")
    for name in (f.name for f in fields(micro) if f.name not in known):
        if getattr(micro, name) is not None:
            fail("reshuffle", f"False with micro-batches that have {name!r}", True)
    if micro.prompts is None:
        hint = "set reshuffle=False, with which the window was made"
        fail("reshuffle", "micro-batches with their prompts", "none", hint)
    return micro.prompts


def _joined(name: str, micro_batches: list[DealtBatch]) -> Tensor | None:
    """One tensor (N,) over all micro-batches; None where none of them has it."""
    parts = [getattr(m, name) for m in micro_batches]
    if all(part is None for part in parts):
        return None
    sizes = [m.packed.ids.numel() for m in micro_batches]
    if name == "mask":
        # None stands for all of a micro-batch
        parts = [
            torch.ones_like(m.packed.ids, dtype=torch.bool) if part is None else part
            for m, part in zip(micro_batches, parts, strict=True)
        ]
    for part, size in zip(parts, sizes, strict=True):
        if part is None or tuple(part.shape) != (size,):
            got = None if part is None else tuple(part.shape)
            fail("reshuffle", f"{name} (N,) = ({size},) in every micro-batch", got)
    return torch.cat(parts)
