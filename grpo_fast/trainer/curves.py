"""output_dir/curves.png: what a run has logged, drawn at saves and at its end."""

from __future__ import annotations

import fnmatch
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

# (metric, title) of each panel; several metrics, or a pattern, share one. Panels without a number
# are left out.
Row = tuple["str | tuple[str, ...]", str]
CURVES: tuple[Row, ...] = (
    ("reward", "reward: mean, trend, spread within a group"),
    ("rewards/*/mean", "each reward: mean"),
    (
        ("frac_reward_zero_std", "completions/clipped_ratio"),
        "share of groups without a spread, and of truncated completions",
    ),
    ("completions/mean_length", "completion length (tokens)"),
    ("kl", "KL to the reference (nats)"),
    ("entropy", "entropy (nats)"),
    ("grad_norm", "norm of the gradient"),
    ("learning_rate", "learning rate"),
)
# logs over which the trend is averaged: a tenth of them, three at least
_TREND = 10


class Curves(TrainerCallback):
    """output_dir/curves.png: one panel for each row, drawn at saves and the end.

    Args:
        rows: (metric, title) for each panel.
    """

    def __init__(self, output_dir: str, rows: tuple[Row, ...] = CURVES) -> None:
        self.path, self.rows = Path(output_dir) / "curves.png", rows

    def on_save(self, args, state, control, **kwargs) -> None:
        """Redraw."""
        self._draw(state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Redraw."""
        self._draw(state)

    def _draw(self, state) -> None:
        if not state.is_world_process_zero:
            return
        panels = [(title, lines) for row, title in self.rows if (lines := series(row, state))]
        if not panels:
            return
        from matplotlib.figure import Figure

        high = -(-len(panels) // 2)
        figure = Figure(figsize=(10, 3.5 * high))
        # fixed margins: a computed layout doubles the time of drawing
        edge = 0.14 / high
        figure.subplots_adjust(0.07, edge, 0.98, 1 - 0.7 * edge, wspace=0.2, hspace=0.3)
        axes = list(figure.subplots(high, 2, squeeze=False).flat)
        for empty in axes[len(panels) :]:
            empty.set_axis_off()
        for place, (title, lines) in zip(axes, panels, strict=False):
            _panel(place, title, lines, _spread(state) if title == self.rows[0][1] else None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(".curves.part.png")
        figure.savefig(part, dpi=100)
        os.replace(part, self.path)


def series(row: str | tuple[str, ...], state: Any) -> dict[str, list[tuple[float, float]]]:
    """{metric: (step, value) of each log} of what a row names and the run has logged.

    A pattern that one metric alone fits shows nothing that its own panel would not.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    patterns = (row,) if isinstance(row, str) else row
    for pattern in patterns:
        for prefix in ("", "eval_"):
            for log in state.log_history:
                for name, value in log.items():
                    fits = fnmatch.fnmatchcase(name, prefix + pattern)
                    if fits and isinstance(value, (int, float)) and math.isfinite(value):
                        found.setdefault(name, []).append((log["step"], value))
    several = isinstance(row, str) and "*" in row
    return {} if several and len(found) < 2 else found


def _spread(state: Any) -> list[tuple[float, float, float]]:
    """(step, mean, std within a group) of the reward."""
    logs = [log for log in state.log_history if "reward" in log and "reward_std" in log]
    return [(log["step"], log["reward"], log["reward_std"]) for log in logs]


def trend(values: list[float]) -> list[float]:
    """Mean of each value and those before it, over a tenth of them all, three at least."""
    size = max(3, len(values) // _TREND)
    return [
        sum(values[max(0, i + 1 - size) : i + 1]) / len(values[max(0, i + 1 - size) : i + 1])
        for i in range(len(values))
    ]


def _panel(
    axes: Any,
    title: str,
    lines: dict[str, list[tuple[float, float]]],
    spread: list[tuple[float, float, float]] | None,
) -> None:
    if spread:
        steps, means, stds = zip(*spread, strict=True)
        low = [m - s for m, s in zip(means, stds, strict=True)]
        high = [m + s for m, s in zip(means, stds, strict=True)]
        axes.fill_between(steps, low, high, alpha=0.15, linewidth=0, label="+- std of a group")
    for name, points in lines.items():
        steps, values = zip(*points, strict=True)
        held = name.startswith("eval_")
        label = "eval" if held else name.removesuffix("/mean") if len(lines) > 1 else "train"
        (drawn,) = axes.plot(
            steps, values, "o--" if held else "-", label=label, alpha=0.45 if spread else 1.0
        )
        if spread and not held and len(values) > 3:
            axes.plot(steps, trend(list(values)), color=drawn.get_color(), label="trend")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    if len(axes.lines) + len(axes.collections) > 1:
        axes.legend(fontsize="small")
