"""A tiny random Qwen3 for TRL's trainers, and what two of them did compared step by step."""

from __future__ import annotations

import contextlib
import math
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_trainer import VOCAB, dataset, spread_reward, tokenizer
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

COMPARED = ("loss", "grad_norm", "kl", "entropy", "cispo_clip_ratio", "policy_loss")
COMPARED += tuple(f"clip_ratio/{n}" for n in ("low_mean", "high_mean", "region_mean"))
COMPARED += ("clip_ratio/low_min", "clip_ratio/high_max", "vespo/phi_seq_mean", "entropy_coef")
# below these a relative difference says nothing: a loss on-policy is a sum of advantages that
# cancel, a KL at the reference is 0
FLOORS = {"loss": 1e-2, "policy_loss": 1e-2, "kl": 1e-3}


def checkpoint(folder: Any, seed: int = 0, **overrides: Any) -> str:
    """Two layers of width 32, tied to no embedding, saved where a reference can be read from."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **overrides,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def settings(**overrides: Any) -> dict[str, Any]:
    """Small batches and steps large enough that ratios leave their bounds."""
    given = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "temperature": 0.9,
        "epsilon": 0.05,
        "epsilon_high": 0.08,
        "optim": "sgd",
        "learning_rate": 0.3,
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
    """`cls`, which also keeps the text that it trains on."""

    class Recorded(cls):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            out = super()._generate_and_score_completions(inputs)
            self.__dict__.setdefault("texts", []).append(out["completion_ids"].clone())
            return out

    return Recorded


def trainer(cls: type, path: str, *, use_lora: bool = False, **overrides: Any) -> Any:
    """A trainer of `cls` on the tiny checkpoint."""
    folder = tempfile.TemporaryDirectory(prefix="grpo-trl-")
    built = recording(cls)(
        path,
        overrides.pop("reward", spread_reward),
        GRPOConfig(output_dir=folder.name, **settings(**overrides)),
        train_dataset=Dataset.from_list(dataset(16)),
        eval_dataset=Dataset.from_list(dataset(2)),
        processing_class=tokenizer(),
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
    """Difference relative to theirs or to the floor of the name."""
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else math.inf
    return abs(ours - theirs) / max(abs(theirs), FLOORS.get(name, 1e-6))


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
    texts = zip(ours.texts, theirs.texts, strict=True)
    out["text"] = 0.0 if all(torch.equal(a, b) for a, b in texts) else math.inf
    return out


def both(path: str, **overrides: Any) -> tuple[Any, Any]:
    """Ours and TRL's after the same steps."""
    from grpo_fast.integrations.trl import FastGRPOTrainer

    return run(FastGRPOTrainer, path, **overrides), run(GRPOTrainer, path, **overrides)
