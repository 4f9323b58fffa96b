"""PPO and GRPO side by side: `python tests/sweeps/full_ppo.py [--results FOLDER]`.

A Llama of two layers (tests/support/tiny_trainer.py) learns to say one word of 29: the reward is
the word's share of a completion. Windows of 16 completions, each used four times, 60 windows, three
seeds; GRPO samples groups of four. Writes ppo.json and ppo.png, and passes where the reward of
every run rises and the critic of every PPO run knows part of the returns while it learns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny_ppo
import tiny_trainer
import torch
from full import RESULTS
from matplotlib.figure import Figure

SEEDS = (1, 2, 3)
WINDOWS, USES = 60, 4
SETTINGS = {
    "reward": tiny_trainer.count_w3,
    "per_device_train_batch_size": 16,
    "num_iterations": USES,
    "max_steps": WINDOWS * USES,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
}
# the clip of the value holds a critic back whose policy learns within ten windows
PPO = {"kl_coef": 0.0, "cliprange_value": None}
ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "PPO, shared critic": (tiny_ppo.trainer, PPO),
    "PPO, separate critic": (tiny_ppo.trainer, {**PPO, "critic": "separate"}),
    "GRPO, groups of 4": (tiny_trainer.trainer, {"num_generations": 4}),
}
KEPT = ("reward", "explained_variance", "returns_variance")
COLOURS = ("tab:blue", "tab:cyan", "tab:orange")


def train(arm: str, seed: int, folder: str) -> dict[str, list[float]]:
    """One number for each window: the reward, and of PPO what its critic knew."""
    make, options = ARMS[arm]
    run = make(f"{folder}/{arm}-{seed}", seed=seed, **SETTINGS, **options)
    run.train()
    history = run.state.log_history
    return {name: [log[name] for log in history if name in log] for name in KEPT}


def ends(rewards: list[float]) -> tuple[float, float]:
    """Mean reward of the first two windows and of the last five."""
    return statistics.mean(rewards[:2]), statistics.mean(rewards[-5:])


def while_learning(curve: dict[str, list[float]]) -> float:
    """Median explained variance of the windows in which the reward is between .1 and .8."""
    pairs = zip(curve["reward"], curve["explained_variance"], strict=True)
    return statistics.median(share for reward, share in pairs if 0.1 < reward < 0.8)


def figures(curves: dict[str, list[dict[str, list[float]]]]) -> dict[str, float]:
    """The figures of the page: the worst of three seeds."""
    found = {}
    for arm, runs in curves.items():
        found[f"{arm}: reward of the first windows, largest"] = max(
            ends(r["reward"])[0] for r in runs
        )
        found[f"{arm}: reward of the last windows, smallest"] = min(
            ends(r["reward"])[1] for r in runs
        )
        if runs[0]["explained_variance"]:
            share = min(while_learning(r) for r in runs)
            found[f"{arm}: explained variance while it learns, smallest"] = share
    return {name: round(value, 3) for name, value in found.items()}


def picture(curves: dict[str, list[dict[str, list[float]]]], path: Path) -> None:
    """Reward and explained variance by window: a thin line for each seed, a thick one for their
    median."""
    figure = Figure(figsize=(10, 3.6))
    figure.subplots_adjust(0.06, 0.14, 0.99, 0.9, wspace=0.16)
    axes = figure.subplots(1, 2)
    titles = ("mean reward of a window", "explained variance of the returns")
    for panel, name, title in zip(axes, KEPT, titles, strict=False):
        for colour, (arm, runs) in zip(COLOURS, curves.items(), strict=True):
            if not runs[0][name]:
                continue
            for run in runs:
                panel.plot(run[name], color=colour, alpha=0.3, linewidth=0.8)
            middle = [
                statistics.median(values) for values in zip(*(r[name] for r in runs), strict=True)
            ]
            panel.plot(middle, color=colour, linewidth=2, label=arm)
        panel.set(title=title, xlabel=f"window of 16 completions, {USES} uses of each")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    # at the end the returns hardly vary, and the share falls far below 0
    axes[1].set_ylim(-1, 1)
    figure.savefig(path, dpi=80)


def main(argv: list[str] | None = None) -> int:
    """0 when every run learned, and every critic with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--numbers", type=Path)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curves = {arm: [train(arm, seed, folder) for seed in SEEDS] for arm in ARMS}
    found = figures(curves)
    rounded = {
        arm: [{n: [round(v, 4) for v in values] for n, values in run.items()} for run in runs]
        for arm, runs in curves.items()
    }
    (asked.results / "ppo.json").write_text(json.dumps(rounded), encoding="utf-8")
    picture(curves, asked.results / "ppo.png")
    for name, value in found.items():
        print(f"{name}: {value}")
    if asked.numbers:
        asked.numbers.write_text(json.dumps(found), encoding="utf-8")
    bounds = {"first windows": (-1.0, 0.1), "last windows": (0.8, 1.0), "explained": (0.3, 1.0)}
    missed = [
        name
        for name, value in found.items()
        for part, (low, high) in bounds.items()
        if part in name and not low < value <= high
    ]
    print(f"outside of what was expected: {missed}" if missed else "as expected")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
