"""A tiny random Qwen3 in ms-swift's own GRPO run, and what two runs did compared step by step."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from swift.arguments import RLHFArguments
from swift.arguments.sft_args import SftArguments
from swift.pipelines import rlhf_main
from swift.rewards import orms
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.trainers.trainer_factory import TrainerFactory
from swift_reward import Spread
from tiny_trainer import checkpoint as qwen3_checkpoint
from tiny_trainer import dataset
from transformers import PrinterCallback

# A loss is a sum of advantages of both signs and a KL is exp(d) - d - 1: what is left over of terms
# near 1, each of them rounded to 1.2e-7 in fp32. This floor allows 5e-7 for them.
FLOOR = 5e-2
CLOCK = ("_time", "runtime", "per_second", "train_speed(s/it)")


def checkpoint(folder: Path) -> Path:
    """The model, its tokenizer and sixteen prompts (`prompts.jsonl`) in a folder."""
    qwen3_checkpoint(folder)
    rows = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in dataset(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(path: Path, **overrides: Any) -> dict[str, Any]:
    """Small batches and steps large enough that ratios leave their bounds."""
    given = {
        "rlhf_type": "grpo",
        "model": str(path),
        "model_type": "qwen3",
        "template": "dummy",
        "dataset": [str(path / "prompts.jsonl")],
        "split_dataset_ratio": 0,
        "load_from_cache_file": False,
        "check_model": False,
        "reward_funcs": ["spread"],
        "tuner_type": "full",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_length": 64,
        "max_completion_length": 8,
        "temperature": 0.9,
        "epsilon": 0.02,
        "epsilon_high": 0.03,
        "log_entropy": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "add_version": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "seed": 3,
    }
    return {**given, **overrides}


LORA = {"tuner_type": "lora", "lora_rank": 4, "init_weights": "gaussian", "lora_dropout": 0.0}
# on a CPU nothing but its Triton-free loss can run
LIGER = {"use_liger_kernel": True, "log_entropy": False}
LIGER["liger_kernel_config"] = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)


class Recorded(GRPOTrainer):
    """Keeps itself, the text that it trains on and the unrounded losses."""

    last: Recorded | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        Recorded.last = self
        self.texts: list[torch.Tensor] = []
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

    def _generate_and_score_completions(self, inputs: Any) -> list[dict[str, Any]]:
        out = super()._generate_and_score_completions(inputs)
        self.texts += [micro["model_inputs"]["input_ids"].clone() for micro in out]
        return out

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


orms["spread"] = Spread
TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.Recorded"
# flash attention has no CPU version; sdpa keeps packed sequences apart too
SftArguments._check_padding_free = lambda self: None


def run(path: Path, **overrides: Any) -> Recorded:
    """The trainer after swift's own entry has trained with it."""
    with tempfile.TemporaryDirectory(prefix="grpo-swift-") as folder:
        rlhf_main(RLHFArguments(output_dir=folder, **settings(path, **overrides)))
    return Recorded.last


def steps(one: Recorded) -> list[dict[str, float]]:
    """What was logged of every optimizer step."""
    return [log for log in one.state.log_history if "grad_norm" in log]


def compare(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    """Largest difference of each logged name over all steps, relative to theirs or to the floor if
    that is larger; infinity where only one of them has it."""
    out: dict[str, float] = {}
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() | other.keys():
            if name.endswith(CLOCK):
                continue
            a, b = mine.get(name, math.inf), other.get(name, -math.inf)
            same = a == b or math.isnan(a) and math.isnan(b)
            # of a NaN on one side only, which `max` would drop
            gap = 0.0 if same else math.inf if math.isnan(a - b) else abs(a - b)
            out[name] = max(out.get(name, 0.0), gap / max(abs(b), FLOOR))
    return out


def differences(ours: Recorded, theirs: Recorded) -> dict[str, float]:
    """`compare`, with the unrounded losses and with `text`: 0 for the same tokens, or infinity."""
    out = compare(steps(ours), steps(theirs))
    pairs = list(zip(ours.losses, theirs.losses, strict=True))
    # of the largest in the run: a loss is a sum of advantages of both signs
    scale = max(abs(b) for _, b in pairs)
    gaps = [math.inf if math.isnan(a - b) else abs(a - b) for a, b in pairs]
    out["loss"] = max(gaps) / max(scale, FLOOR)
    texts = zip(ours.texts, theirs.texts, strict=True)
    out["text"] = 0.0 if all(torch.equal(a, b) for a, b in texts) else math.inf
    return out
