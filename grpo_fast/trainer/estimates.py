"""What PPO computes of a window: advantages, value targets, the value term, what is logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.advantages import explained_variance, gae, length_lam, token_kl, token_rewards
from grpo_fast.config import LossConfig
from grpo_fast.objective.value import value_loss
from grpo_fast.objective.weights import token_weights

from .ppo_config import PPOConfig
from .window import MicroBatch


def estimate(micro: MicroBatch, args: PPOConfig, kl_coef: float) -> MicroBatch:
    """A micro-batch with advantages and returns (N,) in the place of its rewards (S,).

    A completion without a reward leaves the mask: it teaches neither policy nor critic.

    Args:
        micro: with rewards (S,) as advantages, NaN where none could be given, and values (N,).
        kl_coef: what a nat of KL to the reference costs now.
    """
    bounds, scores = micro.packed.cu_seqlens, micro.advantages
    mask, judged = micro.mask, ~scores.isnan()
    if not judged.all():
        of_tokens = judged.repeat_interleave(bounds.diff())
        mask = of_tokens if mask is None else mask & of_tokens
        scores = torch.where(judged, scores, torch.zeros_like(scores))
    kl = None
    if kl_coef and micro.ref_logp is not None:
        kl = token_kl(micro.old_logp, micro.ref_logp, args.kl_reward_estimator)
    rewards = token_rewards(scores, bounds, kl=kl, kl_coef=kl_coef, mask=mask)
    alpha = args.lam_length_alpha
    lam = args.lam if alpha is None else length_lam(bounds, alpha, mask)
    given = {"gamma": args.gamma, "mask": mask}
    advantages, returns = gae(rewards, micro.values, bounds, lam=lam, **given)
    if args.value_lam is not None:
        _, returns = gae(rewards, micro.values, bounds, lam=args.value_lam, **given)
    return replace(micro, advantages=advantages, returns=returns, mask=mask)


def value_term(
    values: Tensor, micro: MicroBatch, args: PPOConfig, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value loss of a micro-batch, weighted by its tokens as the policy's is, and its means.

    Args:
        values: (N,) of the critic now, with their graph.
        micro: with returns and the values of the window.
        config: of the policy's loss, whose weights these are.

    Returns:
        0-d, and the means over tokens `value_loss` and `value_clip_ratio`.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if micro.mask is None else micro.mask
    each, slope, binds = value_loss(
        values.detach(),
        micro.returns,
        micro.values,
        kind=args.value_loss,
        cliprange=args.cliprange_value,
        delta=args.huber_delta,
    )
    weight = token_weights(config, mask, micro.packed.cu_seqlens, micro.denominator)
    # the difference is 0, and its derivative the slope
    graph = each + slope * (values - values.detach())
    loss = (weight * torch.where(mask, graph, torch.zeros_like(graph))).sum()
    count = mask.sum().clamp(min=1)
    means = {"value_loss": each, "value_clip_ratio": binds.float()}
    return loss, {
        name: torch.where(mask, v, torch.zeros_like(v)).sum() / count for name, v in means.items()
    }


class CriticReport(NamedTuple):
    """How well a critic knew the returns of a window, over all ranks."""

    explained_variance: float
    returns_variance: float


def critic_report(
    micro_batches: list[MicroBatch], total: Callable[[Tensor], Tensor]
) -> CriticReport:
    """Explained variance and variance of the returns, from global sums.

    Args:
        total: sums a tensor over the ranks.
    """
    returns, values = [m.returns for m in micro_batches], [m.values for m in micro_batches]
    masks = [m.mask for m in micro_batches]
    share, variance = explained_variance(returns, values, masks, total=total)
    return CriticReport(share.item(), variance.item())


def window_kl(
    micro_batches: list[MicroBatch], total: Callable[[Tensor], Tensor]
) -> tuple[float, int]:
    """Mean KL of the policy that sampled a window to the reference, nats per completion (k1, summed
    over its tokens), and the number of completions, over all ranks.

    Args:
        micro_batches: with old and reference log-probs (N,).
        total: sums a tensor over the ranks.
    """
    pairs = [(m.old_logp - m.ref_logp, m.mask) for m in micro_batches]
    kept = [gap if k is None else torch.where(k, gap, torch.zeros_like(gap)) for gap, k in pairs]
    count = sum(m.packed.cu_seqlens.numel() - 1 for m in micro_batches)
    sums = torch.stack((sum(k.sum() for k in kept), kept[0].new_tensor(float(count))))
    kl, completions = total(sums).tolist()
    return kl / max(completions, 1.0), int(completions)
