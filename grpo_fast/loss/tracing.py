"""What the ops for torch.compile (`ops.py`, `logprob_ops.py`) share: arguments that a schema can
hold, checks while tracing, shapes of results."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, Optional

import torch
from torch import Tensor
from torch.types import Number

from grpo_fast import checks

# the spelling of an optional argument from which every torch.library reads a schema
OptTensor = Optional[Tensor]  # noqa: UP045
OptNumber = Optional[Number]  # noqa: UP045
OptFloat = Optional[float]  # noqa: UP045
OptInt = Optional[int]  # noqa: UP045
OptDtype = Optional[torch.dtype]  # noqa: UP045


def split(value: object) -> tuple[Tensor | None, object]:
    """(tensor, None) or (None, number) of an argument that may be either."""
    return (value, None) if isinstance(value, Tensor) else (None, value)


def either(tensor: Tensor | None, number: object) -> object:
    """Inverse of `split`."""
    return number if tensor is None else tensor


def autocast_of(like: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region a call is traced in: compiled code runs outside of it."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextmanager
def autocast_again(like: Tensor, dtype: torch.dtype | None) -> Iterator[None]:
    """The autocast region of `autocast_of` around an op that runs."""
    if dtype is None:
        yield
        return
    with torch.autocast(like.device.type, dtype):
        yield


def traced_wanted(*tensors: Tensor | None) -> list[bool]:
    """Which tensors want a gradient, as the argument of an op."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def wide(like: Tensor) -> torch.dtype:
    """fp32, or fp64: what losses and gradients of an input are computed in."""
    return torch.promote_types(like.dtype, torch.float32)


def check_shapes(shape: tuple[int, ...], ids: Tensor, **fields: Tensor | None) -> None:
    """ValueError while tracing for what does not depend on values; the op checks the rest."""
    checks.check_tensor("ids", ids, shape, ids.device, floating=False)
    for name, value in fields.items():
        if value is not None and tuple(value.shape) != shape:
            checks.fail(name, f"tensor {shape}", checks.describe(value))


def gradients_or_empty(like: Tensor, gradients: list[Tensor | None] | None, n: int) -> list[Tensor]:
    """n tensors, with nothing in those that nobody wants."""
    gradients = [None] * n if gradients is None else gradients
    return [like.new_empty(0, dtype=wide(like)) if g is None else g for g in gradients]


def refuse(name: str, expected: str, got: object) -> NoReturn:
    """`checks.fail`, of what torch.compile cannot have."""
    checks.fail(name, f"{expected} under torch.compile", got)
    raise AssertionError


def fake_gradients(like: Tensor, tensors, flags: list[bool]) -> list[Tensor]:
    """Shapes of `gradients_or_empty`."""
    return [
        like.new_empty(t.shape if flag else (0,), dtype=wide(like))
        for t, flag in zip(tensors, flags, strict=True)
    ]


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, by way of fp32 for half precision."""
    if grad.dtype.itemsize >= 4:
        return grad * factor.to(grad.dtype)
    return grad.float() * factor
