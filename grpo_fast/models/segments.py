"""Sequences end to end in one row, and prompts that several completions share: who sees whom.

A row of T tokens is cut into segments. A token sees its own segment up to itself and, where the
segment has a root, all of the root before that:

    | prompt | completion 1 | completion 2 | whole sequence |       root of 1 and 2: the prompt

So a prompt's tokens are computed once for all completions of its group, and no mask of T x T
numbers is ever made. The layout takes the place of the mask in the model's forward: transformers
asks `mask_of` for a mask, gets the layout, and hands it to the attention function of every layer,
also when gradient checkpointing runs a layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast.checks import fail

_ACTIVE: ContextVar[Segments | None] = ContextVar("grpo_fast_segments", default=None)
# Segments up to this length go into one call whatever they are; a call costs more than the padding.
_SHORT = 32
# Above it a call takes segments of at least this share of its longest, so that of its (n, n)
# products at most half are padding.
_LIKE = 0.75


@dataclass(frozen=True)
class Bin:
    """Segments of like length that one call of attention takes, padded to the longest.

    Args:
        index: (B * n,) int64, the tokens of the row that fill the call, a segment's last one again
            where it is shorter than n. A causal call needs no mask for them: what stands behind a
            segment is seen by none of its tokens.
        shape: (B, n).
        kept: (m,) int64, which of the B * n are tokens and no padding; None: all.
        tokens: (m,) int64, which tokens of the row those are.
        span: (start, stop) where they are one stretch of the row in order, so that nothing has to
            be gathered.
    """

    index: Tensor
    shape: tuple[int, int]
    kept: Tensor | None
    tokens: Tensor
    span: tuple[int, int] | None

    def take(self, values: Tensor) -> Tensor:
        """(T, heads, D) -> (B, heads, n, D)."""
        rows = values[slice(*self.span)] if self.span else values.index_select(0, self.index)
        return rows.unflatten(0, self.shape).transpose(1, 2)

    def put(self, into: Tensor, values: Tensor) -> None:
        """Write the tokens of (B, heads, n, ...) into (T, heads, ...)."""
        rows = values.transpose(1, 2).flatten(0, 1)
        if self.kept is not None:
            rows = rows.index_select(0, self.kept)
        if self.span:
            into[slice(*self.span)] = rows
        else:
            into.index_copy_(0, self.tokens, rows)


class Segments:
    """How one row of T tokens is divided.

    Args:
        table: (K, 3) int64 on the CPU: start and length of every segment in the order of the row,
            without a gap, and the number of its root or -1. The segments of a root follow it
            directly.

    Raises:
        ValueError: the table is not of that kind.
    """

    def __init__(self, table: Tensor) -> None:
        self.rows: list[tuple[int, int, int]] = [tuple(row) for row in table.tolist()]
        stop, parent = 0, -1
        for i, (start, length, root) in enumerate(self.rows):
            parent = i if root < 0 else parent
            if start != stop or length < 1 or root != (-1 if parent == i else parent):
                expected = "segments without gaps, each behind its root"
                fail("segments", expected, f"{self.rows[i]} as row {i}")
            stop += length
        self.tokens = stop
        self._kept: dict[Any, Any] = {}

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, its root's among them."""
        return max(n + (self.rows[root][1] if root >= 0 else 0) for _, n, root in self.rows)

    @property
    def sequences(self) -> int:
        """Sequences of the row: segments to which nothing is rooted."""
        roots = {root for _, _, root in self.rows if root >= 0}
        return len(self.rows) - len(roots)

    @property
    def links(self) -> list[tuple[slice, slice]]:
        """(tokens of all segments of a root, tokens of the root), for every root that has any."""
        spans: dict[int, list[int]] = {}
        for start, length, root in self.rows:
            if root >= 0:
                spans.setdefault(root, [start, start])[1] = start + length
        where = {root: self.rows[root] for root in spans}
        return [
            (slice(*spans[root]), slice(start, start + length))
            for root, (start, length, _) in where.items()
        ]

    def bins(self, device: torch.device) -> list[Bin]:
        """The calls that attention within segments is made of; made once for each device."""
        return self.cached(
            ("bins", device), lambda: [_bin(members, device) for members in self._alike()]
        )

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made for this layout, once."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _alike(self) -> list[list[tuple[int, int]]]:
        by_length = sorted(((s, n) for s, n, _ in self.rows), key=lambda row: -row[1])
        out: list[list[tuple[int, int]]] = []
        for start, length in by_length:
            longest = out[-1][0][1] if out else 0
            if out and (longest <= _SHORT or length >= _LIKE * longest):
                out[-1].append((start, length))
            else:
                out.append([(start, length)])
        # in the order of the row, so that what is one stretch is found to be one
        return [sorted(members) for members in out]

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether tokens `query` see tokens `key`: bool, of their broadcast shape."""
        device = query.device
        lengths = torch.tensor([n for _, n, _ in self.rows], device=device)
        own = torch.arange(len(self.rows), device=device).repeat_interleave(lengths)
        roots = torch.tensor([root for _, _, root in self.rows], device=device)[own]
        same = (own[query] == own[key]) & (key <= query)
        return same | (roots[query] == own[key])


def _bin(members: list[tuple[int, int]], device: torch.device) -> Bin:
    longest = max(n for _, n in members)
    starts = torch.tensor([s for s, _ in members])[:, None]
    lengths = torch.tensor([n for _, n in members])[:, None]
    steps = torch.arange(longest)
    index = (starts + torch.minimum(steps, lengths - 1)).flatten()
    kept = (steps < lengths).flatten()
    whole = bool(kept.all())
    tokens = index[kept]
    stretch = whole and bool((tokens.diff() == 1).all())
    return Bin(
        index=index.to(device),
        shape=(len(members), longest),
        kept=None if whole else kept.nonzero().squeeze(1).to(device),
        tokens=tokens.to(device),
        span=(int(tokens[0]), int(tokens[-1]) + 1) if stretch else None,
    )


@contextmanager
def laid_out(segments: Segments | None) -> Iterator[None]:
    """Let the forwards inside take their row as divided so; None: as transformers reads it."""
    token = _ACTIVE.set(segments)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> Segments | None:
    """The layout of the forward that is running."""
    return _ACTIVE.get()


# What the attention of a family may ask for beside q, k, v and that is not the identity.
_REFUSED = ("softcap", "position_bias", "s_aux", "cache")


def check_call(segments: Segments, query: Tensor, dropout: float, options: dict[str, Any]) -> None:
    """Refuse a call of attention that segments cannot answer.

    Raises:
        ValueError: naming what the model's layer asked for.
    """
    asked = [name for name in _REFUSED if options.get(name) is not None]
    if dropout:
        asked.append(f"dropout={dropout}")
    if options.get("is_causal") is False:
        asked.append("is_causal=False")
    window = options.get("sliding_window")
    if window is not None and segments.longest > window:
        asked.append(f"sliding_window={window} below a sequence of {segments.longest} tokens")
    if asked:
        fail("model", "causal attention alone in a row of segments", ", ".join(asked))
    if query.shape[0] != 1 or query.shape[2] != segments.tokens:
        expected = f"one row of {segments.tokens} tokens, as its segments say"
        fail("input_ids", expected, f"{query.shape[0]} of {query.shape[2]}")
