"""Two processes against one: the same weights, metrics and resume."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_trainer import model

from grpo_fast.trainer import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
pytestmark = pytest.mark.slow
# completions depend on the prompt and the place in the window, not on the rank that samples them
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from tiny_trainer import count_w3, dataset, model, trainer
from grpo_fast import GRPOTrainer
from grpo_fast.rollout import Rollouts

class Canned(GRPOTrainer):
    def rollout(self, examples, *args, **kwargs):
        self.first = self.accelerator.process_index * len(examples)
        return super().rollout(examples, *args, **kwargs)

    def generate(self, examples, count):
        prompts = [self.encode(e["prompt"]) for e in examples for _ in range(count)]
        ids = []
        for place, prompt in enumerate(prompts, self.first):
            length = 1 + (place + sum(prompt)) % 9
            ids.append([3 + (7 * sum(prompt) + 5 * place * j) % 29 for j in range(length)])
        return Rollouts(prompts, ids, [len(c) % 2 == 0 for c in ids])

def reward(completions, log_metric, **_):
    log_metric("seen", len(completions))
    return [float(len(c.split()) % 4) if c else None for c in completions]

folder, size, sampled, resume = sys.argv[1:]
run = trainer(
    folder,
    reward=reward,
    cls=GRPOTrainer if sampled == "sampled" else Canned,
    per_device_train_batch_size=int(size),
    gradient_accumulation_steps=2,
    steps_per_generation=2,
    num_generations=4,
    num_iterations=2,
    optim="sgd",
    learning_rate=0.3,
    beta=0.1,
    mask_truncated_completions=True,
    train_dataset=dataset(1) * 6 if sampled == "sampled" else dataset(6),
    eval_dataset=dataset(3),
    eval_strategy="steps",
    eval_steps=4,
    save_strategy="steps",
    save_steps=1,
    max_steps=4,
    logging_steps=4,
    log_completions=True,
)
run.train(resume if resume != "-" else None)
run.save_model(folder + "/final")
"""


def start(folder, processes, size, sampled="canned", resume="-"):
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    arguments = [str(program), str(folder), str(size), sampled, str(resume)]
    path = os.pathsep.join([str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")])
    alone = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, *arguments],
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return load_file(folder / "final" / "model.safetensors")


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key: value for row in rows[:2] for key, value in row.items()}


def test_two_ranks_train_what_one_does(tmp_path):
    """A group of four lies on both ranks, and the ranks hold unequal numbers of tokens."""
    one = start(tmp_path / "one", 1, 6)
    two = start(tmp_path / "two", 2, 3)
    moved = [(one[n] - p).abs().max() for n, p in model().state_dict().items() if n in one]
    assert max(moved) > 1e-2
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    first, second = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert first.keys() == second.keys() and first["seen"] == 12 and second["seen"] == 6
    varying = ("seen", "step_time", "time", "runtime", "per_second", "active_rows")
    local = ("clip_ratio/low_min", "clip_ratio/high_max", "eval_")
    for key, value in first.items():
        if not any(key.endswith(v) for v in varying) and not key.startswith(local):
            assert second[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    table = sorted((tmp_path / "two" / "completions").iterdir())
    assert [p.name for p in table] == ["completions_00004.parquet"]


def test_ranks_sample_apart_and_resume_together(tmp_path):
    """All prompts are the same one: only the random state of the ranks can tell them apart."""
    whole = start(tmp_path / "whole", 2, 3, sampled="sampled")
    folder = tmp_path / "whole" / "checkpoint-1"
    assert checkpoint.problem(folder) is None
    windows = [load_file(folder / checkpoint.rank_file(r, "safetensors")) for r in (0, 1)]
    first, second = ({k.split(".")[-1]: v for k, v in w.items() if ".0." in k} for w in windows)
    assert torch.equal(first["input_ids"][:, 0], second["input_ids"][:, 0])
    assert not torch.equal(first["ids"], second["ids"])
    resumed = start(tmp_path / "resumed", 2, 3, sampled="sampled", resume=folder)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
