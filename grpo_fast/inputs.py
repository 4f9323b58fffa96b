"""Checks of the public arguments, all before any work, and their flattening to rows (N,)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(name: str, expected: str, got: object) -> None:
    """Raise the one form of error a caller sees."""
    raise ValueError(f"{name}: expected {expected}, got {got}.")


def describe(value: object) -> str:
    """dtype, shape and device of a tensor, or the type of something else and how it begins."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    if isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value):
        inside = ", ".join(describe(x) for x in value[:4])
        return f"{type(value).__name__} of {len(value)}: {inside}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def check_tensor(
    name: str, value: object, shape: tuple[int, ...], device: torch.device, *, floating: bool = True
) -> None:
    """ValueError unless value is a tensor of this shape, device and kind."""
    good = isinstance(value, Tensor) and tuple(value.shape) == shape and value.device == device
    if not good or value.is_floating_point() != floating:
        kind = "floating-point" if floating else "integer or bool"
        fail(name, f"{kind} tensor {shape} on {device}", describe(value))


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> None:
    """hidden (..., H), weight (V, H), bias (V,) of one dtype and device; finite head transforms."""
    if not isinstance(hidden, Tensor) or hidden.dim() not in (2, 3) or hidden.dtype not in FLOATS:
        fail("hidden", "floating-point tensor (N, H) or (B, T, H)", describe(hidden))
    if hidden.is_meta:
        fail("hidden", "a tensor that holds numbers", describe(hidden))
    if not isinstance(weight, Tensor) or weight.dim() != 2 or 0 in weight.shape:
        fail("weight", "tensor (V, H)", describe(weight))
    check_tensor("weight", weight, (weight.shape[0], hidden.shape[-1]), hidden.device)
    # under autocast a layer's output and its weight may differ; elsewhere it is a mistake
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        fail("weight", f"the dtype of hidden, {hidden.dtype} (or an autocast region)", weight.dtype)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), hidden.device)
    check_transform(softcap, logit_scale)


def is_number(value: object) -> bool:
    """An int or float, not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_transform(softcap: float | None, logit_scale: float) -> None:
    """softcap None or > 0, logit_scale finite and not 0."""
    if softcap is not None and not (is_number(softcap) and 0 < softcap < float("inf")):
        fail("softcap", "None or a finite number > 0", repr(softcap))
    if not (is_number(logit_scale) and 0 < abs(logit_scale) < float("inf")):
        fail("logit_scale", "a finite number other than 0", repr(logit_scale))


def check_precision(name: str, value: Tensor, backend: str) -> None:
    """The kernels compute in fp32, so float64 is for the torch backend."""
    if backend == "triton" and value.dtype == torch.float64:
        expected = "fp32, fp16 or bf16 on the Triton backend (GRPO_FAST_BACKEND=torch takes fp64)"
        fail(name, expected, value.dtype)


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


def check_lora(
    lora: object, hidden: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, float]:
    """(A (r, H), B (V, r), scale) of the dtype and device of the head; Nones for None."""
    if lora is None:
        return None, None, 1.0
    if not isinstance(lora, tuple) or len(lora) != 3:
        fail("lora", "None or (A (r, H), B (V, r), scale)", describe(lora))
    A, B, scale = lora
    if not isinstance(A, Tensor) or A.dim() != 2 or A.shape[0] == 0:
        fail("lora A", f"tensor (r, {hidden.shape[-1]})", describe(A))
    check_tensor("lora A", A, (A.shape[0], hidden.shape[-1]), hidden.device)
    check_tensor("lora B", B, (weight.shape[0], A.shape[0]), hidden.device)
    if not is_number(scale) or not abs(scale) < float("inf"):
        fail("lora scale", "a finite number", repr(scale))
    return A, B, float(scale)


def check_reference(
    ref_logp: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
) -> None:
    """ref_hidden (..., H') with ref_weight (V, H'), in place of ref_logp."""
    if ref_hidden is None:
        if ref_weight is not None:
            fail("ref_weight", "None without ref_hidden", describe(ref_weight))
        return
    if ref_logp is not None:
        fail("ref_hidden", "None where ref_logp is given", describe(ref_hidden))
    head = weight if ref_weight is None else ref_weight
    if not isinstance(head, Tensor) or head.dim() != 2:
        fail("ref_weight", f"None or a tensor ({weight.shape[0]}, H')", describe(head))
    check_tensor("ref_weight", head, (weight.shape[0], head.shape[1]), hidden.device)
    check_tensor("ref_hidden", ref_hidden, (*hidden.shape[:-1], head.shape[1]), hidden.device)
    if ref_hidden.dtype not in FLOATS or ref_hidden.dtype != head.dtype:
        fail("ref_hidden", f"the dtype of its weight, {head.dtype}", ref_hidden.dtype)


def check_logits(logits: Tensor) -> None:
    """(N, V) or (B, T, V) floating point with stride 1 over V."""
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or logits.dtype not in FLOATS:
        fail("logits", "floating-point tensor (N, V) or (B, T, V)", describe(logits))
    if logits.is_meta:
        fail("logits", "a tensor that holds numbers", describe(logits))
    if logits.shape[-1] == 0:
        fail("logits", "V >= 1", describe(logits))
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        fail("logits", "stride 1 over V (call .contiguous())", f"strides {logits.stride()}")


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
            _check_boundaries(cu_seqlens.tolist(), 0)
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
        _check_boundaries(cu_seqlens.tolist(), shape[0])
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


def check_cu_seqlens(
    cu_seqlens: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    """(S+1,) integers from 0 to N that never fall, and only for packed (N,) batches.

    The values only where they are on the host; elsewhere `boundaries_on` sees to them.
    """
    if cu_seqlens is None:
        return
    if len(shape) != 1:
        fail("cu_seqlens", "None for a padded (B, T) batch", describe(cu_seqlens))
    integer = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1
    if not integer or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        fail("cu_seqlens", "integer tensor (S+1,)", describe(cu_seqlens))
    if cu_seqlens.is_meta:
        fail("cu_seqlens", f"a tensor on the host or on {device}", describe(cu_seqlens))
    if cu_seqlens.device.type == "cpu":
        _check_boundaries(cu_seqlens.tolist(), shape[0])
    elif cu_seqlens.numel() == 1 and shape[0]:
        fail("cu_seqlens", f"boundaries rising from 0 to N = {shape[0]}", describe(cu_seqlens))


def _check_boundaries(values: list[int], n: int) -> None:
    if (
        values[0] != 0
        or values[-1] != n
        or any(a > b for a, b in zip(values, values[1:], strict=False))
    ):
        shown = f"{values[:4]}...{values[-2:]}" if len(values) > 6 else values
        fail("cu_seqlens", f"boundaries rising from 0 to N = {n}", shown)
    if len(values) - 1 == n and values != list(range(n + 1)):
        expected = "(N,) or (S,), which are one here: make every sequence one token or none empty"
        fail("advantages", expected, f"S = N = {n} with an empty sequence")


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
