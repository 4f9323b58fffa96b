"""`ADVANTAGES`, the table of estimators, and the choice of one by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from grpo_fast.checks import fail, nearest

from .group import centered_advantages, group_advantages, leave_one_out_advantages
from .reward_weights import reward_weights

ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "group": group_advantages,
    "centered": centered_advantages,
    "leave_one_out": leave_one_out_advantages,
    "reward_weights": reward_weights,
}


def check_estimator(name: str, argument: str = "name") -> None:
    """Refuse a name that is no key of `ADVANTAGES`.

    Args:
        name: of an estimator, such as `PRESETS[loss_type].advantage`.
        argument: what the message calls it.

    Raises:
        ValueError: an unknown name (the nearest one is suggested), or "given".
    """
    if name in ADVANTAGES:
        return
    if name == "given":
        hint = "it stands for advantages of your own, which are not made of rewards."
        fail(argument, f"one of {', '.join(ADVANTAGES)}", "'given'", hint)
    fail(argument, "a known estimator", repr(name), nearest(name, list(ADVANTAGES)))


def advantages_of(name: str, rewards: Tensor, **options: object) -> Tensor:
    """Advantages by the name of their estimator: `ADVANTAGES[name](rewards, **options)`.

    Args:
        name: key of `ADVANTAGES`, such as `PRESETS["rloo"].advantage`.
        rewards: (P, G) floating point, NaN = unscorable.
        options: keywords of the estimator.

    Returns:
        (P, G) advantages (or weights), float32 (float64 for float64 rewards).

    Raises:
        ValueError: an unknown name (the nearest one is suggested), "given", and what the estimator
            raises.
    """
    check_estimator(name)
    return ADVANTAGES[name](rewards, **options)
