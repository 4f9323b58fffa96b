"""What rewards must look like: weights, kinds, and the numbers that a function returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


def check_values(name: str, values: Any, size: int) -> list[float]:
    """The B numbers that a function returned; None becomes NaN."""
    scalar = getattr(values, "shape", None) == ()
    if scalar or isinstance(values, (str, bytes, dict)) or not hasattr(values, "__len__"):
        raise ValueError(
            f"reward function {name!r} must return a list of {size} numbers or None, got "
            f"{type(values).__name__}."
        )
    if len(values) != size:
        raise ValueError(
            f"reward function {name!r} must return {size} rewards, one per completion, got "
            f"{len(values)}."
        )
    values = values.tolist() if hasattr(values, "tolist") else values
    return [check_value(name, index, value) for index, value in enumerate(values)]


def check_value(name: str, index: int, value: Any) -> float:
    """One reward as a float; None becomes NaN, and nothing else may be NaN or infinite."""
    if value is None:
        return math.nan
    wrong = f"reward function {name!r} returned {value!r} for completion {index}: expected "
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
