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
    """dtype, shape and device of a tensor, or the type of something else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


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


def check_temperature(temperature: float) -> None:
    """A finite number above 0."""
    if not is_number(temperature) or not (0 < temperature < float("inf")):
        fail("temperature", "a finite number > 0", repr(temperature))


def check_logits(logits: Tensor) -> None:
    """(N, V) or (B, T, V) floating point with stride 1 over V."""
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or logits.dtype not in FLOATS:
        fail("logits", "floating-point tensor (N, V) or (B, T, V)", describe(logits))
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
    """(N,) bool: tokens that count."""
    order: Tensor
    """(N,) int64: rows that may have a gradient, then the other unmasked ones, then the masked
    ones."""
    n_gradient: int
    """Rows that may have a gradient, on the host."""
    n_unmasked: int
    """Unmasked rows, on the host."""

    @property
    def gradient_index(self) -> Tensor | None:
        """Rows that may have a gradient; None for all of them in order."""
        return None if self.n_gradient == self.ids.numel() else self.order[: self.n_gradient]

    @property
    def unmasked_index(self) -> Tensor | None:
        """Unmasked rows, those with a gradient first; None for all of them in order."""
        everything = self.n_unmasked == self.ids.numel() == self.n_gradient
        return None if everything else self.order[: self.n_unmasked]


def flatten(
    ids: Tensor, mask: Tensor | None, V: int, shape: tuple[int, ...], device, useful=None
) -> Rows:
    """Check ids and mask against the leading shape and list the rows, with one host sync.

    Args:
        ids: integer tensor of `shape`; in [0, V) wherever unmasked, anything where masked.
        mask: None, or a bool, integer or floating tensor of `shape`; non-zero counts.
        useful: (N,) bool, rows that can have a gradient when unmasked; None for all.
    """
    check_tensor("ids", ids, shape, device, floating=False)
    if ids.dtype == torch.bool:
        fail("ids", "an integer tensor", describe(ids))
    if mask is None:
        flat = torch.ones(ids.numel(), dtype=torch.bool, device=device)
    else:
        if not isinstance(mask, Tensor) or tuple(mask.shape) != shape or mask.device != device:
            fail("mask", f"tensor {shape} on {device}", describe(mask))
        flat = (mask != 0).reshape(-1)
    ids = torch.where(
        flat, ids.reshape(-1).long(), torch.zeros((), dtype=torch.long, device=device)
    )
    useful = flat if useful is None else flat & useful
    rank = 2 - flat.to(torch.int8) - useful.to(torch.int8)
    order = torch.argsort(rank, stable=True)
    if ids.numel() == 0:
        return Rows(ids, flat, order, 0, 0)
    # one transfer to the host for the whole call
    facts = torch.stack((useful.sum(), flat.sum(), ids.min(), ids.max())).tolist()
    if facts[2] < 0 or facts[3] >= V:
        fail("ids", f"token ids in [0, {V})", f"values from {facts[2]} to {facts[3]}")
    return Rows(ids, flat, order, facts[0], facts[1])


def per_token(
    name: str, value: Tensor | None, shape: tuple[int, ...], mask: Tensor
) -> Tensor | None:
    """value of `shape`, flattened to fp32 (N,) with 0 where masked (selected, never multiplied)."""
    if value is None:
        return None
    check_tensor(name, value, shape, mask.device)
    flat = value.detach().reshape(-1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return torch.where(mask, flat, torch.zeros_like(flat))


def check_cu_seqlens(
    cu_seqlens: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    """(S+1,) integers from 0 to N that never fall, and only for packed (N,) batches."""
    if cu_seqlens is None:
        return
    if len(shape) != 1:
        fail("cu_seqlens", "None for a padded (B, T) batch", describe(cu_seqlens))
    integer = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1
    if not integer or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        fail("cu_seqlens", "integer tensor (S+1,)", describe(cu_seqlens))
    # boundaries are made on the host in every trainer, so reading them costs no wait there
    values = cu_seqlens.tolist()
    if (
        values[0] != 0
        or values[-1] != shape[0]
        or any(a > b for a, b in zip(values, values[1:], strict=False))
    ):
        shown = f"{values[:4]}...{values[-2:]}" if len(values) > 6 else values
        fail("cu_seqlens", f"boundaries rising from 0 to N = {shape[0]}", shown)
