"""A plan's setup as the YAML that `grpo-fast train --config` reads."""

from __future__ import annotations

import json
from typing import Any

from .step import StepPlan

_OPTIM = {
    "adamw": None,
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "sgd": "sgd",
}
_WRAP = "TRANSFORMER_BASED_WRAP"


def options_of(plan: StepPlan) -> dict[str, Any]:
    """The options of `grpo-fast train` that run this plan; dataset and reward are the user's.

    Args:
        plan: from `estimate`.
    """
    setup = plan.setup
    options: dict[str, Any] = {"model": plan.architecture.name.removesuffix("/config.json")}
    if setup.adapter:
        options["lora_r"] = setup.rank
    if setup.method == "qlora":
        options["quantization"] = "nf4"
    named = {"fp32": "float32", "bf16": "bfloat16"}[setup.weights]
    options["model_init_kwargs"] = {"dtype": named}
    options |= {
        "per_device_train_batch_size": setup.batch,
        "gradient_accumulation_steps": setup.accumulation,
        "num_generations": setup.generations,
        "max_completion_length": setup.completion,
        "beta": setup.beta,
    }
    if setup.sampled is not None:
        # a limit of what is sampled at once, or a window of several steps
        if setup.sampled < setup.batch * setup.accumulation:
            options["sampling_batch_size"] = setup.sampled
        else:
            options["steps_per_generation"] = setup.sampled // setup.batch
    if setup.checkpointing:
        kwargs = {"use_reentrant": False, **({"offload": True} if setup.offload else {})}
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    if setup.tile is not None:
        options["mlp_tile"] = setup.tile
    if _OPTIM[setup.optimizer] is not None:
        options["optim"] = _OPTIM[setup.optimizer]
    if setup.workspace_bytes is not None:
        options["workspace_bytes"] = setup.workspace_bytes
    if setup.sharding == "fsdp2":
        # a command line has no other way than this older name to switch it on
        options["fsdp"] = "full_shard"
        options["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": _WRAP,
            "reshard_after_forward": True,
        }
    return options


def as_yaml(plan: StepPlan, dataset: str | None = None, reward: str | None = None) -> str:
    """That, as text.

    Args:
        plan: from `estimate`.
        dataset, reward: of the run; None writes an example of each, to be replaced.
    """
    setup = plan.setup
    lines = [
        f"# {setup.method} of {plan.architecture.name}: {plan.total / 2**30:.1f} GiB planned on "
        f"each of {setup.ranks} GPU{'s' if setup.ranks > 1 else ''}",
        f"# for prompts of up to {setup.prompt} and completions of up to {setup.completion} tokens",
    ]
    if setup.ranks > 1:
        lines.append(f"# start it with: torchrun --nproc-per-node={setup.ranks} -m grpo_fast.cli "
                     "train --config FILE")  # fmt: skip
    for name, value, default in (
        ("dataset", dataset, "prompts.jsonl"),
        ("reward", reward, "rule:math"),
    ):
        note = "" if value is not None else f"  # yours: see grpo-fast train --help, {name}"
        lines.append(f"{name}: {json.dumps(value or default)}{note}")
    # JSON is YAML, and needs no package for it
    lines += [f"{name}: {json.dumps(value)}" for name, value in options_of(plan).items()]
    return "\n".join(lines) + "\n"
