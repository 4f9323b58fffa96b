"""One rank of `test_trainer_ddp.py`: `python ddp_worker.py JSON`, a list of keywords of `train`,
with the environment that torchrun gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tiny_trainer import dataset, trainer

from grpo_fast import GRPOTrainer
from grpo_fast.rollout import Rollouts


class Canned(GRPOTrainer):
    """Completions depend on the prompt and the place in the window, not on the rank that samples
    them."""

    def rollout(self, examples, *args, **kwargs):
        """Notes where in the window this rank's examples begin."""
        self.first = self.accelerator.process_index * len(examples)
        return super().rollout(examples, *args, **kwargs)

    def generate(self, examples, count):
        """One completion for each place."""
        prompts = [self.encode(e["prompt"]) for e in examples for _ in range(count)]
        ids = []
        for place, prompt in enumerate(prompts, self.first):
            length = 1 + (place + sum(prompt)) % 9
            ids.append([3 + (7 * sum(prompt) + 5 * place * j) % 29 for j in range(length)])
        return Rollouts(prompts, ids, [len(c) % 2 == 0 for c in ids])


def reward(completions, log_metric, **_):
    """Of the length alone; an empty completion cannot be judged."""
    log_metric("seen", len(completions))
    return [float(len(c.split()) % 4) if c else None for c in completions]


def first_is_flat(completions, prompts, **_):
    """The same for all completions of the prompts that begin with an even word."""
    lengths = [float(len(c.split()) % 4) for c in completions]
    even = [int(p.split()[0][1:]) % 2 == 0 for p in prompts]
    return [1.0 if flat else n for flat, n in zip(even, lengths, strict=True)]


def train(
    folder: str | Path,
    size: int,
    sampled: bool = False,
    resume: str | None = None,
    options: dict | None = None,
) -> None:
    """Four optimizer steps with `size` sequences on this rank, saved under `folder`/final."""
    options = dict(options or {})
    # a group of four on each rank, of which every second one is flat
    flat = options.pop("flat", False)
    if flat:
        options.update(gradient_accumulation_steps=1, steps_per_generation=1, eval_strategy="no")
    settings = {
        "cls": GRPOTrainer if sampled else Canned,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
        "num_generations": 4,
        "num_iterations": 2,
        "optim": "sgd",
        "learning_rate": 0.3,
        "beta": 0.1,
        "mask_truncated_completions": True,
        "train_dataset": dataset(1) * 6 if sampled else dataset(6),
        "eval_dataset": dataset(3),
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "logging_steps": 4,
        "log_completions": True,
    }
    chosen = first_is_flat if flat else reward
    run = trainer(str(folder), reward=chosen, **{**settings, **options})
    run.train(resume)
    run.save_model(f"{folder}/final")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for keywords in json.loads(sys.argv[1]):
        train(**keywords)
