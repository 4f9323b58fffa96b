"""KL in the reward of a group method: R - beta * KL of the completion, before groups are compared.

    R' = R - beta * sum_t (log pi_old - log pi_ref)        k1, over the kept tokens

Source: DeepSeekMath: Pushing the Limits of Mathematical Reasoning (2024), whose GRPO moves this KL
from the reward into the loss; Back to Basics: Revisiting REINFORCE Style Optimization (2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .window import MicroBatch

if TYPE_CHECKING:
    from .grpo import GRPOTrainer


def completion_kl(micro: MicroBatch) -> Tensor:
    """KL (S,) of the policy that sampled to the reference, k1 summed over the kept tokens, nats."""
    gap = micro.old_logp - micro.ref_logp
    if micro.mask is not None:
        gap = torch.where(micro.mask, gap, torch.zeros_like(gap))
    bounds = micro.packed.cu_seqlens
    owner = torch.arange(len(bounds) - 1, device=gap.device).repeat_interleave(bounds.diff())
    return gap.new_zeros(len(bounds) - 1).index_add_(0, owner, gap)


def with_kl(
    trainer: GRPOTrainer, micro_batches: list[MicroBatch], evaluate: bool
) -> list[MicroBatch]:
    """The same micro-batches, with the advantages of their rewards minus the KL.

    Logs the KL and the coefficient, and tells the controller of the KL, once for each window.

    Args:
        trainer: whose estimator makes the advantages, from the rewards of all ranks.
        micro_batches: of this rank, with rewards (S,) where their advantages will be. In an
            evaluation, where there are no old log-probs, no KL is taken from them.
    """
    args, accelerator = trainer.args, trainer.accelerator
    own = torch.cat([m.advantages for m in micro_batches])
    sizes, first = [len(m.advantages) for m in micro_batches], 0
    groups = args.num_generations_eval if evaluate else args.num_generations
    if not evaluate:
        kl, coefficient = (
            torch.cat([completion_kl(m) for m in micro_batches]),
            trainer.kl.coefficient,
        )
        mean = accelerator.reduce(kl.mean(), "mean").item()
        trainer.metrics.add("kl_per_completion", mean)
        trainer.metrics.add("kl_coef", coefficient)
        trainer.kl.update(mean, len(own) * accelerator.num_processes)
        first = accelerator.process_index * len(own)
        own = accelerator.gather(own - coefficient * kl)
    advantages = trainer.of_groups(own.view(-1, groups)).to(own)
    split = advantages[first : first + sum(sizes)].split(sizes)
    return [replace(m, advantages=a) for m, a in zip(micro_batches, split, strict=True)]
