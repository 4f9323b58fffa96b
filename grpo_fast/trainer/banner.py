"""What a run says at its beginning and at its end, in lines of at most 80 columns."""

from __future__ import annotations

import textwrap
import time
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import TrainerCallback

from grpo_fast import __version__
from grpo_fast.checks import ArgumentError
from grpo_fast.config import LossConfig
from grpo_fast.models.head import find_head, innermost
from grpo_fast.plan.route import choose
from grpo_fast.plan.shape import facts_of_shape

_WIDTH = 80
_MARGIN = 9


class Banner(TrainerCallback):
    """A block of lines when training begins and one when it has ended, on the main process.

    Silent with `disable_tqdm`, as the progress bar is.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Say what is about to be done."""
        self.began, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero and not args.disable_tqdm:
            tqdm.write(opening(self.trainer))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Say what was done, unless a signal has cut it short."""
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        if self.trainer.stopping.stopped is None:
            steps = state.global_step - self.first
            tqdm.write(closing(self.trainer, steps, time.monotonic() - self.began))


def opening(trainer: Any) -> str:
    """Model, data, loss, memory, folder and versions of a run that begins."""
    args, state = trainer.args, trainer.state
    lines = [
        ("model", _model(trainer)),
        ("data", _data(trainer)),
        ("loss", _loss(trainer)),
        ("folder", f"{args.output_dir}: metrics.jsonl, curves.png, checkpoints"),
        (
            "versions",
            f"grpo_fast {__version__}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}; seed {args.seed}",
        ),
    ]
    if state.global_step:
        lines.insert(0, ("resume", f"after step {state.global_step} of {state.max_steps}"))
    return _block(lines)


def closing(trainer: Any, steps: int, seconds: float) -> str:
    """Time, reward and files of a run that has ended."""
    args, state = trainer.args, trainer.state
    each = f", {seconds / steps:.3g} s a step" if steps else ""
    lines = [("done", f"{steps} steps in {_duration(seconds)}{each}")]
    logs = [log["reward"] for log in state.log_history if "reward" in log]
    if logs:
        quarter = max(1, len(logs) // 4)
        first, last = (sum(part) / quarter for part in (logs[:quarter], logs[-quarter:]))
        lines.append(
            ("reward", f"{first:.3f} -> {last:.3f}, the first and the last quarter of the logs")
        )
    held = [log["eval_reward"] for log in state.log_history if "eval_reward" in log]
    if held:
        lines.append(("held out", f"reward {held[0]:.3f} -> {held[-1]:.3f}"))
    folder = Path(args.output_dir)
    kept = [name for name in ("metrics.jsonl", "curves.png") if (folder / name).exists()]
    kept += ["completions/"] if (folder / "completions").is_dir() else []
    lines.append(("folder", f"{folder}: {', '.join(kept)}" if kept else str(folder)))
    return _block(lines)


def _block(lines: list[tuple[str, str]]) -> str:
    out = []
    for name, text in lines:
        wrapped = textwrap.wrap(text, _WIDTH - _MARGIN, break_long_words=False) or [""]
        out.append(f"{name:<{_MARGIN}}{wrapped[0]}")
        out += [" " * _MARGIN + line for line in wrapped[1:]]
    return "\n".join(out)


def _model(trainer: Any) -> str:
    lm = innermost(trainer.model)
    counts = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, grad in counts if grad)
    name = getattr(lm.config, "_name_or_path", "") or type(lm).__name__
    dtype = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    mixed = "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else ""
    precision = f"{dtype} weights" + (f", {mixed} autocast" if mixed else "")
    ranks = trainer.accelerator.num_processes
    where = str(trainer.args.device) + (f" x {ranks} processes" if ranks > 1 else "")
    share = f"{100 * trained / max(total, 1):.3g} % trained"
    return f"{Path(name).name or name}, {_count(total)} parameters, {share}; {precision} on {where}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _data(trainer: Any) -> str:
    args, state = trainer.args, trainer.state
    size = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    step *= trainer.accelerator.num_processes
    groups = f"{step / args.num_generations:g} prompts x {args.num_generations} completions"
    rows = "prompts as they come" if size is None else f"{size} prompts"
    reuse = f", each used {args.num_iterations} times" if args.num_iterations > 1 else ""
    return (
        f"{rows}; a step takes {groups} of at most {args.max_completion_length} tokens{reuse}; "
        f"{state.max_steps} steps"
    )


def _loss(trainer: Any) -> str:
    args, config = trainer.args, trainer.loss_config
    head = find_head(innermost(trainer.model))
    V, H = head.weight.shape
    kl = f", KL {config.kl_estimator} x {config.beta:g}" if config.beta else ""
    owned = ("importance_sampling_level", "epsilon_high", "max_completion_length")
    asked = Namespace(
        **{f.name: getattr(config, f.name) for f in fields(LossConfig) if f.name not in owned},
        level=config.importance_sampling_level,
        tokens=args.per_device_train_batch_size * args.max_completion_length,
        longest=args.max_completion_length,
        active=1.0,
        dtype="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        device=args.device.type,
        workspace_bytes=args.workspace_bytes,
        lora_rank=0,
        frozen_head=not head.weight.requires_grad,
        no_grad=False,
        old_logp=not args.on_policy,
        rollout_logp=args.sampler != "hf",
    )
    try:
        plan = choose(facts_of_shape(asked, H, V))
    except ArgumentError:
        # a shape that has no plan: the loss says what it does itself
        return f"{config.loss_type}{kl}"
    size = plan.workspace_bytes / 2**20
    return (
        f"{config.loss_type}{kl}; route {plan.route}, at most {plan.nhv:.2f} NHV; "
        f"{size:.0f} MiB of logits at once (V = {V}, H = {H})"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
