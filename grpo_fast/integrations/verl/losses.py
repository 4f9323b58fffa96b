"""The presets as registered policy losses of verl, and the check of verl's version."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.integrations.names import check_options, renamed
from grpo_fast.objective.token_losses import TokenLosses, token_losses
from grpo_fast.presets import PRESETS

__all__ = ["TESTED", "WORKS", "register", "registered", "unregister"]

TESTED = ("0.9.1",)
WORKS = f"grpo_fast.integrations.verl works with verl {' and '.join(TESTED)}"
try:
    import verl
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss
    from verl.utils.torch_functional import masked_mean
except (ImportError, AttributeError, RuntimeError) as error:
    raise ImportError(f"{WORKS} (pip install verl=={TESTED[-1]}): {error}") from error
if verl.__version__ not in TESTED:
    warnings.warn(f"{WORKS}; {verl.__version__} is installed and untested.", stacklevel=2)

# how each preset is averaged in its paper; verl's loss_agg_mode decides
_AGG_MODES = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "constant_length": "seq-mean-token-sum-norm",
}
_NAMES = {"epsilon": "clip_ratio_low", "epsilon_high": "clip_ratio_high", "delta": "clip_ratio_c"}
_NAMES |= {"cispo_ratio_min": "clip_ratio_low", "mask": "response_mask", "logp": "log_prob"}
_NAMES |= {"sapo_temperature_pos": "tau_pos", "sapo_temperature_neg": "tau_neg"}
_NAMES |= {"old_logp": "old_log_prob"}
# what `register` takes: all that is not verl's own business, which has options for the rest
_OPTIONS = ("importance_sampling_level", "epsilon", "epsilon_high", "delta", "cispo_ratio_min")
_OPTIONS += ("off_policy_mask_threshold", "sapo_temperature_pos", "sapo_temperature_neg")
_OPTIONS += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")


def register(name: str, loss_type: str, **options: Any) -> None:
    """Register a policy loss that `actor.policy_loss.loss_mode=<name>` selects.

    Args:
        name: any that verl does not have itself.
        loss_type: row of `PRESETS`.
        options: fields of `LossConfig`, e.g. vespo_k_pos. They stand above what the actor's config
            says: clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos and tau_neg.

    Raises:
        ValueError: an unknown loss type or option, a value out of range, or a name in use.
    """
    check_options(loss_type, options, _OPTIONS)
    # cispo without a bound of its own warns, and the actor's config will give it one
    bound = {"epsilon_high": 5.0} if PRESETS[loss_type].objective == "cispo" else {}
    LossConfig(loss_type, aggregation="token_mean", **{**bound, **options})
    if name in POLICY_LOSS_REGISTRY and name not in registered():
        fail("name", "one that verl does not have yet", repr(name), "choose another.")
    POLICY_LOSS_REGISTRY[name] = functools.partial(_policy_loss, loss_type, options)


def registered() -> list[str]:
    """Names of the policy losses that are ours."""
    losses = POLICY_LOSS_REGISTRY.items()
    return sorted(name for name, f in losses if getattr(f, "func", None) is _policy_loss)


def unregister() -> None:
    """Take every policy loss of ours out of verl's table."""
    for name in registered():
        del POLICY_LOSS_REGISTRY[name]


def loss_config(loss_type: str, actor: Any, options: dict[str, Any]) -> LossConfig:
    """The `LossConfig` of verl's `ActorConfig`; options stand above it."""
    low, high = (
        actor.clip_ratio if value is None else value
        for value in (actor.clip_ratio_low, actor.clip_ratio_high)
    )
    preset = PRESETS[loss_type]
    given: dict[str, Any] = {"epsilon": low, "epsilon_high": high}
    if preset.objective == "cispo":
        given = {"cispo_ratio_min": max(0.0, 1.0 - low), "epsilon_high": 1.0 + high}
    elif preset.objective == "sapo":
        given = {"sapo_temperature_pos": actor.tau_pos, "sapo_temperature_neg": actor.tau_neg}
    elif preset.objective in ("surrogate", "vespo", "reinforce") and loss_type != "gmpo":
        given = {}
    level = options.get("importance_sampling_level") or (*preset.levels, None)[0]
    # verl's losses of a sequence have no dual clip either
    if preset.objective in ("clip", "dppo_tv", "dppo_kl") and level == "token":
        given["delta"] = actor.clip_ratio_c
    return LossConfig(loss_type, aggregation="token_mean", **{**given, **options})


def _policy_loss(
    loss_type: str,
    options: dict[str, Any],
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    own = _AGG_MODES[PRESETS[loss_type].weights]
    if loss_agg_mode != own:
        warnings.warn(f"{loss_type} has loss_agg_mode={own}, got {loss_agg_mode}.", stacklevel=2)
    mask = response_mask.bool()
    with renamed(_NAMES):
        settings = loss_config(loss_type, config, options)
        given = {"config": settings, "mask": mask, "old_logp": old_log_prob.detach()}
        out = token_losses(log_prob, advantages, **given)
    tokens = out.loss
    if rollout_is_weights is not None:
        # selected, since NaN times the 0 of a masked token would be NaN
        tokens = tokens * torch.where(mask, rollout_is_weights, 0.0)
    loss = agg_loss(tokens, response_mask, loss_agg_mode, **config.global_batch_info)
    clipped, capped = _clipped(settings, out, advantages, mask)
    kl = (old_log_prob - log_prob.detach()).clamp(-20.0, 20.0)
    means = [masked_mean(x.to(kl.dtype), response_mask) for x in (clipped, kl, capped)]
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    # one wait for the device
    return loss, dict(zip(names, torch.stack(means).tolist(), strict=True))


def _clipped(
    config: LossConfig, out: TokenLosses, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens that verl counts in pg_clipfrac and in pg_clipfrac_lower."""
    objective, (low, high) = config.preset.objective, config.ratio_bounds
    capped = mask & (out.ratio > config.ratio_cap)
    if objective == "cispo":
        return mask & ((out.ratio < low) | (out.ratio > high)), torch.zeros_like(mask)
    if objective.startswith("dppo"):
        outside = mask & (out.loss == 0) & (advantages != 0)
        return outside, capped & ~outside
    return out.clipped, capped & (advantages < 0)
