"""Per-token terms -> the loss and its metrics, as 0-d tensors: reading them is the caller's one
host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.objective.batch import Batch
from grpo_fast.objective.objectives import LOG_RATIO_LIMIT
from grpo_fast.objective.terms import Terms

COUNTS = ("tokens", "active_rows", "nonfinite_tokens", "clamped_ratios", "rollout_missing")


def names(has_ref: bool, has_rollout: bool) -> tuple[str, ...]:
    """The metrics of a call with and without reference and rollout log-probs, in their order."""
    out = ["loss", "entropy", "clip_low", "clip_high", "clip_ratio"]
    out += ["ratio_mean", "ratio_min", "ratio_max", *COUNTS[:4]]
    if has_ref:
        out.append("kl")
    if has_rollout:
        out += ["rollout_gap", "rollout_ratio_max", "rollout_missing"]
    return tuple(out)


def summarize(terms: Terms, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the losses, and metrics over the unmasked tokens (means unless said otherwise).

    With `skip_inactive_forward` the rows that were computed stand for the tokens, in all but
    `tokens`.

    Returns:
        loss: 0-d; exactly 0 when everything is masked.
        metrics: `loss`; `kl` (nats, only with a reference); `entropy` (nats); `clip_low` and
            `clip_high` (share of tokens whose ratio left the bounds on the side its advantage
            pushes to), `clip_ratio` (their sum); `ratio_mean`, `ratio_min`, `ratio_max` (at
            the level of the loss; of tokens in gmpo and vespo); the
            counts `tokens`, `active_rows` (a derivative that is not exactly 0), `nonfinite_tokens`
            (NaN or infinite log-prob or loss) and `clamped_ratios` (|log-ratio| above 20 nats);
            and with rollout log-probs `rollout_gap` (log p(old) / p(rollout), nats),
            `rollout_ratio_max` and the count `rollout_missing` (NaN log-probs, which are neutral).
    """
    rows = batch.rows
    total = terms.loss.sum()
    device, dtype = total.device, total.dtype
    mask = torch.ones_like(terms.loss, dtype=torch.bool) if terms.mask is None else terms.mask
    # a fixed capacity leaves the count on the device
    n = mask.sum().clamp(min=1) if rows.fixed else max(rows.n_unmasked, 1)
    # all of them, also those that a fixed capacity has no room for
    n_tokens = rows.mask.sum() if rows.fixed else torch.full((), rows.n_tokens, device=device)

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values, torch.zeros_like(values)).sum() / n

    def extreme(values: Tensor, high: bool) -> Tensor:
        if values.numel() == 0 or not (rows.fixed or rows.n_unmasked):
            return torch.ones((), device=device, dtype=dtype)
        fill = torch.full_like(values, -torch.inf if high else torch.inf)
        kept = torch.where(mask, values, fill)
        found = kept.amax() if high else kept.amin()
        # whether a fixed capacity has a token is known on the device alone
        return torch.where(mask.any(), found, torch.ones_like(found)) if rows.fixed else found

    bounds = batch.config.ratio_bounds
    low = ((terms.ratio < bounds[0]) & (terms.advantage < 0)).to(dtype)
    high = ((terms.ratio > bounds[1]) & (terms.advantage > 0)).to(dtype)
    finite = torch.isfinite(terms.logp) & torch.isfinite(terms.loss)
    active = terms.dlogp != 0
    if batch.config.entropy_coef > 0 and terms.dentropy is not None:
        active = active | (terms.dentropy != 0)
    metrics = {
        "loss": total.clone(),
        "entropy": mean(terms.entropy),
        "clip_low": mean(low),
        "clip_high": mean(high),
        "clip_ratio": mean(low + high),
        "ratio_mean": mean(terms.ratio),
        "ratio_min": extreme(terms.ratio, False),
        "ratio_max": extreme(terms.ratio, True),
        "tokens": n_tokens,
        "active_rows": (mask & active).sum(),
        "nonfinite_tokens": (mask & ~finite).sum(),
        "clamped_ratios": (mask & (terms.log_ratio.abs() > LOG_RATIO_LIMIT)).sum(),
    }
    if batch.ref_logp is not None:
        metrics["kl"] = mean(terms.kl)
    if terms.rollout_gap is not None:
        missing = torch.isnan(terms.rollout_gap)
        gap = torch.where(missing, torch.zeros_like(terms.rollout_gap), terms.rollout_gap)
        metrics["rollout_gap"] = mean(gap)
        metrics["rollout_ratio_max"] = extreme(gap.exp(), True)
        metrics["rollout_missing"] = (mask & missing).sum()
    if rows.fixed:
        poison = torch.where(rows.poisoned, torch.nan, 0.0).to(dtype)
        total, metrics["loss"] = total + poison, metrics["loss"] + poison
    return total, metrics
