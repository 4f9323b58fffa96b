"""What the rows of a chunk add to the gradients of the head: fp32 accumulators, downcast once, and
a narrow dweight where one product gives all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import gemm
from .chunks import ROW_MULTIPLE, LinearHead, Needs
from .held import Held, held_in


def compact(rows: Tensor, keep: Tensor) -> Tensor:
    """rows (n, V)[keep] (k, V) in the memory of rows; keep (k,) rises, so that what is written was
    read."""
    for start in range(0, keep.numel(), ROW_MULTIPLE):
        part = keep[start : start + ROW_MULTIPLE]
        rows[start : start + part.numel()] = rows[part]
    return rows[: keep.numel()]


@dataclass
class HeadGradients:
    """fp32 accumulators of the gradients of a head; one downcast each, at the end. dweight has the
    type of the weight already where `held.held_in` lets all n rows wait for one product."""

    head: LinearHead
    needs: Needs
    n: int
    """Rows that are added at most."""
    main_grad: Tensor | None = None
    """(V, H) fp32 of the caller, to which dweight is added; it is None in the results then."""
    scale: Tensor | None = None
    """Power of two by which the upstream gradient was multiplied to survive fp16, 0-d; None for
    1."""
    dhidden: Tensor | None = None
    """(N, H), or with an adapter (N, H + r), or (N, r) when hidden itself wants none."""
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    dlora_A: Tensor | None = None
    dlora_B: Tensor | None = None
    partial: Tensor | None = None
    """(n, H): what slices of the vocabulary have added up of dhidden."""
    empty: bool = True
    """No chunk was added so far."""
    summed: bool = False
    """dweight holds a product; before, whatever its memory held."""
    held: Held | None = None
    """Rows that wait for their part of dweight."""

    def __post_init__(self) -> None:
        head, dtype = self.head, self.head.dtype
        V, device = head.weight.shape[0], head.hidden.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        if self.needs.hidden or self.needs.lora_A:
            # fp32 until the upstream scalar (a loss scale, say) has been applied: 1 / tokens times
            # a probability is below fp16's smallest number
            columns = head.weight.shape[1] - self._first_column
            self.dhidden = zeros(head.hidden.shape[0], columns)
        if self.needs.weight:
            # fp32 (V, H) whatever the weight is stored in: summed over chunks, downcast once by the
            # caller
            self.dweight = self.main_grad
            # a scaled product cannot be added to what is not scaled
            if self.main_grad is None or self.scale is not None:
                rows = held_in(head, self.n, self.main_grad is not None)
                kind = head.narrow if 0 < self.n <= rows else dtype
                # one chunk needs no room of its own, and what waits no narrow dweight yet
                if rows > head.chunk_rows:
                    self.held = Held(head, rows)
                if self.held is None or kind == dtype:
                    self.dweight = torch.empty(V, head.width, dtype=kind, device=device)
        if self.needs.bias:
            self.dbias = zeros(V)
        if self.needs.lora_A:
            self.dlora_A = zeros(*head.lora.A.shape)
        if self.needs.lora_B:
            self.dlora_B = torch.empty(head.lora.B.shape, dtype=dtype, device=device)

    @property
    def _first_column(self) -> int:
        """Of [W, B] in the product with dlogits: an adapter alone needs that with B."""
        return 0 if self.needs.hidden else self.head.width

    def room(self, logits: Tensor) -> Tensor:
        """Where a row kernel leaves the dlogits of a chunk of logits (1, n, V): over them, or among
        those that wait."""
        if self.held is None:
            return self.head.gradient_view(logits)
        return self.held.room(logits.shape[1])

    def _add_held(self) -> None:
        """The product of the rows that have waited."""
        if self.dweight is None:
            like = self.head.weight
            self.dweight = like.new_empty(like.shape[0], self.head.width)
        if self.held.used:
            dlogits, hidden = self.held.take()
            gemm.weight_gradient(dlogits, hidden, self.dweight, first=not self.summed)
            self.summed = True
            self.held.clear()

    def add(self, hidden: Tensor, dlogits: Tensor, place: Tensor | slice) -> None:
        """Add the products of some rows: hidden (n, H), dlogits (n, V), the rows of hidden."""
        width = self.head.width
        if self.dhidden is not None:
            self._add_dhidden(hidden, dlogits, place)
        if self.held is not None:
            self.held.keep(dlogits.shape[0], place)
            # now, while no logits are in the workspace
            if self.held.rows < self.n and not self.held.fits(self.head.chunk_rows):
                self._add_held()
        elif self.dweight is not None:
            first = not self.summed and self.dweight is not self.main_grad
            gemm.weight_gradient(dlogits, hidden[:, :width], self.dweight, first=first)
            self.summed = True
        if self.dlora_B is not None:
            gemm.weight_gradient(dlogits, hidden[:, width:], self.dlora_B, first=self.empty)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.head.dtype)
        self.empty = False

    def _add_dhidden(self, hidden: Tensor, dlogits: Tensor, place: Tensor | slice) -> None:
        # rows are written once, by one full-width product each
        in_place = isinstance(place, slice)
        shape = (hidden.shape[0], self.dhidden.shape[1])
        out = self.dhidden[place] if in_place else self.dhidden.new_empty(shape)
        gemm.input_gradient(dlogits, self.head.weight[:, self._first_column :], out)
        self._store_dhidden(hidden, out, place, stored=in_place)

    def _store_dhidden(
        self, hidden: Tensor, out: Tensor, place: Tensor | slice, stored: bool = False
    ) -> None:
        if self.scale is not None:
            out.div_(self.scale)
        if not stored:
            self.dhidden[place] = out
        if self.dlora_A is not None:
            width = self.head.width
            du = out[:, width - self._first_column :]
            self.dlora_A.addmm_(du.t(), hidden[:, :width].to(du.dtype), alpha=self.head.lora.scale)

    def add_columns(self, hidden: Tensor, dlogits: Tensor, part: slice) -> None:
        """Add the products of a slice of the vocabulary: dlogits (n, columns) of all n rows."""
        width = self.head.width
        if self.dhidden is not None:
            weight = self.head.weight[part, self._first_column :]
            if self.partial is None:
                self.partial = self.dhidden.new_zeros(hidden.shape[0], weight.shape[1])
            gemm.input_gradient(dlogits, weight, self.partial, first=part.start == 0)
        if self.dweight is not None:
            first = self.dweight is not self.main_grad
            gemm.weight_gradient(dlogits, hidden[:, :width], self.dweight[part], first=first)
            self.summed = True
        if self.dlora_B is not None:
            gemm.weight_gradient(dlogits, hidden[:, width:], self.dlora_B[part], first=True)
        if self.dbias is not None:
            self.dbias[part] = dlogits.sum(0, dtype=self.head.dtype)
        self.empty = False

    def finish_columns(self, hidden: Tensor, place: Tensor | slice) -> None:
        """dhidden (n, H) that slices of the vocabulary added up goes to its rows."""
        if self.partial is not None:
            self._store_dhidden(hidden, self.partial, place)
            self.partial = None

    def finish(self) -> list[Tensor | None]:
        """dhidden, dweight, dbias, dA and dB, with the scale taken out: fp32, but for a dweight of
        one product."""
        if self.held is not None:
            self._add_held()
            self.held = None
        for grad, done in ((self.dweight, self.summed), (self.dlora_B, not self.empty)):
            if not (done or grad is None or grad is self.main_grad):
                grad.zero_()
        if self.scale is not None:
            for grad in (self.dweight, self.dbias, self.dlora_B):
                if grad is not None:
                    grad.div_(self.scale)
        if self.main_grad is not None and self.needs.weight:
            if self.dweight is not self.main_grad:
                self.main_grad.add_(self.dweight)
            self.dweight = None
        if self.head.shard is not None:
            for grad in (self.dhidden, self.dlora_A):
                if grad is not None:
                    self.head.shard.reduce(grad)
        dhidden = self.dhidden if self.needs.hidden else None
        lora = self.head.lora
        if lora is not None and dhidden is not None:
            # from [dh, du] with u = s h A^T: dh + s du A
            dh, du = dhidden.split((self.head.width, lora.A.shape[0]), 1)
            dhidden = torch.addmm(dh, du, lora.A.to(du.dtype), alpha=lora.scale)
        return [dhidden, self.dweight, self.dbias, self.dlora_A, self.dlora_B]


def fp16_scale(dtype: torch.dtype | None, upstream: Tensor) -> Tensor | None:
    """Power of two that lifts the largest |upstream| near 1, for fp16 dlogits; None for other
    types.

    A token's gradient is near 1 / tokens: times a probability it falls below fp16's 6e-8.
    """
    if dtype != torch.float16 or upstream.numel() == 0:
        return None
    peak = upstream.abs().amax()
    usable = torch.isfinite(peak) & (peak > 0)
    return torch.exp2(-torch.floor(torch.log2(torch.where(usable, peak, torch.ones_like(peak)))))
