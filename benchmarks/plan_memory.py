"""The planner against what a step holds: `python -m benchmarks.plan_memory [--write]`.

Twelve set-ups of a Qwen3 of 27 M parameters train for two steps of `GRPOTrainer` on this CPU, each
in a process of its own, and their peak resident memory above the interpreter is compared with what
`grpo_fast.plan` says from the config alone. `--write` keeps the figures in
benchmarks/results/plan/cpu.json, which tests/plan/test_step.py holds to 10 %, and writes the table
of docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers

from grpo_fast.cli.measure import measure
from grpo_fast.cli.step import totals
from grpo_fast.plan.architecture import of_config
from grpo_fast.plan.setup import Setup
from grpo_fast.plan.step import estimate

RESULT = Path(__file__).parent / "results" / "plan" / "cpu.json"
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
MARKS = (
    "<!-- written by `python -m benchmarks.plan_memory --write` -->\n",
    "<!-- end of table -->",
)
SHAPE = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
BASE = {
    "batch": 4,
    "accumulation": 2,
    "generations": 4,
    "prompt": 128,
    "completion": 128,
    "device": "cpu",
    "workspace_bytes": 64 << 20,
}
CKPT = {"checkpointing": True}
# what differs from BASE; two ranks are data parallel over gloo
CASES: dict[str, dict] = {
    "full": {},
    "full, checkpointing": CKPT,
    "full, one micro-batch": {"batch": 8, "accumulation": 1},
    "full, reference": {"beta": 0.1},
    "full, sgd, checkpointing, tiled MLP": {**CKPT, "optimizer": "sgd", "batch": 8,
                                            "accumulation": 1, "tile": 256},
    "full, 2 ranks": {"ranks": 2},
    "full, 2 ranks, checkpointing": {"ranks": 2, **CKPT},
    "lora": {"method": "lora"},
    "lora, checkpointing": {"method": "lora", **CKPT, "batch": 8, "accumulation": 1},
    "lora, 2 ranks": {"method": "lora", "ranks": 2},
    "nf4": {"method": "qlora"},
    "nf4, checkpointing": {"method": "qlora", **CKPT, "batch": 8, "accumulation": 1},
}  # fmt: skip


def architecture():
    """The model that is measured."""
    return of_config(transformers.Qwen3Config(**SHAPE), "a Qwen3 of 27 M parameters")


def table(cases: dict[str, dict]) -> str:
    """The figures as Markdown.

    Args:
        cases: of the result file.
    """
    rows = ["| set-up | planned MiB | measured MiB | planned / measured |", "|---|---|---|---|"]
    for name, case in cases.items():
        planned, measured = case["planned"]["step"], case["measured"]["step"]
        sizes = f"{planned / 2**20:.0f} | {measured / 2**20:.0f}"
        rows.append(f"| {name} | {sizes} | {planned / measured:.2f} |")
    return "\n".join(rows) + "\n"


def keep(name: str, row: dict[str, dict[str, int]]) -> None:
    """Write one case into the result file and the page, beside those that are there.

    Args:
        name: of the case.
        row: its planned and measured bytes, and the phases of the plan.
    """
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"machine": f"{platform.machine()} CPU, one thread", **versions}
    known = json.loads(RESULT.read_text())["cases"] if RESULT.is_file() else {}
    known[name] = row
    cases = {case: known[case] for case in CASES if case in known}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"about": about, "cases": cases}, indent=1) + "\n")
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table(cases) + MARKS[1] + rest.split(MARKS[1])[1])


def main() -> None:
    """Measure, print, and keep what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=tuple(CASES))
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    model = architecture()
    for name in asked.only or CASES:
        setup = Setup(**{**BASE, **CASES[name]})
        plan = estimate(model, setup)
        measured, planned = measure(model, setup), totals(plan)
        ratio = planned["step"] / measured["step"]
        sizes = f"{planned['step'] / 2**20:6.0f} {measured['step'] / 2**20:6.0f} MiB"
        print(f"{name:40s} {sizes} {ratio:.3f}", flush=True)
        if asked.write:
            keep(name, {"planned": planned, "measured": measured, "phases": plan.phases})


if __name__ == "__main__":
    main()
