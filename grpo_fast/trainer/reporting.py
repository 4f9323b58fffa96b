"""What a run tells while it runs: metrics.jsonl and the line above the progress bar."""

from __future__ import annotations

import json
import math
import os
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
