"""TRL's `GRPOConfig` as a `LossConfig`, or by name what of it cannot be honoured."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grpo_fast import LossConfig
from grpo_fast.integrations.names import owned

_SAME = ("loss_type", "importance_sampling_level", "epsilon", "delta", "beta", "temperature")
_SAME += ("use_bias_correction_kl", "top_entropy_quantile", "off_policy_mask_threshold")
_SAME += ("sapo_temperature_pos", "sapo_temperature_neg", "entropy_coef", "max_completion_length")
_SAME += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
# fields of GRPOConfig -> fields of LossConfig
NAMES = dict(zip(_SAME, _SAME, strict=True)) | {
    "vllm_importance_sampling_mode": "rollout_correction",
    "vllm_importance_sampling_clip_min": "rollout_ratio_min",
    "vllm_importance_sampling_clip_max": "rollout_ratio_max",
}
# loss types that divide by the tokens of the accumulation window
WINDOW = ("dapo", "cispo", "vespo")


def loss_config(args: Any) -> LossConfig:
    """The `LossConfig` of a TRL `GRPOConfig`.

    Raises:
        ValueError: an option, or a combination of options, that the loss cannot honour.
    """
    kind, vespo = f"loss_type={args.loss_type!r}", args.loss_type == "vespo"
    bonus, quantile = args.entropy_coef != 0.0, args.top_entropy_quantile < 1.0
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    refused = {
        "use_adaptive_entropy": args.use_adaptive_entropy,
        f"entropy_coef with {kind}": bonus and args.loss_type in ("grpo", "sapo"),
        "entropy_coef with top_entropy_quantile < 1": bonus and quantile,
        "top_entropy_quantile < 1 on several processes": quantile and args.world_size > 1,
        f"use_bias_correction_kl at the level of the sequence with {kind}": vespo
        and args.beta != 0.0
        and args.use_bias_correction_kl
        and args.importance_sampling_level == "sequence",
        f"vllm_importance_sampling_correction with {kind}": vespo and corrected,
        "router_aux_loss_coef": bool(args.router_aux_loss_coef),
    }
    if names := [name for name, given in refused.items() if given]:
        raise ValueError(f"FastGRPOTrainer cannot honour {', nor '.join(names)}.")
    given = {ours: getattr(args, theirs) for theirs, ours in NAMES.items()}
    given["epsilon_high"] = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if vespo:
        # whatever the option says, TRL's ratio is that of the sequence too
        given["importance_sampling_level"] = None
    return LossConfig(**owned(args.loss_type, given))


def accumulation_steps(trainer: Any) -> float:
    """Micro-batches of an optimizer step; 1 in evaluation, which accumulates nothing."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0


def denominator(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor | float:
    """What TRL divides a micro-batch by: with it the sum over an optimizer step is TRL's loss."""
    steps, training = accumulation_steps(trainer), trainer.model.training
    if trainer.loss_type in WINDOW:
        # `num_items_in_batch` spans the text of a generation, not of an optimizer step
        window = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        return window * steps / (trainer.args.steps_per_generation if training else 1.0)
    return (mask.sum().clamp(min=1) if trainer.loss_type == "bnpo" else len(mask)) * steps


def entropy_coef(trainer: Any, count: Tensor | float, mask: Tensor) -> float:
    """`entropy_coef` in the units of the loss type: TRL's bonus is a mean over the tokens of the
    micro-batch for all of them, ours has the weight of the loss. Waits for the device."""
    tokens = float(mask.sum().clamp(min=1)) * accumulation_steps(trainer)
    length = trainer.max_completion_length if trainer.loss_type == "dr_grpo" else 1
    return trainer.entropy_coef * float(count) * length / tokens
