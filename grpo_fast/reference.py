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
    """k1, k2 or k3 estimate of KL(policy || reference) per token, nats."""
    gap = ref_logp - logp
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return gap.square() / 2
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
    denominator: float | None = None,
) -> Tensor:
    """The loss of `LossConfig` for a padded batch.

    Args:
        logits: (B, T, V) any floating dtype; ids: (B, T); advantages: (B,) or (B, T); mask: (B, T)
            bool.
    """
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    # what is masked is replaced before any arithmetic, so that NaN there cannot reach a gradient
    logits = torch.where(mask[..., None], logits, torch.zeros_like(logits))
    ids = torch.where(mask, ids, torch.zeros_like(ids))
    logp, _, _ = logprob(logits, ids, config.temperature)
    old = logp.detach() if old_logp is None else torch.where(mask, old_logp, torch.zeros_like(logp))
    advantages = advantages[:, None].expand_as(logp) if advantages.dim() == 1 else advantages
    advantages = torch.where(mask, advantages, torch.zeros_like(logp))

    log_ratio = torch.where(mask, logp - old, torch.zeros_like(logp))
    lengths = mask.sum(1, keepdim=True)
    if config.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / lengths.clamp(min=1)
    ratio = log_ratio.clamp(-20.0, 20.0).exp()
    low, high = config.ratio_bounds
    if config.loss_type == "cispo":
        token_loss = -ratio.clamp(max=high).detach() * advantages * logp
    else:
        plain = ratio.clamp(max=config.ratio_cap) * advantages
        token_loss = -torch.minimum(plain, ratio.clamp(low, high) * advantages)
    if ref_logp is not None:
        ref = torch.where(mask, ref_logp, logp.detach())
        kl = kl_divergence(logp, ref, config.kl_estimator)
        token_loss = token_loss + config.beta * (
            ratio * kl if config.use_bias_correction_kl else kl
        )
    token_loss = torch.where(mask, token_loss, torch.zeros_like(token_loss))

    if config.preset.weights == "token_mean":
        return token_loss.sum() / (mask.sum().clamp(min=1) if denominator is None else denominator)
    sequences = ids.shape[0] if denominator is None else denominator
    if config.preset.weights == "sequence_mean":
        return (token_loss.sum(1) / lengths[:, 0].clamp(min=1)).sum() / sequences
    return token_loss.sum() / (sequences * config.max_completion_length)
