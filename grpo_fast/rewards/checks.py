"""What rewards must look like: weights, kinds, limits, and the numbers that a function returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# the other modules of this package take it from here
from grpo_fast.checks import nearest as nearest

_FLOAT32_MAX = torch.finfo(torch.float32).max


def check_weights(weights: Sequence[float] | None, count: int) -> Tensor:
    """The weights as (count,) float32; ones when there are none."""
    if weights is None:
        return torch.ones(count)
    values = list(weights)
    if len(values) != count:
        raise ValueError(f"reward_weights: expected {count}, one per reward, got {len(values)}.")
    for index, value in enumerate(values):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"reward_weights[{index}]: expected a finite number, got {value!r}.")
    return torch.tensor(values, dtype=torch.float32)


def check_kinds(rewards: list[Any]) -> None:
    """Refuse what can be no reward, before any model is loaded."""
    for index, reward in enumerate(rewards):
        if not isinstance(reward, str) and not callable(reward):
            raise ValueError(
                f"reward_funcs[{index}]: expected a callable, a checkpoint string or a "
                f"PreTrainedModel, got {type(reward).__name__}."
            )


def check_limit(name: str, value: Any) -> None:
    """A number of seconds above 0, or None for no limit."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and value > 0):
        raise ValueError(f"{name}: expected seconds > 0 or None, got {value!r}.")


def check_values(name: str, values: Any, size: int) -> list[float]:
    """The B numbers that a function returned; None becomes NaN.

    Args:
        name: how messages call the function: its name in quotes, and where it is defined.
    """
    values = _listed(name, values, size)
    return [check_value(name, index, value) for index, value in enumerate(values)]


def check_token_values(name: str, values: Any, lengths: list[int]) -> list[list[float]]:
    """The rewards per token of B completions: a number counts for the last token.

    A list has one finite number for each token; None becomes NaN on the last one. A completion
    without tokens has no rewards.
    """
    out = []
    for index, value in enumerate(_listed(name, values, len(lengths))):
        length = lengths[index]
        value = value.tolist() if getattr(value, "shape", ()) != () else value
        if not isinstance(value, (list, tuple)):
            last = check_value(name, index, value)
            out.append(([0.0] * (length - 1) + [last])[:length] if length else [])
        elif len(value) != length:
            raise ValueError(
                f"reward function {name} returned {len(value)} numbers for completion {index}: "
                f"expected {length}, one for each of its tokens."
            )
        else:
            out.append([check_value(name, index, number) for number in value])
    return out


def _listed(name: str, values: Any, size: int) -> Any:
    scalar = getattr(values, "shape", None) == ()
    if scalar or isinstance(values, (str, bytes, dict)) or not hasattr(values, "__len__"):
        raise ValueError(
            f"reward function {name} must return a list of {size} numbers or None, got "
            f"{type(values).__name__}."
        )
    if len(values) != size:
        raise ValueError(
            f"reward function {name} must return {size} rewards, one per completion, got "
            f"{len(values)}."
        )
    return values.tolist() if hasattr(values, "tolist") else values


def check_value(name: str, index: int, value: Any) -> float:
    """One reward as a float; None becomes NaN, and nothing else may be NaN or infinite."""
    if value is None:
        return math.nan
    wrong = f"reward function {name} returned {_cut(value)} for completion {index}: expected "
    if isinstance(value, (list, tuple)):
        raise ValueError(
            f"{wrong}a number or None; a reward for each token is taken by trainers with a critic "
            "(PPO), not by this one."
        )
    if isinstance(value, (str, bytes)) or getattr(value, "shape", ()) != ():
        raise ValueError(f"{wrong}a number or None.")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wrong}a number or None.") from error
    except OverflowError:
        number = math.inf
    # a number that float32 rounds to infinity would silence its whole group
    if not abs(number) <= _FLOAT32_MAX:
        raise ValueError(f"{wrong}a finite number (None marks a completion as unscorable).")
    return number


def _cut(value: Any) -> str:
    try:
        text = repr(value)
    # an int of more than 4300 digits, or a __repr__ of the user's
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
