"""dlogits that wait for their dweight: the narrow rows of many chunks, and one product of them all.

An fp32 dweight that every chunk adds to is written once, read and written again by every further
chunk, and rounded at the end: 7 passes of 4 V H bytes and one of 6 for 4 chunks. Rows that wait as
bf16 cost 2 bytes a logit, so up to 2H of them take no more memory than that accumulator, 4 V H,
and dweight comes once, rounded once, straight from the fp32 sums of the product. The peak, 6 V H
bytes, is that of an accumulator and its rounded copy; only dhidden is still fp32 then, 2 N H bytes
more, 67 MB beside 3.7 GB at N = 8192, H = 4096, V = 152k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import LinearHead, round_up


def held_rows(n: int, chunk_rows: int, H: int) -> int:
    """Rows that wait together, of n in all.

    0: each chunk adds to an fp32 dweight. n: dweight is one product and is never fp32. Between
    them the groups of a larger batch, which an fp32 dweight adds up: such an accumulator and H rows
    beside it are the 6 V H bytes that it and its rounded copy were at the end.
    """
    if n <= max(chunk_rows, 2 * H):
        return n
    return H if 2 * chunk_rows <= H else 0


def held_in(head: LinearHead, n: int, accumulates: bool) -> int:
    """`held_rows` of a call; 0 where dweight has to be fp32.

    accumulates: it is added to the caller's main_grad. fp16 rows have a scale that the sums take
    out, and under autocast the gradient of an fp32 weight stays fp32.
    """
    if accumulates or head.narrow != torch.bfloat16 or head.stored != head.narrow:
        return 0
    return held_rows(n, head.chunk_rows, head.width)


class Held:
    """A buffer of `rows` narrow dlogits (rows, V), filled by one chunk after the other."""

    def __init__(self, head: LinearHead, rows: int) -> None:
        self.head, self.rows, self.columns = head, rows, head.weight.shape[0]
        shape = (rows, round_up(self.columns))
        self.buffer = torch.empty(shape, dtype=head.narrow, device=head.hidden.device)
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.used = 0
        self.places: list[Tensor | slice] = []

    def fits(self, rows: int) -> bool:
        """Whether a chunk of so many rows finds room."""
        return self.used + rows <= self.rows

    def room(self, rows: int) -> Tensor:
        """(1, rows, V): where the next chunk leaves its dlogits."""
        return self.buffer[None, self.used : self.used + rows, : self.columns]

    def keep(self, rows: int, place: Tensor | slice) -> None:
        """The first `rows` of that room are those of hidden at `place`."""
        self.used += rows
        self.places.append(place)

    def take(self) -> tuple[Tensor, Tensor]:
        """dlogits (used, V) and their hidden states (used, H), until the next `clear`.

        The hidden states are put together in the workspace, whose logits have been used.
        """
        head, start = self.head, 0
        size = self.used * head.width * head.hidden.element_size()
        hidden = head.scratch(size).view(head.hidden.dtype).view(self.used, head.width)
        for place in self.places:
            rows = head.hidden[place, : head.width]
            part = hidden[start : start + rows.shape[0]]
            part.copy_(rows)
            if head.mask is not None:
                part.masked_fill_(~head.mask[place][:, None], 0.0)
            start += rows.shape[0]
        return self.buffer[: self.used, : self.columns], hidden
