"""A step of GRPOTrainer with prompts computed once, against the same without, and against TRL's.

`python -m benchmarks.measure.shared_prompts LAYERS` trains the first layers of
SmolLM2-135M-Instruct, which has 30, on a CPU with one prompt of 512 tokens and eight completions of
64, and writes `benchmarks/results/packing/shared-prompts.json` and
`shared-prompts.md`. Contestants take turns in one process, and what is counted is its CPU time, so
that other work on the machine changes little. What a step holds: `benchmarks/measure/step.py`.
TRL is a contestant where it can be imported.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.step import differences, reason, trainer
from benchmarks.measure.turns import Turns
from benchmarks.step_cases import StepCase, sample, smollm2
from grpo_fast.models.loading import load_policy, load_processing

CASE = StepCase("smollm2-step-shared", P=1, G=8, T=64, prompt=512, micro=8)
# name -> which trainer, and how its packer is changed
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo_fast": ("grpo_fast", {}),
    "grpo_fast, prompts repeated": ("grpo_fast", {"segments": False}),
    "TRL": ("TRL", {}),
}
WARM_UP, ROUNDS = 1, 1
_RESULTS = Path(__file__).resolve().parents[1] / "results" / "packing"


def first_layers(layers: int, folder: str) -> Path:
    """SmolLM2-135M-Instruct cut after its first layers, saved in a folder."""
    load_policy(str(smollm2()), num_hidden_layers=layers).save_pretrained(folder)
    load_processing(str(smollm2())).save_pretrained(folder)
    return Path(folder)


def measure(checkpoint: Path, case: StepCase = CASE, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """CPU seconds of every contestant's steps, and how far the first is from each of the others."""
    device = torch.device("cpu")
    text = sample(case, checkpoint, device)
    start = load_policy(str(checkpoint))
    built = {}
    for name, (library, changes) in CONTESTANTS.items():
        if reason(library) is None:
            built[name] = trainer(library, case, text, checkpoint, device, WARM_UP + rounds)
            if changes:
                built[name].packer = replace(built[name].packer, **changes)
    times: dict[str, list[float]] = {name: [] for name in built}
    with contextlib.ExitStack() as stack:
        runs = {
            name: stack.enter_context(contextlib.closing(Turns(one, device)))
            for name, one in built.items()
        }
        for k in range(WARM_UP + rounds):
            for name, run in runs.items():
                began = time.process_time()
                run.window()
                times[name].append(time.process_time() - began)
                print(f"{name}: step {k + 1}: {times[name][-1]:.1f} CPU s", flush=True)
        first = next(iter(runs.values()))
        return [
            {
                "peer": name,
                "cpu_s": times[name][WARM_UP:],
                "difference": None if run is first else differences(first, run, start),
            }
            for name, run in runs.items()
        ]


def page(found: list[dict[str, Any]], layers: int, case: StepCase = CASE) -> str:
    """The table of the results."""
    ours = statistics.median(found[0]["cpu_s"])
    rows = [
        f"# A step with prompts computed once: P = {case.prompt}, G = {case.G}, C = {case.T}",
        "",
        f"The first {layers} of 30 layers of SmolLM2-135M-Instruct, fp32, "
        f"torch {torch.__version__}, one thread of a CPU shared with other work; CPU "
        "seconds of an optimizer step without its sampling, median of "
        f"{len(found[0]['cpu_s'])} after {WARM_UP}. Measure again: "
        f"`python -m benchmarks.measure.shared_prompts {layers}`.",
        "",
        "| trainer | CPU s | over ours | loss, relative difference | gradient norm |",
        "|---|---|---|---|---|",
    ]
    for record in found:
        seconds, gap = statistics.median(record["cpu_s"]), record["difference"]
        told = f"{gap['loss']:.1e} | {gap['grad_norm']:.1e}" if gap else "- | -"
        rows.append(f"| {record['peer']} | {seconds:.1f} | {seconds / ours:.2f} | {told} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with tempfile.TemporaryDirectory() as cut:
        results = measure(first_layers(count, cut))
    (_RESULTS / "shared-prompts.json").write_text(json.dumps(results, indent=1) + "\n")
    (_RESULTS / "shared-prompts.md").write_text(page(results, count))
