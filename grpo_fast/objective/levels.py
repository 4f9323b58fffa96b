"""At which level the importance ratio is taken: log-ratios of tokens -> those the objective sees,
and the derivative by them back to the tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_fast.presets import LEVELS

from .weights import sequence_sum, spread


def _identity(by_ratio: Tensor) -> Tensor:
    return by_ratio


def lift(
    level: str,
    log_ratio: Tensor,
    mask: Tensor,
    bounds: Tensor | None,
    advantages: Tensor,
    clip: tuple[float, float],
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Log-ratios (N,) at a level, and the function that takes d/dlog_ratio there to d/dlogp.

    With l_t = logp_t - old_logp_t over the L unmasked tokens of a sequence:

        token             l_t
        sequence          mean(l)                                            (GSPO, 2025)
        sequence_token    stop_gradient(mean(l) - l_t) + l_t                 (GSPO-token, 2025)
        sequence_product  sum(l)                                             (RLOO, 2024)
        sequence_clipped  mean(min(l, high) where A > 0, max(l, -low) where A < 0, else l)
                                                                             (GMPO, 2025)

    Args:
        log_ratio: (N,) l, 0 where masked; mask: (N,) bool.
        bounds: (S+1,) sequence boundaries; may be None at token level.
        advantages: (N,); clip: low and high of sequence_clipped, in nats.
    """
    if level == "token":
        return log_ratio, _identity
    n = log_ratio.numel()
    keep = None
    if LEVELS[level].clips_tokens:
        low, high = clip
        # A = 0 has no side, and a NaN stays
        clipped = ((advantages > 0) & (log_ratio > high)) | ((advantages < 0) & (log_ratio < -low))
        keep = ~clipped
        log_ratio = torch.where(clipped, log_ratio.clamp(-low, high), log_ratio)
    total = sequence_sum(log_ratio, bounds)
    length = torch.ones_like(total)
    if level != "sequence_product":
        length = sequence_sum(mask.to(log_ratio.dtype), bounds).clamp(min=1.0)
    lifted = spread(total / length, bounds, n)
    if level == "sequence_token":
        return lifted, _identity

    def pull(by_ratio: Tensor) -> Tensor:
        # every token of a sequence moves its mean log-ratio by 1 / length
        by_token = spread(sequence_sum(by_ratio, bounds) / length, bounds, n)
        return by_token if keep is None else torch.where(keep, by_token, torch.zeros_like(by_token))

    return lifted, pull
