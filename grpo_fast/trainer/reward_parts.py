"""Parts of a reward model's run: order of the sets, averages between logs, callbacks, checks."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Sampler
from transformers import TrainerCallback

from grpo_fast.checks import fail

from .reporting import Progress
from .reward_config import RewardModelConfig


class EpochOrder(Sampler[int]):
    """Every index once; the order depends on (seed, epoch) alone, not on global random state."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle, self.epoch = size, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        if self.shuffle:
            random.Random(f"{self.seed}:{self.epoch}").shuffle(order)
        return iter(order)


class Order(TrainerCallback):
    """Tells the sampler of the epoch: set_epoch does not reach it in all of Accelerate's wraps."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Set the order."""
        self.trainer.order.set_epoch(int(state.epoch or 0))


class Sums:
    """Weighted averages between two logs."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.values: dict[str, list[float]] = {}

    def add(self, name: str, value: float, weight: float) -> None:
        """Add a number; NaN is left out."""
        if math.isnan(value):
            return
        old = self.values.get(name, [0.0, 0.0])
        self.values[name] = [old[0] + value * weight, old[1] + weight]

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """The averages over all ranks."""
        parts = [self.values]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            parts = gather_object(parts)
        total: dict[str, list[float]] = {}
        for part in parts:
            for name, (value, weight) in part.items():
                old = total.get(name, [0.0, 0.0])
                total[name] = [old[0] + value, old[1] + weight]
        return {name: value / weight for name, (value, weight) in total.items() if weight}

    def state_dict(self) -> dict[str, list[float]]:
        """The sums by name."""
        return self.values

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore what `state_dict` returned."""
        self.values = {name: list(entry) for name, entry in state.items()}


_HEADLINE = ("loss", "accuracy", "margin", "eval_loss", "eval_accuracy", "eval_longer_accuracy")


class RewardProgress(Progress):
    """The progress bar with one short line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Write the headline metrics above the bar."""
        if self.training_bar is None or not logs:
            return
        shown = [f"{name} {logs[name]:.4g}" for name in _HEADLINE if name in logs]
        if shown:
            self.training_bar.write(f"step {state.global_step}: " + ", ".join(shown))


_CURVES = (
    ("loss", "loss (nats)"),
    ("accuracy", "accuracy on ordered pairs"),
    ("margin", "score of the better answer minus the worse"),
    ("score_mean", "mean score"),
)


class RewardCurves(TrainerCallback):
    """output_dir/curves.png: loss, accuracy, margin, mean score; drawn at saves and the end."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / "curves.png"

    def on_save(self, args, state, control, **kwargs) -> None:
        """Redraw."""
        self._draw(state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Redraw."""
        self._draw(state)

    def _draw(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 7))
        figure.subplots_adjust(0.07, 0.07, 0.98, 0.95, wspace=0.2, hspace=0.3)
        for axes, (key, title) in zip(figure.subplots(2, 2).flat, _CURVES, strict=True):
            for prefix, style in (("", "-"), ("eval_", "o--")):
                name = prefix + key
                points = [(row["step"], row[name]) for row in state.log_history if name in row]
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=prefix.strip("_") or "train")
            axes.set(title=title, xlabel="optimizer step")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(".curves.part.png")
        figure.savefig(part, dpi=100)
        os.replace(part, self.path)


def check_parts(args: Any, model: Any, train_dataset: Any, peft_config: Any) -> None:
    """Refuse arguments of a wrong kind before a file is read.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(args, RewardModelConfig):
        fail("args", "a RewardModelConfig", type(args).__name__)
    if args.n_gpu > 1:
        hint = "start one process for each with torchrun or accelerate launch."
        fail("args", "one GPU in a process", f"{args.n_gpu} GPUs", hint)
    if not isinstance(model, (str, nn.Module)):
        fail("model", "a name, a path or a model", type(model).__name__)
    if args.model_init_kwargs and not isinstance(model, str):
        fail("model_init_kwargs", "None with a model that is built already", args.model_init_kwargs)
    if peft_config is not None and hasattr(model, "peft_config"):
        fail("peft_config", "None with a PeftModel", type(peft_config).__name__)
    sized = hasattr(train_dataset, "__len__") and hasattr(train_dataset, "__getitem__")
    if not sized or isinstance(train_dataset, (str, dict)):
        expected = "a dataset or a list of rows"
        fail("train_dataset", expected, type(train_dataset).__name__, "see load_preferences.")
