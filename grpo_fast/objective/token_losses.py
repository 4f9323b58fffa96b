"""The loss of every token from given log-probs, for whoever averages it himself."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import checks
from grpo_fast.checks import no_double_backward
from grpo_fast.config import LossConfig

from .batch import Batch, prepare
from .terms import Terms, evaluate
from .tokens import Tokens, Totals


class TokenLosses(NamedTuple):
    """Each shaped like the log-probs, and 0 where masked."""

    loss: Tensor
    """Without any weight; differentiable in the log-probs."""
    kl: Tensor
    """Estimate per token, nats; not multiplied by the ratio, and 0 without a reference."""
    ratio: Tensor
    """At the level of the configuration."""
    clipped: Tensor
    """Bool: the ratio left its bounds on the side that the advantage pushes to."""


class _TokenLosses(torch.autograd.Function):
    """What reaches a token's loss from above is its weight, so backward is `evaluate` again."""

    @staticmethod
    def forward(ctx, logp: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        # a copy: what the caller does to its log-probs must not change the derivative
        ctx.stats, ctx.batch, ctx.shape = _stats(logp), batch, logp.shape
        terms = evaluate(batch, ctx.stats)
        kept = [torch.where(batch.rows.mask, t, 0.0) for t in (terms.kl, terms.ratio)]
        clipped = _clipped(terms, batch)
        ctx.mark_non_differentiable(*kept, clipped)
        return terms.loss, *kept, clipped

    @staticmethod
    @no_double_backward
    def backward(ctx, upstream: Tensor, *_) -> tuple[Tensor, None]:
        mask = ctx.batch.rows.mask
        weights = torch.where(mask, upstream, torch.zeros_like(upstream))
        dlogp = evaluate(replace(ctx.batch, weights=weights), ctx.stats).dlogp
        return dlogp.view(ctx.shape), None


def _stats(logp: Tensor) -> Tensor:
    flat = logp.detach().reshape(-1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    # no option that reads the entropies comes this far
    return torch.stack((flat, torch.zeros_like(flat)))


def _clipped(terms: Terms, batch: Batch) -> Tensor:
    low, high = batch.config.ratio_bounds
    below = (terms.ratio < low) & (terms.advantage < 0)
    above = (terms.ratio > high) & (terms.advantage > 0)
    return batch.rows.mask & (below | above)


def token_losses(
    logp: Tensor,
    advantages: Tensor,
    *,
    config: LossConfig | None = None,
    mask: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
) -> TokenLosses:
    """objective(logp) + beta [ratio] kl(logp, ref_logp) of every token, without a weight.

    `linear_policy_loss` is the sum of these times `weights.token_weights`, and cheaper: here
    backward has to go through the log-probs once more. Differentiable in logp, once. Nothing waits
    for the device.

    Args:
        logp: (B, T) log-probs of the policy (nats), e.g. of `linear_logprob`.
        advantages: (B,) or (B, T).
        config: None for `LossConfig()`. Its aggregation has no part in this; an entropy bonus and a
            top-entropy set are refused.
        Others: (B, T), as in `linear_policy_loss`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
    """
    config = LossConfig() if config is None else config
    if not isinstance(logp, Tensor) or logp.dim() != 2 or not logp.is_floating_point():
        checks.fail("logp", "floating-point tensor (B, T)", checks.describe(logp))
    if config.entropy_coef > 0 or config.top_entropy_quantile < 1.0:
        name = "entropy_coef" if config.entropy_coef > 0 else "top_entropy_quantile"
        checks.fail(name, "its default: log-probs have no entropy", getattr(config, name))
    ids = torch.zeros_like(logp, dtype=torch.long)
    tokens = Tokens(ids, advantages, mask, None, old_logp, ref_logp, rollout_logp)
    # room for all, so that nobody waits for their number
    room = max(logp.numel(), 1)
    batch = prepare(tuple(logp.shape), 1, logp.device, tokens, config, Totals(), max_rows=room)
    batch = replace(batch, weights=batch.rows.mask.to(batch.weights.dtype))
    return TokenLosses(*(t.view(logp.shape) for t in _TokenLosses.apply(logp, batch)))
