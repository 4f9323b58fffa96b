"""What a caller hears: one form of error for every wrong argument, before any work."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ArgumentError(ValueError):
    """A wrong argument: `argument: expected A, got B.`, or `...; hint`.

    Args:
        argument: its name.
        expected: what it may be, in words.
        got: what came: a value, or a description of it.
        hint: the end of the sentence, such as what to use instead.
    """

    def __init__(self, argument: str, expected: str, got: object, hint: str = "") -> None:
        self.argument, self.expected, self.got, self.hint = argument, expected, got, hint
        tail = f"; {hint}" if hint else "."
        super().__init__(f"{argument}: expected {expected}, got {got}{tail}")

    def __reduce__(self) -> tuple:
        # an exception is pickled with its message alone, and this one has four arguments
        return type(self), (self.argument, self.expected, self.got, self.hint)

    def about(self, argument: str) -> ArgumentError:
        """The same error under another name of the argument."""
        return type(self)(argument, self.expected, self.got, self.hint)


def fail(name: str, expected: str, got: object, hint: str = "") -> NoReturn:
    """Raise the one form of error a caller sees."""
    raise ArgumentError(name, expected, got, hint)


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


def wide(like: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: what losses, statistics and gradients are computed in."""
    return torch.promote_types(like.dtype, torch.float32)


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
    # as of hidden and weight
    mixed = torch.is_autocast_enabled(hidden.device.type) and head.dtype in FLOATS
    if ref_hidden.dtype not in FLOATS or (ref_hidden.dtype != head.dtype and not mixed):
        expected = f"the dtype of its weight, {head.dtype} (or an autocast region)"
        fail("ref_hidden", expected, ref_hidden.dtype)


def check_shapes(
    shape: tuple[int, ...], tensors: dict[str, Tensor], names: tuple[str, ...]
) -> None:
    """ValueError while tracing for what does not depend on values; the op checks the rest."""
    ids = tensors["ids"]
    check_tensor("ids", ids, shape, ids.device, floating=False)
    for name in names:
        if name in tensors and tuple(tensors[name].shape) != shape:
            fail(name, f"tensor {shape}", describe(tensors[name]))


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
        check_boundaries(cu_seqlens.tolist(), shape[0])
    elif cu_seqlens.numel() == 1 and shape[0]:
        fail("cu_seqlens", f"boundaries rising from 0 to N = {shape[0]}", describe(cu_seqlens))


def check_boundaries(values: list[int], n: int) -> None:
    """Boundaries of a packed batch, on the host: rising from 0 to n."""
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


def no_double_backward(backward: Callable) -> Callable:
    """A backward that cannot be differentiated, and says so where somebody asks for a graph of it.

    torch's once_differentiable leaves a graph as if the gradients were constants when the upstream
    gradient needs none: a gradient penalty would silently be 0.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "grpo_fast does not support double backward: its gradients are computed by hand, "
                "and create_graph=True would silently leave out their own derivative."
            )
        return backward(ctx, *upstream)

    return wrapper


def nearest(name: object, known: tuple[str, ...] | list[str]) -> str:
    """A hint for an unknown name: the closest known one, then all of them."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."
