"""Policy and reward model on a task whose first reward model is poor on purpose.

A tiny policy writes words; the judge counts w3 among the first four. The first reward model has
been taught that long answers are good. A rise of the judge's score counts from 0.1 on.
With retraining the judge's score rises; the control keeps
the first reward model, and its reward rises while the judge's score does not. Three seeds each:

    PYTHONPATH=.:tests/support python tests/sweeps/full_iterative.py --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import tiny_trainer
import torch

from grpo_fast import GRPOConfig, IterativeGRPO, RewardModelConfig, RewardModelTrainer
from grpo_fast.trainer.iterative_config import IterativeConfig

ITERATIONS, SEEDS = 3, (0, 1, 2)
COMMON = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1000,
    "lr_scheduler_type": "constant",
}


def judge(completions: list[str], **_: Any) -> list[float]:
    """w3 among the first four words, minus a quarter of the words beyond eight."""
    out = []
    for text in completions:
        words = text.split()
        out.append(words[:4].count("w3") / 4 - 0.05 * max(0, len(words) - 8))
    return out


def poor_reward(folder: Path, source: str, seed: int) -> str:
    """A reward model that has been taught that longer answers are better."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in tiny_trainer.dataset(29):
        words = torch.randint(0, 29, (30,), generator=generator).tolist()
        text = [f" w{w}" for w in words]
        answers = ["".join(text[:n]) for n in (2, 5, 9, 12)]
        rows.append({"prompt": row["prompt"], "completions": answers, "scores": [0, 1, 2, 3]})
    args = RewardModelConfig(
        output_dir=str(folder / "run"),
        num_train_epochs=12,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        seed=seed,
        **COMMON,
    )
    trainer = RewardModelTrainer(source, args, rows)
    trainer.train()
    trainer.save_model(str(folder / "poor"))
    return str(folder / "poor")


def run(folder: Path, seed: int, retrain: bool) -> list[dict[str, Any]]:
    """The reports of one loop."""
    source = tiny_trainer.checkpoint(folder / "policy", seed=seed)
    loop = IterativeGRPO(
        source,
        judge,
        IterativeConfig(
            output_dir=str(folder / "loop"),
            iterations=ITERATIONS,
            collect_prompts=24,
            held_out_prompts=12,
            validation_split=0.3,
            retrain=retrain,
            seed=seed,
        ),
        tiny_trainer.dataset(64),
        GRPOConfig(
            output_dir=str(folder / "loop"),
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=12,
            max_steps=25,
            learning_rate=3e-3,
            **COMMON,
        ),
        RewardModelConfig(
            output_dir=str(folder / "loop"),
            num_train_epochs=10,
            learning_rate=3e-3,
            per_device_train_batch_size=8,
            **COMMON,
        ),
        poor_reward(folder, source, seed),
    )
    return loop.train()


def draw(path: Path, found: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Judge's score, reward and accuracy on new data, one line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4))
    figure.subplots_adjust(0.06, 0.14, 0.98, 0.9, wspace=0.22)
    panels = (
        ("judge", "judge's score, held-out prompts"),
        ("gain", "reward after minus before, own model"),
        ("accuracy_new", "reward model's accuracy on the new data"),
    )
    for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for (arm, runs), colour in zip(found.items(), ("C0", "C3"), strict=True):
            for index, reports in enumerate(runs):
                ys = [
                    r["reward"] - r["reward_before"] if key == "gain" else r[key] for r in reports
                ]
                xs = list(range(1, len(ys) + 1))
                if key == "judge":
                    xs, ys = [0, *xs], [reports[0]["judge_before"], *ys]
                label = arm if index == 0 else None
                axes.plot(
                    xs,
                    [float("nan") if y is None else y for y in ys],
                    "o-",
                    color=colour,
                    label=label,
                )
        axes.set(title=title, xlabel="iteration")
        axes.set_xticks(range(0 if key == "judge" else 1, ITERATIONS + 1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=90)


def numbers(found: dict[str, list[list[dict[str, Any]]]]) -> dict[str, float]:
    """What the sweep is judged by."""
    out = {}
    for arm, runs in found.items():
        for seed, reports in zip(SEEDS, runs, strict=True):
            out[f"{arm} {seed}: judge first"] = reports[0]["judge_before"]
            out[f"{arm} {seed}: judge last"] = reports[-1]["judge"]
            out[f"{arm} {seed}: reward first"] = reports[0]["reward_before"]
            out[f"{arm} {seed}: reward last"] = reports[-1]["reward"]
            accuracies = [r["accuracy_new"] for r in reports]
            out[f"{arm} {seed}: accuracy first"] = accuracies[0]
            out[f"{arm} {seed}: accuracy last"] = accuracies[-1]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where iterative.json and iterative.png go")
    parser.add_argument("--numbers", type=Path, help="a flat JSON object of the figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    found: dict[str, list[list[dict[str, Any]]]] = {"retrained": [], "control": []}
    for arm, runs in found.items():
        for seed in given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(run(Path(folder), seed, arm == "retrained"))
    out = numbers(found) if tuple(given.seeds) == SEEDS else {}
    print(json.dumps(out or found, indent=1))
    if given.numbers:
        given.numbers.write_text(json.dumps(out))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        draw(given.out / "iterative.png", found)
        (given.out / "iterative.json").write_text(json.dumps(out, indent=1) + "\n")
    good = [r[-1]["judge"] > r[0]["judge_before"] + 0.1 for r in found["retrained"]] + [
        r[-1]["reward"] > r[0]["reward_before"] and r[-1]["judge"] < r[0]["judge_before"] + 0.1
        for r in found["control"]
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
