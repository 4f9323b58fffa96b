"""The report of a loop: report/index.md, curves.png, accuracy.png, reports.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import checkpoint
from .completions import plain
from .record import as_text

_COLUMNS = (
    ("judge_before", "judge, before"),
    ("judge", "judge, after"),
    ("reward_before", "reward, before"),
    ("reward", "reward, after"),
    ("accuracy_new", "accuracy on new data"),
    ("agreement", "correlation with the judge"),
    ("kl_first", "KL to the first"),
    ("kl_last", "KL to the last"),
    ("entropy", "entropy"),
    ("distinct_1", "distinct-1"),
    ("distinct_2", "distinct-2"),
    ("length", "tokens"),
    ("pairs", "pairs"),
)
_PANELS = (
    (("judge_before", "judge"), "judge's score on held-out prompts"),
    (("reward_before", "reward"), "reward of the iteration's own model"),
    (("accuracy_new", "agreement"), "reward model on the new policy's data"),
    (("kl_first", "kl_last"), "KL (nats a token)"),
    (("distinct_1", "distinct_2"), "distinct n-grams"),
    (("entropy",), "entropy (nats a token)"),
)


def write_report(folder: Path, reports: list[dict[str, Any]]) -> None:
    """Write the page and the pictures of all iterations so far.

    Args:
        folder: where they go; made when it is missing.
        reports: of each iteration, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "reports.json", reports)
    _curves(folder / "curves.png", reports)
    _matrix(folder / "accuracy.png", reports)
    part = folder / ".index.part"
    part.write_text(_page(reports), encoding="utf-8")
    os.replace(part, folder / "index.md")


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _page(reports: list[dict[str, Any]]) -> str:
    parts = ["# Policy and reward model, iteration by iteration", ""]
    named = [(key, title) for key, title in _COLUMNS if any(key in r for r in reports)]
    rows = [[str(r["iteration"]), *(_number(r.get(key)) for key, _ in named)] for r in reports]
    parts += [_table(["iteration", *(title for _, title in named)], rows), ""]
    parts += [
        "All numbers are of held-out prompts. Before and after are the policies that an iteration",
        "began and ended with; both rewards are those of its own reward model.",
        "",
        "![curves](curves.png)",
        "",
        "## Accuracy of each reward model on the held-out sets of each iteration",
        "",
    ]
    count = len(reports)
    head = ["reward model", *(f"data {k}" for k in range(1, count + 1))]
    matrix = [
        [f"R {r['iteration']}", *(_number(v) for v in r["accuracy"])]
        + ["-"] * (count - len(r["accuracy"]))
        for r in reports
    ]
    parts += [_table(head, matrix), "", "![accuracy](accuracy.png)", ""]
    for report in reports:
        parts += [f"## Completions after iteration {report['iteration']}", ""]
        rows = [
            [_cell(as_text(s["prompt"])), _cell(s["completion"]), _number(s["reward"])]
            for s in report["samples"]
        ]
        parts += [_table(["prompt", "completion", "reward"], rows), ""]
    return "\n".join(parts)


def _cell(text: str) -> str:
    # model text must not end a cell, begin a tag or a link
    safe = plain(text)[:300].replace("\n", " ").replace("\t", " ")
    for mark in ("\\", "|", "`", "<", "[", "]", "*", "_"):
        safe = safe.replace(mark, f"&#{ord(mark)};")
    return safe


def _save(figure: Any, path: Path) -> None:
    part = path.with_name("." + path.stem + ".part.png")
    figure.savefig(part, dpi=100)
    os.replace(part, path)


def _curves(path: Path, reports: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7))
    figure.subplots_adjust(0.06, 0.07, 0.98, 0.94, wspace=0.22, hspace=0.3)
    for axes, (keys, title) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for key in keys:
            points = [(r["iteration"], r[key]) for r in reports if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=key)
        axes.set(title=title, xlabel="iteration")
        axes.set_xticks([r["iteration"] for r in reports])
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    _save(figure, path)


def _matrix(path: Path, reports: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    count = len(reports)
    figure = Figure(figsize=(1.2 * count + 3, 1.0 * count + 2))
    axes = figure.subplots()
    nan = float("nan")
    cells = [[nan if v is None else v for v in r["accuracy"]] for r in reports]
    cells = [row + [nan] * (count - len(row)) for row in cells]
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn")
    for i, row in enumerate(cells):
        for k, value in enumerate(row):
            if value == value:
                axes.text(k, i, f"{value:.2f}", ha="center", va="center")
    axes.set(title="held-out pair accuracy", xlabel="data of iteration", ylabel="reward model")
    axes.set_xticks(range(count), range(1, count + 1))
    axes.set_yticks(range(count), range(1, count + 1))
    figure.colorbar(image)
    _save(figure, path)
