"""What a run tells: metrics, metrics.jsonl, the table of completions, parquet files, curves."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback

# the loss's means over tokens, its counts, and extrema as the largest value of sign * metric
MEANS = ("kl", "entropy", "clip_low", "clip_high", "clip_ratio", "ratio_mean")
COUNTS = ("tokens", "active_rows", "nonfinite_tokens", "clamped_ratios")
EXTREMA = (("clip_low", -1.0), ("clip_high", 1.0), ("ratio_min", -1.0), ("ratio_max", 1.0))

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


class Metrics:
    """Metrics between two logs: host averages, and token statistics in one tensor on the device.

    Adding never synchronises with the device. `reduce` takes one gather of the tensor over the
    ranks and one transfer to the host; with several ranks also one gather of the host averages.
    """

    def __init__(self, device: torch.device) -> None:
        # sums over many tokens outgrow the integers that float32 holds; MPS has nothing wider
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything added so far."""
        self.host: dict[str, list] = {}
        sums = torch.zeros(len(MEANS) + len(COUNTS) + 1, dtype=self._dtype, device=self._device)
        extrema = torch.full((len(EXTREMA),), -math.inf, dtype=self._dtype, device=self._device)
        self.device = torch.cat([sums, extrema])

    def add(self, name: str, value: float, how: str = "mean") -> None:
        """Add a host number; how = mean (NaN is left out), min or max, over the adds and ranks."""
        value = float(value)
        entry = [value, 1, how] if not math.isnan(value) else [0.0, 0, how]
        self.host[name] = _merge(self.host.get(name), entry)

    def add_tokens(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one micro-batch of the loss; its means are weighted by its tokens."""
        with torch.no_grad():
            zero = metrics["tokens"].new_zeros((), dtype=self._dtype)
            get = {k: v.detach().to(self._dtype) for k, v in metrics.items()}
            tokens = get["tokens"]
            means = torch.stack([get.get(name, zero) for name in MEANS])
            means = torch.where(tokens > 0, means * tokens, torch.zeros_like(means))
            counts = torch.stack([get.get(name, zero) for name in COUNTS])
            sums = torch.cat([means, counts, torch.ones_like(means[:1])])
            extrema = torch.stack([sign * get[name] for name, sign in EXTREMA])
            extrema = torch.where(tokens > 0, extrema, torch.full_like(extrema, -math.inf))
            size = len(sums)
            highest = torch.maximum(self.device[size:], extrema)
            self.device = torch.cat([self.device[:size] + sums, highest])

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """All metrics over all ranks; `tokens/*` keys are the token statistics."""
        device, hosts = self.device[None], [self.host]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            device, hosts = accelerator.gather(device), gather_object(hosts)
        size = len(MEANS) + len(COUNTS) + 1
        values = torch.cat([device[:, :size].sum(0), device[:, size:].amax(0)]).tolist()
        merged: dict[str, list] = {}
        for host in hosts:
            for name, entry in host.items():
                merged[name] = _merge(merged.get(name), entry)
        out = {name: _value(entry) for name, entry in merged.items()}
        out.update(_token_metrics(values))
        return out

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: floats survive the way through text unchanged."""
        return {"host": self.host, "device": self.device.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.host = {name: list(entry) for name, entry in state["host"].items()}
        self.device = torch.tensor(state["device"], dtype=self._dtype, device=self._device)


def _merge(entry: list | None, other: list) -> list:
    if entry is None or not entry[1]:
        return list(other)
    if not other[1]:
        return entry
    pick: Callable = {"min": min, "max": max}.get(entry[2], lambda a, b: a + b)
    return [pick(entry[0], other[0]), entry[1] + other[1], entry[2]]


def _value(entry: list) -> float:
    total, count, how = entry
    if not count:
        return math.nan
    return total / count if how == "mean" else total


def _token_metrics(values: list[float]) -> dict[str, float]:
    names = (*MEANS, *COUNTS, "micro_batches")
    sums = dict(zip(names, values, strict=False))
    if not sums["micro_batches"]:
        return {}
    tokens = max(sums["tokens"], 1.0)
    out = {f"tokens/{name}": sums[name] / tokens for name in MEANS}
    out.update({f"tokens/{name}": sums[name] for name in COUNTS})
    for (name, sign), value in zip(EXTREMA, values[len(names) :], strict=True):
        suffix = "" if name.startswith("ratio") else ("_max" if sign > 0 else "_min")
        out[f"tokens/{name}{suffix}"] = sign * value if math.isfinite(value) else math.nan
    return out


def loss_metrics(
    values: dict[str, float], loss_type: str, kl: bool, ratios: bool
) -> dict[str, float]:
    """Token statistics under TRL's names, out of what `Metrics.reduce` returned.

    Means are over tokens; clip_ratio/low_min and high_max are extrema over micro-batches and ranks.
    active_rows is the share of tokens that had a gradient; nonfinite_tokens and clamped_ratios are
    counts. `ratios` adds ratio/{min,mean,max}.
    """
    if "tokens/tokens" not in values:
        return {}
    out = {
        "entropy": values["tokens/entropy"],
        "active_rows": values["tokens/active_rows"] / max(values["tokens/tokens"], 1.0),
        "nonfinite_tokens": values["tokens/nonfinite_tokens"],
        "clamped_ratios": values["tokens/clamped_ratios"],
    }
    if kl:
        out["kl"] = values["tokens/kl"]
    if loss_type == "cispo":
        out["cispo_clip_ratio"] = values["tokens/clip_high"]
    else:
        out["clip_ratio/low_mean"] = values["tokens/clip_low"]
        out["clip_ratio/low_min"] = values["tokens/clip_low_min"]
        out["clip_ratio/high_mean"] = values["tokens/clip_high"]
        out["clip_ratio/high_max"] = values["tokens/clip_high_max"]
        out["clip_ratio/region_mean"] = values["tokens/clip_ratio"]
    if ratios:
        out["ratio/min"] = values["tokens/ratio_min"]
        out["ratio/mean"] = values["tokens/ratio_mean"]
        out["ratio/max"] = values["tokens/ratio_max"]
    return out


def add_rollouts(
    metrics: Metrics, names: list[str], rewards: Tensor, total: Tensor, lengths: Tensor, cut: Tensor
) -> None:
    """Add the metrics of one generation batch.

    Args:
        names: (K) reward names.
        rewards: (B, K) of all ranks, NaN = unscorable.
        total: (P, G) weighted rewards, B = P * G.
        lengths: (B,) tokens of each completion.
        cut: (B,) bool, True where no end-of-sequence token came.
    """
    for column, name in enumerate(names):
        scored = rewards[:, column][~rewards[:, column].isnan()].double()
        metrics.add(f"rewards/{name}/mean", scored.mean() if len(scored) else math.nan)
        metrics.add(f"rewards/{name}/std", scored.std() if len(scored) > 1 else math.nan)
    metrics.add("reward", total.double().nanmean())
    stds = [group[~group.isnan()].double() for group in total]
    stds = [float(group.std()) for group in stds if len(group) > 1]
    metrics.add("reward_std", sum(stds) / len(stds) if stds else math.nan)
    flat = sum(1 for std in stds if std < 1e-8) + (len(total) - len(stds))
    metrics.add("frac_reward_zero_std", flat / len(total))
    for prefix, chosen in (("", lengths), ("terminated_", lengths[~cut])):
        if len(chosen):
            metrics.add(f"completions/mean_{prefix}length", chosen.double().mean())
            metrics.add(f"completions/min_{prefix}length", chosen.min(), "min")
            metrics.add(f"completions/max_{prefix}length", chosen.max(), "max")
    metrics.add("completions/clipped_ratio", cut.double().mean())


class CompletionLog:
    """Completions between two logs: a table in the terminal and one parquet file for each log."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

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
    """output_dir/curves.png: reward, completion length, KL, entropy; drawn at saves and the end."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / "curves.png"

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

        figure = Figure(figsize=(10, 7))
        # fixed margins: a computed layout doubles the time of drawing
        figure.subplots_adjust(0.07, 0.07, 0.98, 0.95, wspace=0.2, hspace=0.3)
        for axes, (key, title) in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
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
