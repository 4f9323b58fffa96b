"""The demo of the loop: SmolLM2-135M-Instruct learns sums from a reward model that learns with it.

The judge is the scorer of a reasoning-gym task, so that every number of the report is verifiable.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from grpo_fast.rewards import reasoning_gym_reward
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.iterative import IterativeGRPO
from grpo_fast.trainer.iterative_config import IterativeConfig
from grpo_fast.trainer.reward_config import RewardModelConfig

from .demo import TASK, questions, weights

ROWS = 200
# set for two CPU cores; every one can be overridden on the command line
LOOP: dict[str, Any] = {
    "output_dir": "runs/iterate-demo",
    "seed": 0,
    "iterations": 2,
    "collect_prompts": 48,
    "held_out_prompts": 24,
}
POLICY: dict[str, Any] = {
    "max_steps": 10,
    "logging_steps": 5,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "max_completion_length": 5,
    "save_strategy": "no",
    "report_to": "none",
}
REWARD: dict[str, Any] = {
    "num_train_epochs": 2,
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant",
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
}


def run(loop: dict[str, Any], policy: dict[str, Any]) -> None:
    """Run the demo's loop, and print its report.

    Args:
        loop: fields of `IterativeConfig` that replace `LOOP`.
        policy: fields of `GRPOConfig` that replace `POLICY`.

    Raises:
        ValueError: when a package is missing (with the command that installs it) or a field is bad.
    """
    started = time.perf_counter()
    folder, gguf_file = weights()
    args = IterativeConfig(**{**LOOP, **loop})
    policy_args = GRPOConfig(**{**POLICY, **policy, "output_dir": args.output_dir})
    kwargs = policy_args.model_init_kwargs or {}
    policy_args.model_init_kwargs = {**kwargs, "gguf_file": gguf_file}
    rows, _ = questions(args.seed)
    made = IterativeGRPO(
        str(folder),
        reasoning_gym_reward(TASK),
        args,
        rows.select(range(ROWS)),
        policy_args,
        RewardModelConfig(output_dir=args.output_dir, use_cpu=policy_args.use_cpu, **REWARD),
    )
    print(f"SmolLM2-135M-Instruct on reasoning-gym's {TASK}, {args.iterations} iterations")
    reports = made.train()
    for report in reports:
        print(
            f"iteration {report['iteration']}: judge {report['judge_before']:.3f} -> "
            f"{report['judge']:.3f}, reward {report['reward_before']:.2f} -> "
            f"{report['reward']:.2f}, accuracy on held-out sets {report['accuracy']}"
        )
    print(f"report: {Path(args.output_dir) / 'report' / 'index.md'}")
    print(f"{time.perf_counter() - started:.0f} s in all")
