"""Which reward functions judge which row: the dataset's column `rewards`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .checks import nearest

COLUMN = "rewards"


def routed_names(value: Any, row: int) -> list[str] | None:
    """The names in one cell: a list, or one text with commas; None and empty texts mean all.

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
        return None if value == [""] else value
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return list(value)
    raise ValueError(
        f"dataset column {COLUMN!r}, row {row}: expected names of reward functions (a list or a "
        f"text with commas), got {value!r}; rename the column if it is meant for something else."
    )


def routes(cells: Iterable[Any], names: Sequence[str], specs: Sequence[str]) -> list[list[int]]:
    """The rows that each of the K functions judges.

    Args:
        cells: the column `rewards`, B values.
        names: (K) names of the functions, as in the metrics.
        specs: (K) what each was loaded from, such as "rule:math"; it names a function as well.

    Raises:
        ValueError: for a name that no function has (the nearest is suggested).
    """
    judged: list[list[int]] = [[] for _ in names]
    for row, cell in enumerate(cells):
        chosen = routed_names(cell, row)
        if chosen is None:
            for rows in judged:
                rows.append(row)
            continue
        for name in chosen:
            if name not in names and name not in specs:
                raise ValueError(
                    f"dataset column {COLUMN!r}, row {row}: no reward function is called "
                    f"{name!r}; {nearest(name, list(names))}"
                )
        for rows, name, spec in zip(judged, names, specs, strict=True):
            if name in chosen or spec in chosen:
                rows.append(row)
    return judged
