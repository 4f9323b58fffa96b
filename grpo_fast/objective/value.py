"""What a value costs, and its derivative by the value, for a critic beside the policy.

    total = actor + vf_coef * value - entropy_coef * entropy

with `value` the mean, by the weights of the tokens, of the losses here. The half of the squared
error is in them: vf_coef = 0.5 is 0.25 of the squared error. Who writes c * (V - R)^2 into the sum
has vf_coef = 2 c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_fast.checks import check_tensor, describe, fail, is_number, nearest

# gap (N,), delta -> loss and its derivative by the gap
Penalty = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def mse(gap: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """gap^2 / 2, and gap."""
    return 0.5 * gap * gap, gap


def huber(gap: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """gap^2 / 2 up to |gap| = delta, beyond it the tangent delta * (|gap| - delta / 2)."""
    size = gap.abs()
    loss = torch.where(size > delta, delta * (size - 0.5 * delta), 0.5 * gap * gap)
    return loss, torch.where(size > delta, delta * gap.sign(), gap)


VALUE_LOSSES: dict[str, Penalty] = {"mse": mse, "huber": huber}


def check_value_loss(
    kind: str, cliprange: float | None, delta: float, *, names: tuple[str, str, str]
) -> None:
    """Refuse what `value_loss` cannot honour; `names` are what the messages call the three.

    Raises:
        ValueError: an unknown loss (the nearest one is suggested), or a number out of range.
    """
    if kind not in VALUE_LOSSES:
        fail(names[0], "a known loss", repr(kind), nearest(kind, list(VALUE_LOSSES)))
    if cliprange is not None and not (is_number(cliprange) and 0 < cliprange < float("inf")):
        fail(names[1], "None or a finite number > 0", repr(cliprange))
    if not is_number(delta) or not 0 < delta < float("inf"):
        fail(names[2], "a finite number > 0", repr(delta))


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    *,
    kind: str = "mse",
    cliprange: float | None = 0.2,
    delta: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each token's value, its derivative by the value, and where the clip binds.

        clipped = old + clamp(v - old, -cliprange, cliprange)
        loss    = max(h(v - R), h(clipped - R))          h = mse or huber, the half in it

    Where the clipped branch is the larger one, the value has left its range away from the return
    and the derivative is 0. At a tie the unclipped branch counts.
    Source: Proximal Policy Optimization Algorithms (2017), as in OpenAI's baselines; Robust
    Estimation of a Location Parameter (Huber, 1964).

    Args:
        values: (N,) floating point, what the critic says now.
        returns: (N,), what it is taught.
        old_values: (N,), what it said when the window was made; needed with a cliprange.
        kind: key of `VALUE_LOSSES`.
        cliprange: how far a value may move, in units of the reward; None: no clip.
        delta: where huber turns linear, in units of the reward.

    Returns:
        loss and derivative (N,) in the dtype of values, and a bool (N,); no graph.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range.
    """
    if not isinstance(values, Tensor) or values.dim() != 1 or not values.is_floating_point():
        fail("values", "floating-point tensor (N,)", describe(values))
    check_tensor("returns", returns, tuple(values.shape), values.device)
    check_value_loss(kind, cliprange, delta, names=("kind", "cliprange", "delta"))
    penalty = VALUE_LOSSES[kind]
    with torch.no_grad():
        loss, slope = penalty(values - returns, delta)
        if cliprange is None:
            return loss, slope, torch.zeros_like(loss, dtype=torch.bool)
        check_tensor("old_values", old_values, tuple(values.shape), values.device)
        low, high = old_values - cliprange, old_values + cliprange
        bounded = torch.minimum(torch.maximum(values, low), high)
        clipped, _ = penalty(bounded - returns, delta)
        binds = clipped > loss
        return torch.where(binds, clipped, loss), torch.where(binds, 0.0, slope), binds
