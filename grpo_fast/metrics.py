"""Per-token terms -> the loss and its metrics, as 0-d tensors: reading them is the caller's one
host sync."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .objectives import LOG_RATIO_LIMIT


class Terms(NamedTuple):
    """What a route knows of each of its K rows; losses and derivatives already carry the weight."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor
    dlogp: Tensor
    log_ratio: Tensor
    advantage: Tensor
    mask: Tensor | None
    """(K,) bool, or None when every listed row counts."""


def summarize(
    terms: Terms, n_rows: int, n_tokens: int, has_ref: bool, bounds: tuple[float, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the losses, and metrics over the unmasked tokens (means unless said otherwise).

    With `skip_inactive_forward` the rows that were computed stand for the tokens, in all but
    `tokens`.

    Returns:
        loss: 0-d; exactly 0 when everything is masked.
        metrics: `loss`; `kl` (nats, only with a reference); `entropy` (nats); `clip_low` and
            `clip_high` (share of tokens whose ratio left the bounds on the side its advantage
            pushes to), `clip_ratio` (their sum); `ratio_mean`, `ratio_min`, `ratio_max`; and the
            counts `tokens`, `active_rows` (derivative not exactly 0), `nonfinite_tokens` (NaN or
            infinite log-prob or loss) and `clamped_ratios` (|log-ratio| above 20 nats).
    """
    total = terms.loss.sum()
    device, dtype = total.device, total.dtype
    n = max(n_rows, 1)
    mask = torch.ones_like(terms.loss, dtype=torch.bool) if terms.mask is None else terms.mask

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values, torch.zeros_like(values)).sum() / n

    def extreme(high: bool) -> Tensor:
        if n_rows == 0:
            return torch.ones((), device=device, dtype=dtype)
        fill = torch.full_like(terms.ratio, -torch.inf if high else torch.inf)
        ratio = torch.where(mask, terms.ratio, fill)
        return ratio.amax() if high else ratio.amin()

    low = ((terms.ratio < bounds[0]) & (terms.advantage < 0)).to(dtype)
    high = ((terms.ratio > bounds[1]) & (terms.advantage > 0)).to(dtype)
    finite = torch.isfinite(terms.logp) & torch.isfinite(terms.loss)
    metrics = {
        "loss": total.clone(),
        "entropy": mean(terms.entropy),
        "clip_low": mean(low),
        "clip_high": mean(high),
        "clip_ratio": mean(low + high),
        "ratio_mean": mean(terms.ratio),
        "ratio_min": extreme(False),
        "ratio_max": extreme(True),
        "tokens": torch.full((), n_tokens, device=device),
        "active_rows": (mask & (terms.dlogp != 0)).sum(),
        "nonfinite_tokens": (mask & ~finite).sum(),
        "clamped_ratios": (mask & (terms.log_ratio.abs() > LOG_RATIO_LIMIT)).sum(),
    }
    if has_ref:
        metrics["kl"] = mean(terms.kl)
    return total, metrics
