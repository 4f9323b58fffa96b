"""A tiny PPOTrainer for tests, and what they ask of its runs."""

from __future__ import annotations

import torch
from tiny_trainer import Recording, dataset, model, spread_reward, tokenizer

from grpo_fast import PPOConfig, PPOTrainer
from grpo_fast.trainer.reporting import Curves


class RecordingPPO(Recording, PPOTrainer):
    """PPO that keeps its windows, and the weights, gradients and losses of its steps."""


def config(folder, **overrides):
    settings = {
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "num_iterations": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return PPOConfig(output_dir=str(folder), **{**settings, **overrides})


def trainer(folder, reward=spread_reward, policy=None, cls=PPOTrainer, **overrides):
    own = ("peft_config", "optimizers", "eval_dataset")
    given = {name: overrides.pop(name) for name in own if name in overrides}
    run = cls(
        model() if policy is None else policy,
        reward,
        config(folder, **overrides),
        dataset(),
        processing_class=tokenizer(),
        **given,
    )
    run.remove_callback(Curves)
    return run


def logged(run, name):
    return [log[name] for log in run.state.log_history if name in log]


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)
