"""A loss whose gradients are finished before backward begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.checks import no_double_backward
from grpo_fast.engine.backend import select


class Done(NamedTuple):
    """What a loss is when nothing of autograd has touched it."""

    loss: Tensor
    metrics: dict[str, Tensor]
    gradients: list[Tensor | None]
    """Of the leaves of the call; None where nobody wants one."""
    scale: Tensor | None = None
    """0-d, by which the gradients are too large."""
    only: float | None = None
    """The one upstream scalar that main_grad was filled for."""
    tokens: Callable[[], Any] | None = None
    """The terms of every token, for whoever wants them."""

    def unscaled(self, grad_scale: float) -> Done:
        """The loss without the grad_scale that is in it and in its gradients."""
        loss = self.loss / grad_scale
        metrics = {**self.metrics, "loss": loss.clone()}
        scale = torch.full_like(loss, grad_scale)
        return self._replace(loss=loss, metrics=metrics, scale=scale, only=float(grad_scale))


def attach(done: Done, leaves: tuple[Tensor | None, ...]) -> Tensor:
    """The loss with its gradients: the only line of a loss that knows autograd."""
    return Attach.apply(done.loss, done.gradients, done.scale, done.only, *leaves)


class Attach(torch.autograd.Function):
    """Give a finished loss its gradients: backward only multiplies by the upstream scalar.

    scale: 0-d tensor by which the gradients are too large, or None. only: the one upstream scalar
    that a gradient which is no longer here was made for, or None for any.
    """

    @staticmethod
    def forward(ctx, loss, gradients, scale, only, *tensors):
        ctx.gradients, ctx.scale, ctx.only = list(gradients), scale, only
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return loss.clone()

    @staticmethod
    @no_double_backward
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss computed its gradients in the forward pass and gave them to the first "
                "backward; call the loss again for a second one (retain_graph cannot help)."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.only is not None:
            upstream = _expected(upstream, ctx.only)
        factor = upstream if ctx.scale is None else upstream / ctx.scale
        # reading the factor makes a GPU wait, and a CPU save a pass
        is_one = factor.is_cpu and factor.item() == 1.0
        out = []
        while gradients:
            # each goes before the next is cast
            grad = gradients.pop(0)
            dtype = ctx.dtypes[-1 - len(gradients)]
            if grad is not None:
                grad = grad.to(dtype) if is_one else _scaled(grad, factor, dtype)
            out.append(grad)
        return (None, None, None, None, *out)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in dtype, in place where it has that: the buffer is ours, and a copy of dweight
    would double the peak."""
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    select(grad.device).scale(grad, factor, out)
    return out


def _expected(upstream: Tensor, only: float) -> Tensor:
    """The upstream scalar; an error, or NaN on an accelerator (which nobody waits for), for another
    than the one that main_grad was filled for."""
    if not upstream.is_cpu:
        return torch.where(upstream == only, upstream, torch.full_like(upstream, torch.nan))
    if upstream.item() != only:
        raise RuntimeError(
            f"main_grad holds the gradient times grad_scale = {only:g}, but backward came with a "
            f"factor of {upstream.item():g}: pass that factor as grad_scale."
        )
    return upstream
