"""How the gradients of a call reach autograd: through its functions, or out of a compiled op
(`ops.py`) as plain tensors."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_LOCAL = threading.local()
# public function -> what stands for it while torch.compile traces; `ops.py` fills it
TRACED: dict[str, Callable] = {}


def compilable(function: Callable) -> Callable:
    """The function itself, but one opaque op of it where torch.compile traces."""
    name = function.__name__

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():
            return TRACED[name](*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


class Handover:
    """Stands in for autograd's context inside an op: which gradients are wanted, and what the
    forward keeps."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.gradients: list[Tensor | None] | None = None
        self.scale: Tensor | None = None
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """As that of autograd."""
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """As that of autograd."""


@contextmanager
def handed_over(needs_input_grad: tuple[bool, ...]) -> Iterator[Handover]:
    """Inside, `wanted` answers these, and `apply` leaves in the context what autograd would get."""
    _LOCAL.context = context = Handover(needs_input_grad)
    try:
        yield context
    finally:
        _LOCAL.context = None


def wanted(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of them want a gradient from this call."""
    context = getattr(_LOCAL, "context", None)
    if context is not None:
        return context.needs_input_grad
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t is not None and t.requires_grad for t in tensors)


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args), or its forward alone where an op hands the rest over."""
    context = getattr(_LOCAL, "context", None)
    return function.apply(*args) if context is None else function.forward(context, *args)
