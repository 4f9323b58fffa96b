"""What a run tells: metrics, metrics.jsonl, the table of completions, parquet files, curves."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

# Said once, where a sampler gives log-probs: with the default a gap of 0.003 nats a token leaves a
# completion of 400 tokens out.
CORRECTED = (
    "the sampler gave log-probs: the loss corrects by p(policy) / p(sampler), rollout_correction="
    "%r. A sequence-level mask leaves a whole completion out when its product leaves the bounds "
    "(rollout_ratio_min, rollout_ratio_max); token_truncate is the mild choice."
)

_ESCAPES = re.compile(
    r"\x1b[P\]^_X].*?(?:\x07|\x1b\\|\x9c)"  # strings: title, clipboard, device control
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # cursor, colour, erase
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Model text without terminal control sequences, control characters and direction overrides.

    New lines and tabs stay; lone surrogates, which no file can hold, become question marks.
    """
    text = _CONTROLS.sub("", _ESCAPES.sub("", text))
    return text.encode("utf-8", "replace").decode("utf-8")


class CompletionLog:
    """Completions between two logs: a table in the terminal and one parquet file for each log."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the rows."""
        self.rows: list[dict[str, Any]] = []

    def state_dict(self) -> list[dict[str, Any]]:
        """The rows that are still to be written, JSON-able."""
        return self.rows

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        self.rows = state

    def flush(self, accelerator: Any, folder: Path, step: int, limit: int | None) -> None:
        """Print and write the rows of all ranks on the main process, then forget them."""
        rows = self.rows
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rows = gather_object(rows)
        self.rows = []
        if rows and accelerator.is_main_process:
            write_parquet(rows, folder / f"completions_{step:05d}.parquet")
            print_table(rows, step, limit)


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows (prompt, completion, rewards, ...) as one parquet file, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    columns = {name: None for row in rows for name in row}
    table = pyarrow.table({name: [_storable(row.get(name)) for row in rows] for name in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    pyarrow.parquet.write_table(table, part)
    os.replace(part, path)


def _storable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def print_table(
    rows: list[dict[str, Any]], step: int, limit: int | None = None, console: Any = None
) -> None:
    """Print completions with their rewards; model text is stripped of control sequences."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = rows if limit is None else rows[:limit]
    columns = [name for name in {name: None for row in shown for name in row} if name != "step"]
    more = "" if len(shown) == len(rows) else f", {len(shown)} of {len(rows)}"
    table = Table(title=f"Completions, step {step}{more}", show_lines=True)
    for name in columns:
        table.add_column(Text(plain(name)))
    for row in shown:
        table.add_row(*(Text(_cell(row.get(name))) for name in columns))
    (console or Console()).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else plain(str(value))


class MetricsFile(TrainerCallback):
    """Every log as one line of output_dir/metrics.jsonl (NaN and infinity as null)."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Drop the lines that a resumed run writes again; a fresh run sets an older file aside."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        if state.global_step == 0:
            os.replace(self.path, self.path.with_suffix(".previous.jsonl"))
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(part, self.path)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Append one line."""
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, **logs}
        row = {k: None if _unprintable(v) else v for k, v in row.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _unprintable(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # a line torn by a kill: written again


# what one line in the terminal shows of a log; metrics.jsonl and the loggers get all of it
HEADLINE = (
    "loss",
    "reward",
    "eval_reward",
    "kl",
    "entropy",
    "completions/mean_length",
    "grad_norm",
    "step_time",
)


class Progress(ProgressCallback):
    """Transformers' progress bar, with one short line for each log instead of the whole dict."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Write the headline metrics above the bar."""
        if self.training_bar is None or not logs:
            return
        shown = [f"{name} {logs[name]:.4g}" for name in HEADLINE if name in logs]
        if shown:
            self.training_bar.write(f"step {state.global_step}: " + ", ".join(shown))


CURVES = (
    ("reward", "reward"),
    ("completions/mean_length", "completion length (tokens)"),
    ("kl", "KL to the reference (nats)"),
    ("entropy", "entropy (nats)"),
)


class Curves(TrainerCallback):
    """output_dir/curves.png: one panel for each row, drawn at saves and the end.

    Args:
        rows: (metric, title) for each panel.
    """

    def __init__(self, output_dir: str, rows: tuple[tuple[str, str], ...] = CURVES) -> None:
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
        from matplotlib.figure import Figure

        high = -(-len(self.rows) // 2)
        figure = Figure(figsize=(10, 3.5 * high))
        # fixed margins: a computed layout doubles the time of drawing
        edge = 0.14 / high
        figure.subplots_adjust(0.07, edge, 0.98, 1 - 0.7 * edge, wspace=0.2, hspace=0.3)
        panels = list(figure.subplots(high, 2).flat)
        for axes in panels[len(self.rows) :]:
            axes.set_axis_off()
        for axes, (key, title) in zip(panels, self.rows, strict=False):
            for prefix, style in (("", "-"), ("eval_", "o--")):
                name = prefix + key
                points = [(r["step"], r[name]) for r in state.log_history if name in r]
                if points:
                    axes.plot(
                        *zip(*points, strict=True), style, label="eval" if prefix else "train"
                    )
            axes.set(title=title, xlabel="optimizer step")
            axes.grid(alpha=0.3)
            if len(axes.lines) > 1:
                axes.legend()
            if not axes.lines:
                axes.text(0.5, 0.5, "not logged", ha="center", transform=axes.transAxes)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(".curves.part.png")
        figure.savefig(part, dpi=100)
        os.replace(part, self.path)
