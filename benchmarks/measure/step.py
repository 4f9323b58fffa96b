"""A whole optimizer step of our GRPOTrainer and of TRL's: same weights, prompts, text and rewards.

Both libraries run their own `train()`, each in a thread of its own, and take turns: step k of one,
then step k of the other. What is timed begins where Trainer asks for the step's prompts
(`get_batch_samples`) and ends where it reports the step (`on_step_end`): encoding prompts, decoding
completions, rewards, advantages, padding or packing, log-probs of the old and the reference policy,
forward, backward, clipping and the optimizer. Sampling is replaced by a look-up of the same tokens,
and what is printed or drawn between two steps is not counted.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PrinterCallback

from benchmarks.measure.turns import Stepped, Turns
from benchmarks.step_cases import CASES, StepCase, Text, sample, smollm2
from grpo_fast.models.loading import load_policy, load_processing
from grpo_fast.rollout.rollouts import Rollouts

__all__ = ["CASES", "CONTESTANTS", "LEVEL", "StepCase", "measure", "trainer"]

LEVEL, PASS = "step", "step"
# Windows of text before the timed ones: in the first, Adam's state is made; both are compared.
WARM_UP = 2
ROUNDS = (3, 30)
# fp32: rounding of sums in another order. bf16 has 8 bits.
GATE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Adam divides a gradient by its own size, so that where a gradient is mostly rounding the update
# is a coin toss of full size.
UPDATE_GATE = {torch.float32: 2e-2, torch.bfloat16: 0.5}


def reward(completions: list[str], solved: list[bool], **_: Any) -> list[float]:
    """A number in [0, 1) that depends on the text alone; 1 where the prompt is one all solve."""
    numbers = [zlib.crc32(text.encode()) % 1009 / 1009 for text in completions]
    return [1.0 if same else number for same, number in zip(solved, numbers, strict=True)]


def _ours(case: StepCase, text: Text, settings: dict[str, Any], given: dict[str, Any]) -> Any:
    from grpo_fast import GRPOConfig, GRPOTrainer
    from grpo_fast.trainer.curves import Curves

    table = dict(zip(text.prompts, text.completions, strict=True))

    class Ours(Stepped, GRPOTrainer):
        def generate(self, examples: list[dict[str, Any]], num_generations: int) -> Rollouts:
            prompts = [example["prompt"] for example in examples for _ in range(num_generations)]
            completions = [ids for example in examples for ids in table[example["prompt"]]]
            ended = [ids[-1] in self.eos_ids for ids in completions]
            return Rollouts(
                [self.encode(prompt) for prompt in prompts], completions, [not end for end in ended]
            )

    built = Ours(args=GRPOConfig(**settings), **given)
    # drawn after every log, and not timed
    built.remove_callback(Curves)
    return built


def _trl(case: StepCase, text: Text, settings: dict[str, Any], given: dict[str, Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    encode = given["processing_class"]
    table = {
        tuple(encode(prompt)["input_ids"]): completions
        for prompt, completions in zip(text.prompts, text.completions, strict=True)
    }

    class Theirs(Stepped, GRPOTrainer):
        def _generate_single_turn(
            self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
        ) -> tuple[list[list[int]], None]:
            groups = prompt_ids[:: case.G]
            return [ids for prompt in groups for ids in table[tuple(prompt)]], None

    # on by default, ours is off
    return Theirs(args=GRPOConfig(gradient_checkpointing=False, **settings), **given)


class Contestant(NamedTuple):
    """A library: its package, what of it is run, and how its trainer is built."""

    package: str
    what: str
    build: Callable[[StepCase, Text, dict[str, Any], dict[str, Any]], Any]


CONTESTANTS = {
    "grpo_fast": Contestant("grpo_fast", "GRPOTrainer.train", _ours),
    "TRL": Contestant("trl", "GRPOTrainer.train without gradient checkpointing", _trl),
}


def reason(name: str) -> str | None:
    """Why a contestant cannot run here, or None."""
    package = CONTESTANTS[name].package
    # Boundary: a library that is absent or does not fit the others here is listed with its message.
    try:
        importlib.import_module(package).GRPOTrainer  # noqa: B018
    except (ImportError, RuntimeError) as error:
        return " ".join(f"{package} cannot be imported: {error}".split())[:300]
    return None


def trainer(
    name: str, case: StepCase, text: Text, checkpoint: Path, device: torch.device, steps: int
) -> Any:
    """A contestant's trainer, ready for `steps` optimizer steps on copies of one window.

    The settings are the defaults of the libraries, which are the same, but: a constant learning
    rate, no shuffling, no gradient checkpointing, and what the case says.
    """
    from datasets import Dataset

    folder = tempfile.TemporaryDirectory(prefix="grpo-step-")
    solved = case.P - round(case.active * case.P)
    rows = [{"prompt": p, "solved": i < solved} for i, p in enumerate(text.prompts)]
    settings = {
        "output_dir": folder.name,
        "max_steps": steps,
        "per_device_train_batch_size": case.micro,
        "gradient_accumulation_steps": case.B // case.micro,
        "num_generations": case.G,
        "max_completion_length": case.T,
        "num_iterations": case.num_iterations,
        "beta": case.beta,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "shuffle_dataset": False,
        "bf16": case.dtype == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    given = {
        "model": str(checkpoint),
        "reward_funcs": reward,
        "train_dataset": Dataset.from_list(rows * -(-steps // case.num_iterations)),
        "processing_class": load_processing(str(checkpoint)),
    }
    built = CONTESTANTS[name].build(case, text, settings, given)
    built.remove_callback(PrinterCallback)
    # removed together with the trainer
    built.folder = folder
    return built


def differences(ours: Turns, theirs: Turns, start: nn.Module) -> dict[str, float]:
    """How far two contestants are apart after the same number of steps.

    Returns:
        loss and grad_norm, the largest relative difference of a step (a loss below 1e-2 counts as
        1e-2: on-policy it is a sum of advantages, which cancel), and update, the relative L2
        distance of what the steps have added to the weights of `start`.
    """
    pairs = list(zip(ours.losses, theirs.losses, strict=True))
    norms = list(zip(ours.grad_norms, theirs.grad_norms, strict=True))
    gap = norm = 0.0
    weights = dict(theirs.trainer.model.named_parameters())
    initial = dict(start.named_parameters())
    for name, weight in ours.trainer.model.named_parameters():
        other, first = weights[name].detach(), initial[name].detach().to(weight.device)
        gap += (weight.detach() - other).double().square().sum().item()
        norm += (weight.detach() - first).double().square().sum().item()
    return {
        "loss": max(abs(a - b) / max(abs(a), 1e-2) for a, b in pairs),
        "grad_norm": max(abs(a - b) / a for a, b in norms),
        "update": (gap / norm) ** 0.5,
    }


def agrees(error: dict[str, float], case: StepCase) -> bool:
    """Whether two contestants did the same step."""
    gate = GATE[case.dtype]
    close = error["loss"] <= gate and error["grad_norm"] <= gate
    return close and error["update"] <= UPDATE_GATE[case.dtype]


def describe(case: StepCase, model: nn.Module) -> dict[str, Any]:
    """What the records of all contestants share.

    `tokens` are those of the completions, which the loss scores; `sequence_tokens` count the
    prompts too, and `padded_tokens` are all places of a rectangle around the window. `floor_flops`
    are the products with weights in an optimizer step, each token computed once.
    """
    lengths = case.completion_lengths()
    solved = (case.P - round(case.active * case.P)) * case.G
    tokens, active = sum(lengths), sum(lengths[solved:])
    sequence = tokens + case.B * case.prompt
    V, H = model.get_output_embeddings().weight.shape
    embeddings = {id(m.weight): V * H for m in (model.get_input_embeddings(), model.lm_head)}
    layers = sum(p.numel() for p in model.parameters()) - sum(embeddings.values())
    trained = 6 * layers * sequence + (2 * tokens + 4 * (tokens if case.beta else active)) * V * H
    scored = 2 * layers * sequence + 2 * tokens * V * H
    # log-probs of the old and of the reference policy serve all steps of the window
    passes = (case.num_iterations > 1) + (case.beta != 0)
    shown = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    return {
        "level": LEVEL,
        "pass": PASS,
        "case": {**shown, "B": case.B, "H": H, "V": V},
        "tokens": tokens,
        "active_tokens": active,
        "sequence_tokens": sequence,
        "padded_tokens": case.B * (case.prompt + max(lengths)),
        "floor_flops": float(trained + passes * scored / case.num_iterations),
        "floor_bytes": 0.0,
    }


def measure(
    case: StepCase,
    device: torch.device,
    seconds: float,
    tell: Callable[[str], None] = lambda what: None,
    checkpoint: Path | None = None,
) -> tuple[list[dict], list[dict]]:
    """Records of every contestant with their durations, and who did not run with the reason.

    Args:
        case: what to train on.
        device: where.
        seconds: time to spend on the timed rounds; there are at least 3 and at most 30.
        tell: given what is being done.
        checkpoint: folder of a causal language model; default SmolLM2-135M-Instruct.
    """
    # trainers of an earlier case are rings of references
    gc.collect()
    names = [n for n in CONTESTANTS if reason(n) is None and (not case.only or n in case.only)]
    why = {n: reason(n) or "left out of this case" for n in CONTESTANTS if n not in names}
    tell("text")
    checkpoint = smollm2() if checkpoint is None else checkpoint
    text = sample(case, checkpoint, device)
    start = load_policy(str(checkpoint))
    shown = describe(case, start)
    steps = (WARM_UP + ROUNDS[1]) * case.num_iterations
    with contextlib.ExitStack() as stack:
        tell("building the trainers")
        built = {n: trainer(n, case, text, checkpoint, device, steps) for n in names}
        runs = {
            name: stack.enter_context(contextlib.closing(Turns(one, device)))
            for name, one in built.items()
        }
        warm: dict[str, list[float]] = {name: [] for name in names}
        for k in range(WARM_UP):
            for name, run in runs.items():
                tell(f"{name}: warm-up {k + 1} of {WARM_UP}")
                warm[name].append(run.window(peak=k == WARM_UP - 1))
        error = differences(*runs.values(), start) if len(runs) == 2 else {}
        took = sum(min(times) for times in warm.values()) * case.num_iterations
        rounds = min(max(int(seconds / took), ROUNDS[0]), ROUNDS[1])
        times: dict[str, list[float]] = {name: [] for name in names}
        for k in range(rounds):
            for name in names if k % 2 == 0 else reversed(names):
                tell(f"{name}: round {k + 1} of {rounds}")
                times[name].append(runs[name].window())
        peaks = {name: run.peak for name, run in runs.items()}
    records = [
        {**shown, "peer": n, "error": error, "peak_bytes": peaks[n], "durations": times[n]}
        for n in names
    ]
    for record in records:
        about = CONTESTANTS[record["peer"]]
        record["version"] = importlib.import_module(about.package).__version__
        record["what"] = about.what
        record["exact"] = agrees(error, case) if error else None
    skipped = [
        {"level": LEVEL, "case": shown["case"], "peer": name, "reason": sentence}
        for name, sentence in why.items()
    ]
    return records, skipped
