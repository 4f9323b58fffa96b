"""A tiny random Qwen3 for TRL's trainers, and what two of them did compared step by step."""

from __future__ import annotations

import contextlib
import math
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_trainer import VOCAB, dataset, spread_reward
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_fast.models.loading import load_processing

COMPARED = ("grad_norm", "kl", "entropy", "cispo_clip_ratio", "policy_loss")
COMPARED += tuple(f"clip_ratio/{n}" for n in ("low_mean", "high_mean", "region_mean"))
COMPARED += ("clip_ratio/low_min", "clip_ratio/high_max", "vespo/phi_seq_mean", "entropy_coef")
# A loss is a sum of advantages of both signs and a KL is exp(d) - d - 1: what is left over of terms
# near 1, each of them rounded to 1.2e-7 in fp32. This floor allows 5e-7 for them.
FLOOR = 5e-2


def settings(**overrides: Any) -> dict[str, Any]:
    """Small batches and steps large enough that ratios leave their bounds."""
    given = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "temperature": 0.9,
        "epsilon": 0.02,
        "epsilon_high": 0.03,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_steps": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
        "use_cpu": True,
        "seed": 3,
    }
    return {**given, **overrides}


def lora(**overrides: Any) -> LoraConfig:
    """Adapters on all projections of the layers, none on the head; B is not 0 at the start."""
    return LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
        **overrides,
    )


def recording(cls: type) -> type:
    """`cls`, which also keeps the text that it trains on and the unrounded losses."""

    class Recorded(cls):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            out = super()._generate_and_score_completions(inputs)
            self.__dict__.setdefault("texts", []).append(out["completion_ids"].clone())
            return out

        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            self.__dict__.setdefault("losses", []).append(loss.item())
            return loss

    return Recorded


def trainer(
    cls: type,
    path: str,
    *,
    use_lora: bool = False,
    reward: Any = spread_reward,
    rows: list[dict[str, Any]] | None = None,
    **overrides: Any,
) -> Any:
    """A trainer of `cls` on the tiny checkpoint and its words, or on other rows and their reward
    with the tokenizer of the checkpoint."""
    folder = tempfile.TemporaryDirectory(prefix="grpo-trl-")
    built = recording(cls)(
        path,
        reward,
        GRPOConfig(output_dir=folder.name, **settings(**overrides)),
        train_dataset=Dataset.from_list(rows or dataset(16)),
        eval_dataset=Dataset.from_list(dataset(2)),
        processing_class=load_processing(path),
        peft_config=lora() if use_lora else None,
    )
    built.remove_callback(PrinterCallback)
    # removed together with the trainer
    built.folder = folder
    return built


def run(cls: type, path: str, **overrides: Any) -> Any:
    """A trainer after its steps."""
    built = trainer(cls, path, **overrides)
    with contextlib.redirect_stdout(None):
        built.train()
    return built


def steps(one: Any) -> list[dict[str, float]]:
    """What was logged of every optimizer step."""
    return [log for log in one.state.log_history if "grad_norm" in log]


def relative(name: str, ours: float | None, theirs: float | None) -> float:
    """Difference relative to theirs, or to the floor if that is larger."""
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else math.inf
    floor = FLOOR if name in ("kl", "policy_loss") else 1e-6
    return far(ours - theirs) / max(abs(theirs), floor)


def far(gap: float) -> float:
    """Its size, where a NaN is as far as can be: `max` would drop it."""
    return math.inf if math.isnan(gap) else abs(gap)


def differences(ours: Any, theirs: Any) -> dict[str, float]:
    """Largest relative difference of each logged name over all steps, and whether the text is the
    same (0 or infinity)."""
    pairs = list(zip(steps(ours), steps(theirs), strict=True))
    out = {}
    for name in COMPARED:
        if any((name in a) != (name in b) for a, b in pairs):
            out[name] = math.inf
        elif name in pairs[0][0]:
            out[name] = max(relative(name, a[name], b[name]) for a, b in pairs)
    # of the largest in the run: a loss is a sum of advantages of both signs
    scale = max(map(abs, theirs.losses), default=0.0)
    losses = zip(ours.losses, theirs.losses, strict=True)
    out["loss"] = max(far(a - b) for a, b in losses) / max(scale, FLOOR)
    texts = zip(ours.texts, theirs.texts, strict=True)
    out["text"] = 0.0 if all(torch.equal(a, b) for a, b in texts) else math.inf
    return out


def both(path: str, **overrides: Any) -> tuple[Any, Any]:
    """Ours and TRL's after the same steps."""
    from grpo_fast.integrations.trl.trainer import FastGRPOTrainer

    return run(FastGRPOTrainer, path, **overrides), run(GRPOTrainer, path, **overrides)


def fabricated(one: Any, per_token: bool) -> dict[str, Any]:
    """Inputs of `_compute_loss` around the policy of a trainer: old, reference and sampler's
    log-probs near it, padding on both sides, tool tokens, a sequence that is masked whole."""
    generator = torch.Generator().manual_seed(5)
    B, P, T = 6, 5, 8

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    prompt_mask = torch.ones(B, P, dtype=torch.long)
    prompt_mask[1, :2] = 0
    lengths = torch.tensor([8, 3, 5, 0, 1, 7])
    inputs = {
        "prompt_ids": torch.randint(3, len(VOCAB), (B, P), generator=generator) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, len(VOCAB), (B, T), generator=generator),
        "completion_mask": (torch.arange(T) < lengths[:, None]).long(),
        "advantages": normal(B, T) if per_token else normal(B),
        "num_items_in_batch": torch.tensor(31.0),
        "tool_mask": torch.ones(B, T, dtype=torch.long),
    }
    inputs["tool_mask"][0, 2:4] = 0
    inputs["advantages"][4] = 0.0
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([prompt_mask, inputs["completion_mask"]], 1)
    with torch.no_grad():
        logp = one._get_per_token_logps_and_entropies(one.model, ids, mask, T)[0]
    inputs["old_per_token_logps"] = (logp + 0.1 * normal(B, T)).clamp(max=0)
    inputs["ref_per_token_logps"] = (logp + 0.3 * normal(B, T)).clamp(max=0)
    sampled = inputs["old_per_token_logps"] + 0.1 * normal(B, T)
    # the engine had none for this token
    sampled[2, 1] = math.nan
    return {**inputs, "sampling_per_token_logps": sampled}


def importance_ratio(one: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What TRL makes of old and sampler's log-probs before its loss."""
    gap = inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]
    gap = (gap * inputs["completion_mask"] * inputs["tool_mask"]).nan_to_num(nan=0.0)
    level, mode = one.vllm_importance_sampling_mode.split("_")
    ratio = (gap.sum(1, keepdim=True) if level == "sequence" else gap).exp()
    low, high = one.vllm_importance_sampling_clip_min, one.vllm_importance_sampling_clip_max
    if mode == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < (low or 0.0)) | (ratio > high), 0.0)


def direct(one: Any, inputs: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Loss and all gradients of one micro-batch of two in an optimizer step."""
    one.model.train()
    one.model.zero_grad()
    one.current_gradient_accumulation_steps = 2
    loss = one._compute_loss(one.model, inputs)
    loss.backward()
    grads = [p.grad for p in one.model.parameters() if p.requires_grad]
    return loss.item(), torch.cat([g.flatten() for g in grads])


def metrics_of(one: Any) -> dict[str, float]:
    """What a trainer would log now."""
    logs: dict[str, float] = {}
    with contextlib.redirect_stdout(None):
        one.log(logs)
    return {n: v for n, v in logs.items() if v is not None and not math.isnan(v)}
