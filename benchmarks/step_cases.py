"""What a step is made of: how many completions, how long, and the text itself."""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from grpo_fast.cli import demo
from grpo_fast.models.loading import load_policy, load_processing
from grpo_fast.models.policy import attach
from grpo_fast.rollout.hf import generate
from grpo_fast.rollout.rollouts import Rollouts


@dataclass(frozen=True)
class StepCase:
    """P prompts with G completions each: a window, which num_iterations optimizer steps use."""

    name: str
    P: int
    G: int
    T: int
    """Tokens of the longest completions, and the limit that the trainers are told."""
    prompt: int = 32
    """Tokens of every prompt."""
    lengths: str = "full"
    """full: all T; rollout: quantiles of a log-normal with median T / 4, cut at T."""
    active: float = 1.0
    """Share of the groups whose completions have unequal rewards."""
    micro: int = 8
    """Completions of a micro-batch; gradients are accumulated over P G / micro of them."""
    beta: float = 0.0
    """Coefficient of the KL against the initial policy."""
    num_iterations: int = 1
    """Optimizer steps on each window; above 1 the log-probs of the old policy are needed."""
    learning_rate: float = 1e-5
    dtype: torch.dtype = torch.float32
    """bfloat16: autocast over fp32 weights."""
    only: tuple[str, ...] = ()

    @property
    def B(self) -> int:
        """Completions of a window."""
        return self.P * self.G

    def completion_lengths(self) -> list[int]:
        """Tokens of each of the P G completions, prompt after prompt."""
        if self.lengths == "full":
            return [self.T] * self.B
        drawn = [NormalDist(0.0, 1.1).inv_cdf((i + 0.5) / self.B) for i in range(self.B)]
        lengths = torch.tensor(drawn).exp().mul(self.T / 4).long().clamp(1, self.T)
        order = torch.randperm(self.B, generator=torch.Generator().manual_seed(0))
        return lengths[order].tolist()


_SMALL = {"P": 2, "G": 4, "T": 128}
_LARGE = {"P": 8, "G": 8, "T": 512, "prompt": 128, "micro": 16, "dtype": torch.bfloat16}

# name of a set -> cases, all of them with SmolLM2-135M-Instruct
CASES: dict[str, tuple[StepCase, ...]] = {
    "cpu": (
        StepCase("smollm2-step-uniform", **_SMALL),
        StepCase("smollm2-step-rollout", **_SMALL, lengths="rollout"),
    ),
    "cpu-large": (
        StepCase("smollm2-step-half", **_SMALL, lengths="rollout", active=0.5),
        StepCase("smollm2-step-old-kl", **_SMALL, lengths="rollout", beta=0.04, num_iterations=2),
    ),
    "gpu": (
        StepCase("smollm2-step-uniform", **_LARGE),
        StepCase("smollm2-step-rollout", **_LARGE, lengths="rollout"),
        StepCase("smollm2-step-old-kl", **_LARGE, lengths="rollout", beta=0.04, num_iterations=2),
    ),
}


class Text(NamedTuple):
    """The window that every step trains on."""

    prompts: list[str]
    """P, all different."""
    completions: list[list[list[int]]]
    """P times G completions."""


def sample(case: StepCase, checkpoint: Path, device: torch.device) -> Text:
    """Prompts of `case.prompt` tokens and what the model itself writes after them.

    A completion shorter than T ends with EOS, as a sampled one does.
    """
    tokenizer = load_processing(str(checkpoint))
    prompts = _prompts(tokenizer, case.P, case.prompt)
    rollouts = _sampled(str(checkpoint), tuple(prompts), case.G, case.T, str(device))
    completions = []
    pairs = zip(rollouts.completion_ids, case.completion_lengths(), strict=True)
    for ids, length in pairs:
        end = [] if length == case.T else [tokenizer.eos_token_id]
        completions.append(ids[: length - len(end)] + end)
    return Text(prompts, [completions[i : i + case.G] for i in range(0, case.B, case.G)])


@functools.cache
def _sampled(
    checkpoint: str, prompts: tuple[str, ...], G: int, length: int, device: str
) -> Rollouts:
    tokenizer = load_processing(checkpoint)
    model = load_policy(checkpoint).to(device)
    attach(model)
    config = GenerationConfig(max_new_tokens=length, min_new_tokens=length, do_sample=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return generate(
            model,
            [tokenizer(prompt)["input_ids"] for prompt in prompts],
            G,
            generation_config=config,
            pad_id=tokenizer.pad_token_id,
            eos_ids={tokenizer.eos_token_id},
        )


def _prompts(tokenizer: Any, count: int, length: int) -> list[str]:
    """Different strings of words, `length` tokens each."""
    generator = torch.Generator().manual_seed(0)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [p.lstrip("Ġ▁") for p in pieces if re.fullmatch(r"[Ġ▁]?[a-z]{1,9}\d*", p)]
    found: dict[str, None] = {}
    while len(found) < count:
        text: list[str] = []
        while len(tokenizer(" ".join(text))["input_ids"]) < length:
            text.append(words[torch.randint(len(words), (), generator=generator)])
        prompt = " ".join(text)
        if len(tokenizer(prompt)["input_ids"]) == length:
            found[prompt] = None
    return list(found)


@functools.cache
def _smollm2() -> tuple[Any, Path]:
    holder = tempfile.TemporaryDirectory(prefix="smollm2-")
    folder, gguf_file = demo.weights()
    load_policy(str(folder), gguf_file=gguf_file).save_pretrained(holder.name)
    load_processing(str(folder), gguf_file=gguf_file).save_pretrained(holder.name)
    return holder, Path(holder.name)


def smollm2() -> Path:
    """A checkpoint of SmolLM2-135M-Instruct in fp32 (538 MB), there until the process ends.

    Raises:
        ValueError: the package with the weights, or gguf which reads it, is not installed.
    """
    return _smollm2()[1]
