"""Metrics under TRL's names and with TRL's meaning, of one micro-batch and then of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_fast.objective.terms import TokenTerms

from .options import WINDOW, accumulation_steps

# sums of one micro-batch on one rank: tokens and what is averaged over them, then places where a
# ratio is counted (tokens, or sequences at sequence level) and what is averaged over those
COLUMNS = ("tokens", "entropy", "kl", "places", "low", "high", "cispo", "low_min", "high_max")
COLUMNS += ("phi", "phi_places", "policy_loss")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def micro_batch(
    trainer: Any,
    terms: TokenTerms,
    inputs: Mapping[str, Any],
    mask: Tensor,
    loss: Tensor,
) -> dict[str, Tensor]:
    """`COLUMNS`, of what the loss knows of each token, TRL's own inputs and the loss."""
    kept = mask.bool()
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages

    def total(values: Tensor) -> Tensor:
        return torch.where(kept, values, torch.zeros_like(values)).sum()

    weighted = trainer.args.use_bias_correction_kl
    kl = terms.kl * terms.ratio if weighted else terms.kl
    out = {"tokens": kept.sum(), "entropy": total(terms.entropy), "kl": total(kl)}
    ratio, places = terms.ratio, kept
    if trainer.importance_sampling_level == "sequence" and advantages.size(1) == 1:
        # one value per sequence, and one that is masked whole counts with a ratio of 1
        first = kept.int().argmax(1, keepdim=True)
        ratio, places = ratio.gather(1, first), torch.ones_like(kept[:, :1])
    low = places & (ratio < 1 - trainer.epsilon_low) & (advantages < 0)
    high = places & (ratio > 1 + trainer.epsilon_high) & (advantages > 0)
    # 0 / 0 for a sequence without tokens: it is left out of the extrema
    shares = [flags.sum(1) / places.sum(1) for flags in (low, high)]
    out |= {"places": places.sum(), "low": low.sum(), "high": high.sum()}
    out["cispo"] = (places & (ratio > trainer.epsilon_high) & (advantages > 0)).sum()
    out["low_min"] = torch.nan_to_num(shares[0], nan=torch.inf).amin()
    out["high_max"] = torch.nan_to_num(shares[1], nan=-torch.inf).amax()
    if trainer.loss_type == "vespo":
        old = inputs.get("old_per_token_logps")
        change = torch.zeros_like(terms.logp) if old is None else terms.logp - old
        names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
        numbers = {name: getattr(trainer.args, f"vespo_{name}") for name in names}
        phi = trainer.get_gamma_weights(advantages, change, mask, None, **numbers)
        counted = torch.ones_like(phi, dtype=torch.bool) if phi.size(1) == 1 else kept
        out["phi"] = torch.where(counted, phi, torch.zeros_like(phi)).sum()
        out["phi_places"] = counted.sum()
    if trainer.entropy_coef != 0.0:
        steps = accumulation_steps(trainer)
        bonus = trainer.entropy_coef * out["entropy"] / out["tokens"].clamp(min=1) / steps
        # TRL shows it before it is divided by the micro-batches of a step
        out["policy_loss"] = (loss + bonus) * (1.0 if trainer.loss_type in WINDOW else steps)
    return out


def flush(trainer: Any, mode: str) -> None:
    """Append what has been measured since the last call to TRL's metrics: one collective and one
    wait for the device, however many micro-batches there were."""
    measured, trainer.measured[mode] = trainer.measured[mode], []
    if not measured:
        return
    zero = measured[0]["entropy"].new_zeros(())
    table = torch.stack(
        [torch.stack([m.get(name, zero).to(zero) for name in COLUMNS]) for m in measured]
    )
    ranks = trainer.accelerator.gather(table[None]).tolist()
    metrics = trainer._metrics[mode]
    for place in range(len(measured)):
        by_rank = {n: [r[place][i] for r in ranks] for i, n in enumerate(COLUMNS)}
        for name, value in _named(trainer, by_rank).items():
            metrics[name].append(value)


def _named(trainer: Any, by_rank: Mapping[str, list[float]]) -> dict[str, float]:
    sums = {name: sum(values) for name, values in by_rank.items()}
    tokens, places = max(sums["tokens"], 1.0), max(sums["places"], 1.0)
    out = {"entropy": sums["entropy"] / tokens}
    if trainer.beta != 0.0:
        out["kl"] = sums["kl"] / tokens
    if trainer.loss_type in CLIPPED:
        low, high = sums["low"] / places, sums["high"] / places
        extrema = min(by_rank["low_min"]), max(by_rank["high_max"])
        finite = [v if abs(v) != float("inf") else float("nan") for v in extrema]
        out |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
        out |= {"clip_ratio/region_mean": low + high}
        out |= {"clip_ratio/low_min": finite[0], "clip_ratio/high_max": finite[1]}
    elif trainer.loss_type == "cispo":
        out["cispo_clip_ratio"] = sums["cispo"] / places
    elif trainer.loss_type == "vespo":
        out["vespo/phi_seq_mean"] = sums["phi"] / max(sums["phi_places"], 1.0)
    if trainer.entropy_coef != 0.0:
        out["policy_loss"] = sums["policy_loss"] / len(by_rank["policy_loss"])
        if trainer.model.training:
            out["entropy_coef"] = trainer.entropy_coef
    return out
