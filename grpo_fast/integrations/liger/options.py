"""Liger-Kernel's options as a `LossConfig`, and its denominators."""

from __future__ import annotations

from torch import Tensor

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.integrations.names import owned
from grpo_fast.integrations.rollout_ratio import tokens_per_rank

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def loss_config(loss_type: str, level: str, weight_kl: bool, **more) -> LossConfig:
    """The configuration that means what Liger's options do; ValueError for one that has none."""
    if loss_type not in LOSS_TYPES:
        fail("loss_type", f"one of {', '.join(LOSS_TYPES)}", repr(loss_type))
    levels = ("token",) if loss_type in ("cispo", "sapo", "vespo") else ("token", "sequence")
    if level not in levels:
        fail("importance_sampling_level", f"{' or '.join(levels)} for {loss_type}", repr(level))
    vespo = loss_type == "vespo"
    for name in ("vespo_lambda_pos", "vespo_lambda_neg"):
        more[name] = max(more[name], 1e-4)
    more["importance_sampling_level"] = None if vespo else level
    more = owned(loss_type, more)
    return LossConfig(loss_type=loss_type, use_bias_correction_kl=weight_kl, **more)


def denominator(
    config: LossConfig, mask: Tensor, num_items: Tensor | float | None
) -> Tensor | None:
    """What dapo, cispo and vespo divide by; the other loss types count this call alone."""
    window = config.loss_type in ("dapo", "cispo", "vespo")
    return tokens_per_rank(mask, num_items) if window else None
