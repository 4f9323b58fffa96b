"""The whole loss in the plainest torch: no chunking, any dtype, autograd only. What the tests
trust."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LossConfig


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), (..., H) x (V, H) ->
    (..., V)."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def logprob(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of ids, entropy and log-sum-exp of softmax(logits / temperature), each (...,),
    nats."""
    logits = logits / temperature
    log_p = torch.log_softmax(logits, -1)
    # a banned token (-inf) contributes p log p = 0
    plogp = torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p.exp() * log_p)
    return log_p.gather(-1, ids[..., None])[..., 0], -plogp.sum(-1), torch.logsumexp(logits, -1)


def kl_divergence(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """k1, k2, k3 or absolute estimate of KL(policy || reference) per token, nats."""
    gap = ref_logp - logp
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return gap.square() / 2
    if estimator == "absolute":
        return gap.abs()
    capped = gap.clamp(max=20.0)
    return capped.exp() * (1 + gap - capped) - gap - 1


def policy_loss(
    logits: Tensor,
    ids: Tensor,
    advantages: Tensor,
    config: LossConfig,
    *,
    mask: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    temperature: Tensor | None = None,
    entropy_threshold: float | None = None,
    denominator: float | None = None,
) -> Tensor:
    """The loss of `LossConfig` for a padded batch.

    Args:
        logits: (B, T, V) any floating dtype; ids: (B, T); advantages: (B,) or (B, T); mask: (B, T)
            bool; log-probs and temperature: (B, T).
    """
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    # what is masked is replaced before any arithmetic, so that NaN there cannot reach a gradient
    logits = torch.where(mask[..., None], logits, torch.zeros_like(logits))
    ids = torch.where(mask, ids, torch.zeros_like(ids))
    if temperature is not None:
        logits = logits / torch.where(mask, temperature, torch.ones_like(temperature))[..., None]
    logp, entropy, _ = logprob(logits, ids, config.temperature if temperature is None else 1.0)
    zero = torch.zeros_like(logp)
    old = logp.detach() if old_logp is None else torch.where(mask, old_logp, zero)
    advantages = advantages[:, None].expand_as(logp) if advantages.dim() == 1 else advantages
    advantages = torch.where(mask, advantages, zero)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    keep = torch.ones_like(zero)
    if config.top_entropy_quantile < 1:
        if entropy_threshold is None:
            share = 1 - config.top_entropy_quantile
            entropy_threshold = torch.quantile(entropy.detach()[mask], share)
        keep = (entropy.detach() >= entropy_threshold).to(zero)
    if rollout_logp is not None:
        rollout_logp = torch.where(mask, rollout_logp, torch.full_like(rollout_logp, torch.nan))

    token_loss, ratio = _objective(config, logp, old, advantages, mask, rollout_logp)
    token_loss = token_loss * keep
    if rollout_logp is not None and config.loss_type != "vespo":
        token_loss = token_loss * _rollout_factor(config, old - rollout_logp, mask).detach()
    if config.off_policy_mask_threshold is not None:
        drift = (old if rollout_logp is None else rollout_logp) - logp.detach()
        drift = torch.where(mask, drift.nan_to_num(nan=0.0), zero).sum(1, keepdim=True) / lengths
        off = (advantages < 0) & (drift > config.off_policy_mask_threshold)
        token_loss = torch.where(off, zero, token_loss)
    if ref_logp is not None:
        ref = torch.where(mask, ref_logp, logp.detach())
        kl = kl_divergence(logp, ref, config.kl_estimator)
        if config.kl_gradient is not None:
            other = kl_divergence(logp, ref, config.kl_gradient)
            kl = other + (kl - other).detach()
        weighted = ratio * kl if config.use_bias_correction_kl else kl
        token_loss = token_loss + config.beta * weighted
    token_loss = token_loss - config.entropy_coef * entropy * keep
    token_loss = torch.where(mask, token_loss, zero)
    return _aggregate(config, token_loss, mask, denominator)


def _objective(config, logp, old, advantages, mask, rollout_logp) -> tuple[Tensor, Tensor]:
    """Token losses of the objective (B, T), and the ratio at its level."""
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    low, high = config.epsilon, config.upper_epsilon
    trained_on = old
    if config.loss_type == "vespo" and rollout_logp is not None:
        old = torch.where(torch.isnan(rollout_logp), old, rollout_logp)
    gap = torch.where(mask, logp - old, torch.zeros_like(logp))
    if config.level == "sequence":
        gap = gap.sum(1, keepdim=True) / lengths
    elif config.level == "sequence_token":
        gap = (gap.sum(1, keepdim=True) / lengths - gap).detach() + gap
    elif config.level == "sequence_product":
        gap = gap.sum(1, keepdim=True)
    elif config.level == "sequence_clipped":
        above = torch.where(advantages > 0, gap.clamp(max=high), gap)
        gap = torch.where(advantages < 0, gap.clamp(min=-low), above)
        gap = gap.sum(1, keepdim=True) / lengths
    ratio = gap.clamp(-20.0, 20.0).exp().expand_as(logp)
    if config.loss_type == "vespo":
        factor = _vespo(config, ratio.detach().clamp(min=1e-8), advantages)
        # a KL is weighted by the ratio of its own token
        own = torch.where(mask, logp - trained_on, torch.zeros_like(logp)).clamp(-20.0, 20.0)
        return -factor * advantages * logp, own.exp()
    objective = config.preset.objective
    if objective == "clip":
        plain = ratio.clamp(max=config.ratio_cap) * advantages
        return -torch.minimum(plain, ratio.clamp(1 - low, 1 + high) * advantages), ratio
    if objective == "surrogate":
        return -ratio * advantages, ratio
    if objective == "sapo":
        taus = config.sapo_temperature_pos, config.sapo_temperature_neg
        tau = torch.where(advantages > 0, *(torch.full_like(logp, t) for t in taus))
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages, ratio
    fixed = ratio.detach()
    if objective == "reinforce":
        factor = torch.ones_like(fixed)
    elif objective == "cispo":
        factor = fixed.clamp(config.cispo_ratio_min, high)
    else:
        factor = fixed.clamp(max=config.ratio_cap) * _within(config, logp.detach(), old, advantages)
    return -factor * advantages * logp, ratio


def _vespo(config: LossConfig, w: Tensor, advantages: Tensor) -> Tensor:
    """phi (B, T) of VESPO."""
    negative = advantages < 0
    k, decay = (
        torch.where(negative, torch.full_like(w, below), torch.full_like(w, above))
        for below, above in (
            (config.vespo_k_neg, config.vespo_k_pos),
            (config.vespo_lambda_neg, config.vespo_lambda_pos),
        )
    )
    return torch.exp(decay + k * w.log() - decay * w)


def _within(config: LossConfig, logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """1 for tokens inside DPPO's bounds, else 0."""
    p, q = logp.exp(), old.exp()
    positive = advantages > 0
    if config.loss_type == "dppo_tv":
        inside = torch.where(positive, p - q <= config.upper_epsilon, p - q >= -config.epsilon)
    else:
        other = torch.log((1e-8 - torch.expm1(old)) / (1e-8 - torch.expm1(logp)))
        kl = q * (old - logp) + (1 - q) * other
        within = torch.where(positive, kl <= config.upper_epsilon, kl <= config.epsilon)
        inside = within | torch.where(positive, p <= q, p >= q)
    return inside.to(logp)


def _rollout_factor(config: LossConfig, gap: Tensor, mask: Tensor) -> Tensor:
    """What the objective is multiplied by, from old - rollout log-probs (B, T)."""
    level, mode = config.rollout_correction.rsplit("_", 1)
    known = mask & ~torch.isnan(gap)
    gap = torch.where(known, gap, torch.zeros_like(gap))
    if level != "token":
        gap = gap.sum(1, keepdim=True)
    if level == "geometric":
        gap = gap / known.sum(1, keepdim=True).clamp(min=1)
    q = gap.clamp(-20.0, 20.0).exp().expand_as(mask)
    low = 0.0 if config.rollout_ratio_min is None else config.rollout_ratio_min
    high = torch.inf if config.rollout_ratio_max is None else config.rollout_ratio_max
    factor = q.clamp(low, high)
    if mode == "mask":
        factor = torch.where((q < low) | (q > high), torch.zeros_like(q), q)
    # a single token without a log-prob is neutral; so is its share in a sequence
    return torch.where(known, factor, torch.ones_like(q)) if level == "token" else factor


def _aggregate(
    config: LossConfig, token_loss: Tensor, mask: Tensor, denominator: float | None
) -> Tensor:
    if config.weights == "token_mean":
        return token_loss.sum() / (mask.sum().clamp(min=1) if denominator is None else denominator)
    sequences = mask.shape[0] if denominator is None else denominator
    if config.weights == "sequence_mean":
        return (token_loss.sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    if config.weights == "sequence_sum":
        return token_loss.sum() / sequences
    return token_loss.sum() / (sequences * config.max_completion_length)
