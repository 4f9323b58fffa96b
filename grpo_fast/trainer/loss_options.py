"""The fields of `GRPOConfig` that describe the loss."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.presets import AGGREGATIONS, KL_ESTIMATORS, LEVELS, PRESETS

from .kl import option as _option


def listed(names: Any) -> str:
    """Names as a sentence of help has them."""
    return ", ".join(names)


@dataclass
class LossOptions:
    """Fields of `LossConfig`, which owns their defaults and their checks, and how often a window is
    used."""

    loss_type: str = _option(LossConfig.loss_type, f"One of {listed(PRESETS)}.")
    importance_sampling_level: str | None = _option(
        LossConfig.importance_sampling_level,
        f"Level of the ratio: {listed(LEVELS)}; default: the loss type's own.",
    )
    aggregation: str | None = _option(
        LossConfig.aggregation,
        f"Mean of the token losses: {listed(AGGREGATIONS)}; default: the loss type's own.",
    )
    epsilon: float = _option(LossConfig.epsilon, "Lower clip.")
    epsilon_high: float | None = _option(LossConfig.epsilon_high, "Upper clip; default: epsilon.")
    delta: float | None = _option(LossConfig.delta, "Cap of the ratio (two-sided clipping).")
    beta: float = _option(LossConfig.beta, "KL coefficient; 0 loads no reference policy.")
    kl_estimator: str = _option(LossConfig.kl_estimator, f"One of {listed(KL_ESTIMATORS)}.")
    kl_gradient: str | None = _option(
        LossConfig.kl_gradient, "KL estimator that lends its gradient; default: kl_estimator."
    )
    use_bias_correction_kl: bool = _option(
        LossConfig.use_bias_correction_kl, "Multiply the KL by the importance ratio."
    )
    entropy_coef: float = _option(LossConfig.entropy_coef, "Coefficient of the entropy bonus.")
    top_entropy_quantile: float = _option(
        LossConfig.top_entropy_quantile,
        "Share of the tokens, those of highest entropy, that keep their objective.",
    )
    off_policy_mask_threshold: float | None = _option(
        LossConfig.off_policy_mask_threshold,
        "Nats from the old policy beyond which a completion of negative advantage is left out.",
    )
    rollout_correction: str = _option(
        LossConfig.rollout_correction,
        "What is done with p(policy) / p(sampler) where a sampler gives its log-probs.",
    )
    rollout_ratio_min: float | None = _option(
        LossConfig.rollout_ratio_min, "Lower bound of that ratio; default: none."
    )
    rollout_ratio_max: float | None = _option(
        LossConfig.rollout_ratio_max, "Upper bound of that ratio."
    )
    cispo_ratio_min: float = _option(LossConfig.cispo_ratio_min, "cispo: lower bound of the ratio.")
    sapo_temperature_pos: float = _option(
        LossConfig.sapo_temperature_pos, "sapo: temperature of the gate, advantage > 0."
    )
    sapo_temperature_neg: float = _option(
        LossConfig.sapo_temperature_neg, "sapo: temperature of the gate, advantage <= 0."
    )
    vespo_k_pos: float = _option(LossConfig.vespo_k_pos, "vespo: exponent, advantage >= 0.")
    vespo_lambda_pos: float = _option(LossConfig.vespo_lambda_pos, "vespo: decay, advantage >= 0.")
    vespo_k_neg: float = _option(LossConfig.vespo_k_neg, "vespo: exponent, advantage < 0.")
    vespo_lambda_neg: float = _option(LossConfig.vespo_lambda_neg, "vespo: decay, advantage < 0.")
    num_iterations: int = _option(1, "How often each window of completions is used.")
    mask_truncated_completions: bool = _option(
        False, "Leave completions that hit max_completion_length out of the loss."
    )
    workspace_bytes: int | None = _option(
        None, "Budget of the logit chunks in bytes; default: the loss's own."
    )

    head_sharding: str | None = _option(
        None,
        "FSDP2: 'vocabulary' leaves each rank its rows of the lm_head and moves hidden states "
        "instead; it pays while a micro-batch has fewer tokens over all ranks than V.",
    )

    def loss_config(self) -> LossConfig:
        """The loss these arguments describe; `LossConfig` owns its defaults and its checks."""
        if self.head_sharding not in (None, "vocabulary"):
            fail("head_sharding", "None or 'vocabulary'", repr(self.head_sharding))
        if self.loss_type == "vespo" and self.importance_sampling_level == "token":
            # TRL's default, of which it takes no notice there: the weight is one of the sequence
            self.importance_sampling_level = None
        shared = [f.name for f in fields(LossConfig) if f.name in type(self).__dataclass_fields__]
        given = {name: getattr(self, name) for name in shared}
        if self.kl_in_reward is True:
            given["beta"] = 0.0
        return LossConfig(**given)
