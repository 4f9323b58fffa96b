"""From log-probs and entropies (N,) to the weighted loss of every token and its derivatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.presets import LEVELS

from . import corrections
from .batch import Batch
from .levels import lift
from .objectives import LOG_RATIO_LIMIT
from .token_loss import token_loss_of


class Terms(NamedTuple):
    """What a route knows of each of its K rows; losses and derivatives already carry the weight."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor
    dlogp: Tensor
    """d loss / d logp; what the entropy bonus adds is -entropy_coef * weight by the entropy."""
    log_ratio: Tensor
    advantage: Tensor
    """With every correction in it."""
    mask: Tensor | None
    """(K,) bool, or None when every listed row counts."""
    dentropy: Tensor | None = None
    """d loss / d entropy; None without a bonus."""
    rollout_gap: Tensor | None = None
    """log p(old) / p(rollout), NaN where the rollout has none; None without a rollout."""
    index: Tensor | None = None
    """(K,) which tokens the rows are; None for all of them in order."""


class TokenTerms(NamedTuple):
    """What a loss knows of each token, shaped like ids, fp32 and detached; where masked (or left
    out by skip_inactive_forward) 0, and a ratio of 1."""

    logp: Tensor
    """Of the policy, nats: the old_logp of another step on the same tokens."""
    entropy: Tensor
    """Nats."""
    ratio: Tensor
    """At the level of the loss; that of the token in gmpo and vespo."""
    kl: Tensor
    """Estimate of the KL, nats, not multiplied by the ratio; 0 without a reference."""


def named_terms(terms: Tensor, batch: Batch, index: Tensor | None, mask: Tensor | None) -> Terms:
    """Name the (6, K) rows that the policy kernels filled; index lists the tokens they are."""
    fields = batch.listed(index, terms.dtype)
    old = fields["old_logp"]
    log_ratio = torch.zeros_like(terms[1]) if old is None else terms[1] - old
    gap = batch.rollout_gap
    if gap is not None and index is not None:
        gap = gap[index]
    elif gap is None and fields["rollout_logp"] is not None:
        gap = terms[1] - fields["rollout_logp"]
    coef = batch.config.entropy_coef
    dentropy = -coef * fields["weights"] if coef > 0 else None
    return Terms(*terms, log_ratio, fields["advantages"], mask, dentropy, gap, index)


def per_token(terms: Terms, batch: Batch, shape: tuple[int, ...]) -> TokenTerms:
    """The terms of all tokens in order, shaped like ids."""

    def spread(values: Tensor, fill: float) -> Tensor:
        if terms.mask is not None:
            values = torch.where(terms.mask, values, fill)
        if terms.index is not None:
            everything = values.new_full((batch.rows.ids.numel(),), fill)
            values = everything.index_copy(0, terms.index, values)
        return values.view(shape)

    fills = {"logp": 0.0, "entropy": 0.0, "ratio": 1.0, "kl": 0.0}
    return TokenTerms(**{name: spread(getattr(terms, name), fill) for name, fill in fills.items()})


def evaluate(batch: Batch, stats: Tensor) -> Terms:
    """The objective on (N,), from the log-probs and entropies in stats (2 or more, N).

    Every route that does not evaluate a token inside a kernel comes through here.
    """
    config, mask = batch.config, batch.rows.mask
    token_loss = token_loss_of(config)
    logp, entropy = stats[0], stats[1]
    zero = torch.zeros_like(logp)
    fields = batch.listed(None, logp.dtype)
    old = logp if batch.old_logp is None else fields["old_logp"]
    advantages, dropped = _advantages(batch, fields, logp, entropy, old)
    trained_on = old
    if token_loss.factor is not None and batch.rollout_logp is not None:
        old = torch.where(torch.isnan(fields["rollout_logp"]), old, fields["rollout_logp"])
    # a banned token has logp - logp = NaN, as it must; a masked one is 0
    by_token = torch.where(mask, logp - old, zero)
    clip = (float(config.epsilon), config.upper_epsilon)
    # the side a token is clipped on is that of its own advantage, corrected or not
    sides = fields["advantages"]
    log_ratio, pull = lift(config.level, by_token, mask, batch.bounds, sides, clip)
    if token_loss.factor is not None:
        advantages = token_loss.scaled(_ratio(log_ratio), logp, advantages)
        log_ratio, pull = torch.where(mask, logp - trained_on, zero), lambda by_ratio: by_ratio
    loss, by_logp, by_ratio, ratio, kl = token_loss(logp, log_ratio, fields["ref_logp"], advantages)
    weights = fields["weights"]
    dentropy = None
    if config.entropy_coef > 0:
        dentropy = torch.where(mask & ~dropped, -config.entropy_coef * weights, zero)
        loss = loss - torch.where(dropped, zero, config.entropy_coef * entropy)
    by_logp = torch.where(mask, by_logp * weights, zero)
    by_ratio = torch.where(mask, by_ratio * weights, zero)
    loss = torch.where(mask, loss * weights, zero)
    # a masked token of the sequence gets nothing of its ratio
    dlogp = by_logp + torch.where(mask, pull(by_ratio), zero)
    if LEVELS[config.level].clips_tokens:
        # its clip is one of token ratios
        log_ratio, ratio = by_token, _ratio(by_token)
    gap = batch.rollout_gap
    if gap is None and batch.rollout_logp is not None:
        gap = logp - fields["rollout_logp"]
    return Terms(loss, logp, entropy, ratio, kl, dlogp, log_ratio, advantages, mask, dentropy, gap)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _advantages(
    batch: Batch, fields: dict, logp: Tensor, entropy: Tensor, old: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages (N,) with the corrections that need this pass, and the tokens outside the
    top-entropy set."""
    config, mask, bounds = batch.config, batch.rows.mask, batch.bounds
    advantages, rollout = fields["advantages"], fields["rollout_logp"]
    dropped = torch.zeros_like(mask)
    stage = corrections.correction_stage(config, batch.old_logp is not None)
    if rollout is not None and stage == "pass":
        advantages = corrections.corrected(config, advantages, old - rollout, mask, bounds)
    if config.off_policy_mask_threshold is not None:
        sampled = old if rollout is None else torch.where(torch.isnan(rollout), logp, rollout)
        factor = corrections.on_policy_factor(
            config.off_policy_mask_threshold, logp, sampled, advantages, mask, bounds
        )
        advantages = corrections.scaled(advantages, factor)
    if config.top_entropy_quantile < 1.0:
        threshold = batch.entropy_threshold
        if threshold is None:
            share = config.top_entropy_quantile
            threshold = corrections.entropy_threshold(share, entropy, mask)
        dropped = entropy < threshold
        advantages = torch.where(dropped, torch.zeros_like(advantages), advantages)
    return advantages, dropped
