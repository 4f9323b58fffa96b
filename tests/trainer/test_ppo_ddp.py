"""PPO on two processes against one: whitening, explained variance, KL and every weight."""

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

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys, torch
torch.set_num_threads(1)
from tiny_trainer import dataset, model, tokenizer
from grpo_fast import PPOConfig, PPOTrainer
from grpo_fast.rollout import Rollouts

class Canned(PPOTrainer):
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

def reward(completions, **_):
    return [float(len(c.split()) % 4) if c else None for c in completions]

folder, size, critic = sys.argv[1:]
args = PPOConfig(
    folder, per_device_train_batch_size=int(size), num_iterations=3, max_completion_length=10,
    optim="sgd", learning_rate=0.1, max_steps=6, logging_steps=1, save_strategy="no",
    critic=critic, value_warmup_steps=1, target_kl=1e-4, kl_controller="doubling", kl_target=1e-3,
    shuffle_dataset=False, disable_tqdm=True, use_cpu=True,
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
)
run = Canned(model(), reward, args, dataset(8), processing_class=tokenizer())
run.train()
run.save_model()
"""


def run(folder, ranks, size, critic):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        own = {}
        if ranks > 1:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**shared, **{k: str(v) for k, v in own.items()}}
        command = [sys.executable, "-c", PROGRAM, str(folder), str(size), critic]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()[-3000:]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    state = load_file(folder / "model.safetensors") | load_file(
        folder / "critic" / "critic.safetensors"
    )
    return state, [json.loads(line) for line in lines]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_two_ranks_equal_one(tmp_path, critic):
    """A window of eight completions, some of them not judged; a step of warm-up, and steps that
    the KL drops on both ranks alike."""
    one, first = run(tmp_path / "one", 1, 8, critic)
    two, second = run(tmp_path / "two", 2, 4, critic)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)
    for name in ("explained_variance", "returns_variance", "kl_per_completion", "kl_coef"):
        pairs = [(a[name], b[name]) for a, b in zip(first, second, strict=True) if name in a]
        assert pairs and [b for _, b in pairs] == pytest.approx([a for a, _ in pairs], rel=1e-3)
    skipped = [
        [log["skipped_steps"] for log in logs if "skipped_steps" in log] for logs in (first, second)
    ]
    assert skipped[0] == skipped[1] and skipped[0][-1] > 0
