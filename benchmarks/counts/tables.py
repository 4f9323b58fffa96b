"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a Markdown table."""
    header = list(header)
    lines = ([str(cell) for cell in line] for line in (header, ["---"] * len(header), *rows))
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def percent(value: float | None) -> str:
    """87 %, or a dash."""
    return "-" if value is None else f"{100 * value:.0f} %"
