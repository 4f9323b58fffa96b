"""A padded or packed batch as rows (N,), and which of them are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.checks import check_boundaries, check_tensor, describe, fail, is_number


def check_temperature(
    temperature: float | Tensor | None, shape: tuple[int, ...], mask: Tensor
) -> tuple[float, Tensor | None]:
    """One temperature, and 1 / temperature (N,) of each token where they were given as a tensor.

    A tensor is (B,) or of `shape`; it is not looked at on an accelerator, nor where masked.
    """
    expected = f"a finite number > 0, or a tensor {shape[:1]} or {shape} of them"
    if not isinstance(temperature, Tensor):
        if not is_number(temperature) or not (0 < temperature < float("inf")):
            fail("temperature", expected, repr(temperature))
        return float(temperature), None
    if len(shape) == 2 and temperature.shape == shape[:1]:
        temperature = temperature[:, None].expand(shape)
    flat = per_token("temperature", temperature, shape, mask, 1.0)
    if flat.device.type == "cpu" and not ((flat > 0) & torch.isfinite(flat)).all():
        fail("temperature", expected, f"values from {flat.min().item()} to {flat.max().item()}")
    return 1.0, 1.0 / flat


@dataclass(frozen=True)
class Rows:
    """The flattened tokens of one call."""

    ids: Tensor
    """(N,) int64 in [0, V); 0 where masked."""
    mask: Tensor
    """(N,) bool: tokens that are computed."""
    order: Tensor
    """(N,) int64: rows that may have a gradient, then the other unmasked ones, then the masked
    ones."""
    n_gradient: int
    """Rows that may have a gradient, on the host."""
    n_unmasked: int
    """Rows that are computed, on the host."""
    n_tokens: int
    """Unmasked tokens, on the host; more than are computed where inactive ones are skipped."""
    lengths: tuple[int, ...] | None = None
    """Rows that may have a gradient in each sequence, on the host, where somebody asked."""
    ends: Tensor | None = None
    """(S+1,) on the device: sums of the lengths."""
    poisoned: Tensor | None = None
    """0-d bool on the device, of a call whose counts never reached the host: more unmasked rows
    than it has room for, an id outside the vocabulary, or boundaries that are none."""

    @property
    def fixed(self) -> bool:
        """True when the counts are a capacity and the rows behind the unmasked ones are masked."""
        return self.poisoned is not None

    @property
    def gradient_index(self) -> Tensor | None:
        """Rows that may have a gradient; None for all of them in order."""
        return None if self.n_gradient == self.ids.numel() else self.order[: self.n_gradient]

    @property
    def unmasked_index(self) -> Tensor | None:
        """Rows that are computed, those with a gradient first; None for all of them in order."""
        everything = self.n_unmasked == self.ids.numel() == self.n_gradient
        return None if everything and not self.fixed else self.order[: self.n_unmasked]


def flat_mask(mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A bool, integer or floating mask of `shape` -> (N,) bool, non-zero counts; None for all."""
    if mask is None:
        n = 1
        for size in shape:
            n *= size
        return torch.ones(n, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape or mask.device != device:
        fail("mask", f"tensor {shape} on {device}", describe(mask))
    return (mask != 0).reshape(-1)


def flatten(
    ids: Tensor,
    mask: Tensor,
    V: int,
    shape: tuple[int, ...],
    *,
    useful: Tensor | None = None,
    skip: bool = False,
    bounds: Tensor | None = None,
    max_rows: int | None = None,
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Rows:
    """Check ids against the leading shape and list the rows, with one host sync.

    Args:
        ids: integer tensor of `shape`; in [0, V) wherever unmasked, anything where masked.
        mask: (N,) bool from `flat_mask`.
        useful: (N,) bool, rows that can have a gradient when unmasked; None for all.
        skip: treat the other rows as if they were masked.
        bounds: (S+1,) sequence boundaries, for `Rows.lengths`.
        max_rows: room for so many rows and no host sync; what does not fit poisons the call.
        valid: 0-d bool on the device from `boundaries_on`, and the cu_seqlens it is about.
    """
    device = mask.device
    check_tensor("ids", ids, shape, device, floating=False)
    if ids.dtype == torch.bool:
        fail("ids", "an integer tensor", describe(ids))
    flat = ids.reshape(-1).long()
    ids = torch.where(mask, flat, torch.zeros_like(flat))
    useful = mask if useful is None else mask & useful
    kept = useful if skip else mask
    if max_rows is not None:
        order = torch.argsort(~mask, stable=True)
        poisoned = (mask.sum() > max_rows) | (ids < 0).any() | (ids >= V).any()
        if valid is not None:
            poisoned = poisoned | ~valid
        room = (min(max_rows, ids.numel()),) * 3
        return Rows(ids.clamp(0, V - 1), mask, order, *room, poisoned=poisoned)
    order = torch.argsort(2 - kept.to(torch.int8) - useful.to(torch.int8), stable=True)
    if ids.numel() == 0:
        if valid is not None:
            check_boundaries(cu_seqlens.tolist(), 0)
        return Rows(ids, kept, order, 0, 0, 0, () if bounds is not None else None)
    sane = mask.new_ones((), dtype=torch.long) if valid is None else valid.long()
    facts = torch.stack((useful.sum(), kept.sum(), mask.sum(), ids.min(), ids.max(), sane))
    ends = None
    if bounds is not None:
        count = torch.cat((useful.new_zeros(1, dtype=torch.long), useful.long().cumsum(0)))
        ends = count[bounds]
        facts = torch.cat((facts, ends.diff()))
    # one transfer to the host for the whole call
    facts = facts.tolist()
    if not facts[5]:
        check_boundaries(cu_seqlens.tolist(), shape[0])
    if facts[3] < 0 or facts[4] >= V:
        fail("ids", f"token ids in [0, {V})", f"values from {facts[3]} to {facts[4]}")
    lengths = tuple(facts[6:]) if bounds is not None else None
    return Rows(ids, kept, order, *facts[:3], lengths, ends)


def per_token(
    name: str, value: Tensor | None, shape: tuple[int, ...], mask: Tensor, fill: float = 0.0
) -> Tensor | None:
    """value of `shape`, flattened to fp32 (N,) with fill where masked (selected, never
    multiplied)."""
    if value is None:
        return None
    check_tensor(name, value, shape, mask.device)
    flat = value.detach().reshape(-1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return torch.where(mask, flat, torch.full_like(flat, fill))


def boundaries_on(
    device: torch.device, cu_seqlens: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Boundaries (S+1,) int64 on the device of a call, and for those that were there already a 0-d
    bool: whether they are what `check_cu_seqlens` wants. Nothing is waited for, and what is
    returned is safe to compute with either way."""
    if cu_seqlens is None:
        return None, None
    if cu_seqlens.device.type == "cpu":
        # pageable memory is read before the copy returns, pinned memory would be read later
        pinned = device.type != "cpu" and cu_seqlens.is_pinned()
        return cu_seqlens.long().to(device, non_blocking=not pinned), None
    n = shape[0]
    given = cu_seqlens.to(device).long()
    if given.numel() - 1 == n:
        safe = torch.arange(n + 1, device=device)
    else:
        # fills, not copies from the host
        first, last = given.new_zeros(1), given.new_full((1,), n)
        safe = torch.cat((first, given[1:-1].clamp(0, n), last)).cummax(0).values
    return safe, (safe == given).all()
