"""What the loop of policy and reward model measures: diversity, KLs, accuracy, agreement."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from grpo_fast.models.loading import load_policy, load_processing
from grpo_fast.models.packing import completion_logprobs, default_row_length, pack
from grpo_fast.models.policy import attach
from grpo_fast.rewards.model import RewardModel
from grpo_fast.rollout.hf import HFSampler

from .config import GRPOConfig
from .grpo import GRPOTrainer
from .preference_metrics import correlation, preference_metrics
from .preferences import RankedSet, matrices
from .record import completion_of
from .setup import generation_of

Row = dict[str, Any]
# sequences of one forward that measures
_BATCH = 16


class Policy:
    """A policy read from a folder, to sample from and to measure with."""

    def __init__(self, folder: Path, args: GRPOConfig) -> None:
        self.args = args
        self.processing_class = load_processing(str(folder))
        self.model = load_policy(str(folder)).eval().to(args.device)
        attach(self.model)

    # the prompts as they are trained on
    encode = GRPOTrainer.encode

    def sample(self, examples: list[Row], generations: int, seed: int, batch: int) -> list[Row]:
        """One row for each example: prompt, completions as texts and token ids, other columns.

        Args:
            examples: rows of the dataset.
            generations: completions of each.
            seed: of the sampling.
            batch: completions sampled at once.
        """
        config, ends = generation_of(self.args, self.model, self.processing_class)
        pad = self.processing_class.pad_token_id
        sampler = HFSampler(self.model, generation_config=config, pad_id=pad, eos_ids=ends)
        set_seed(seed)
        rows, size = [], max(1, batch // generations)
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            prompts = [self.encode(example["prompt"]) for example in part]
            rollouts = sampler.sample(prompts, generations)
            texts = self.processing_class.batch_decode(
                rollouts.completion_ids, skip_special_tokens=True
            )
            for i, example in enumerate(part):
                own = slice(i * generations, (i + 1) * generations)
                rows.append(
                    {
                        "prompt": example["prompt"],
                        "prompt_ids": prompts[i],
                        "completions": texts[own],
                        "completion_ids": rollouts.completion_ids[own],
                        "columns": {k: v for k, v in example.items() if k != "prompt"},
                    }
                )
        return rows

    def measure(self, rows: list[Row]) -> tuple[list[torch.Tensor], float]:
        """Log-probs of each completion's tokens in nats, and the mean entropy of a token."""
        pairs = [(row["prompt_ids"], ids) for row in rows for ids in row["completion_ids"] if ids]
        logps, entropy, count = [], 0.0, 0
        for start in range(0, len(pairs), _BATCH):
            prompts, completions = map(list, zip(*pairs[start : start + _BATCH], strict=True))
            batch = pack(
                prompts,
                completions,
                pad_id=self.processing_class.pad_token_id,
                row_length=default_row_length(self.model),
                device=self.args.device,
            )
            logp, each = completion_logprobs(self.model, batch, self.args.temperature, entropy=True)
            logps += [part.cpu() for part in logp.split(batch.cu_seqlens.diff().tolist())]
            entropy, count = entropy + each.sum().item(), count + len(each)
        return logps, entropy / max(count, 1)


def mean_kl(own: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """KL(policy, other) in nats a token, from the policy's own completions: the mean of k3."""
    gap = torch.cat(other).double() - torch.cat(own).double()
    return (gap.exp() - 1 - gap).mean().item()


def distinct(rows: list[Row], n: int) -> float:
    """Different n-grams of tokens among all of them, each completion for itself (Li et al., 2016);
    1 where no two are alike, 0 where there is none."""
    grams = [
        tuple(ids[i : i + n])
        for row in rows
        for ids in row["completion_ids"]
        for i in range(len(ids) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def rewards_of_rows(reward: RewardModel, rows: list[Row]) -> list[list[float]]:
    """The reward model's score of each completion of each row."""
    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    answers = [completion_of(row["prompt"], text) for row in rows for text in row["completions"]]
    flat, out = reward(prompts, answers), []
    for row in rows:
        out.append(flat[: len(row["completions"])])
        flat = flat[len(row["completions"]) :]
    return out


def accuracy_on(reward: RewardModel, sets: list[RankedSet]) -> dict[str, float]:
    """`preference_metrics` of a reward model on ranked sets, lengths in characters."""
    prompts = [one.prompt for one in sets for _ in one.completions]
    answers = [answer for one in sets for answer in one.completions]
    places, ratings, _ = matrices(sets)
    scores = torch.tensor(reward(prompts, answers))
    lengths = torch.tensor([float(len(str(answer))) for answer in answers])
    return preference_metrics(scores[places], ratings, lengths[places])


def mean_of(values: list[list[float | None]]) -> float:
    """Mean of the scores that there are; NaN where there is none."""
    flat = [value for row in values for value in row if value is not None]
    return sum(flat) / len(flat) if flat else math.nan


def agreement(scores: list[list[float | None]], rewards: list[list[float]]) -> float:
    """Pearson's correlation of judge and reward model over the completions that have both."""
    pairs = [
        (s, r)
        for row, own in zip(scores, rewards, strict=True)
        for s, r in zip(row, own, strict=True)
        if s is not None
    ]
    if len(pairs) < 2:
        return math.nan
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    return correlation(a, b)
