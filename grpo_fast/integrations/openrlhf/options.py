"""OpenRLHF's options of the policy loss as a `LossConfig`, or by name what cannot be honoured."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields
from typing import Any

from openrlhf.models.loss import PolicyLoss

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.integrations.names import renamed
from grpo_fast.presets import OBJECTIVES, PRESETS

# fields of LossConfig for which OpenRLHF has an option, a term or an argument of its own
OWN = {
    "beta": "--algo.kl.use_loss and --algo.kl.init_coef",
    "kl_estimator": "--algo.kl.estimator",
    "kl_gradient": "--algo.kl.unbiased_gradient",
    "use_bias_correction_kl": "--algo.kl.unbiased_gradient",
    "entropy_coef": "--actor.entropy_coef",
    "temperature": "--rollout.temperature",
    "rollout_correction": "--algo.advantage.is_correction_level and _mode",
    "rollout_ratio_min": "--algo.advantage.is_correction_threshold",
    "rollout_ratio_max": "--algo.advantage.is_correction_threshold",
}
_NAMES = {"epsilon": "clip_eps_low", "epsilon_high": "clip_eps_high", "delta": "dual_clip"}
_RATIO = {"rollout_ratio_min": "is_correction_threshold"}
_RATIO |= {"rollout_ratio_max": "is_correction_threshold"}
_DEFAULTS = {name: p.default for name, p in inspect.signature(PolicyLoss).parameters.items()}


def loss_config(theirs: PolicyLoss, loss_type: str, **options: Any) -> LossConfig:
    """The `LossConfig` of a constructed PolicyLoss and the options of `install`.

    Raises:
        ValueError: an option, or a combination of options, that cannot be honoured.
    """
    given = dict(options)
    # what stands in both places must not be chosen between
    for ours, name in _NAMES.items():
        value = getattr(theirs, name)
        if ours not in given:
            given[ours] = value
        elif value not in (_DEFAULTS[name], given[ours]):
            fail(name, f"its default or install's {ours}={given[ours]}", value)
    # the message is to name what the user wrote
    names = {ours: name for ours, name in _NAMES.items() if ours not in options} | _RATIO
    _clips(theirs, loss_type, given, options)
    given["aggregation"] = _aggregation(theirs, loss_type, options)
    given |= _correction(theirs, loss_type)
    with renamed(names):
        return LossConfig(loss_type=loss_type, **given)


def check_options(loss_type: str, options: dict[str, Any]) -> None:
    """What is wrong in the options of `install` whatever OpenRLHF is started with.

    Raises:
        ValueError: a field that is unknown, out of range, or OpenRLHF's own; it is named.
    """
    for name, flag in OWN.items():
        if name in options:
            fail(name, f"OpenRLHF's own option ({flag})", options[name])
    if "top_entropy_quantile" in options:
        value = options["top_entropy_quantile"]
        fail("top_entropy_quantile", "its default: the loss is given no entropies", value)
    names = {f.name for f in fields(LossConfig)} - {*OWN, "loss_type", "top_entropy_quantile"}
    for name in options:
        if name not in names:
            fail(name, f"one of {', '.join(sorted(names))}", options[name])
    if loss_type == "reward_weighted":
        fail("loss_type", "one whose advantages OpenRLHF makes (reinforce is the loss)", loss_type)
    with warnings.catch_warnings():
        # cispo's, about a bound that OpenRLHF may still give
        warnings.simplefilter("ignore")
        LossConfig(loss_type=loss_type, **options)


def _clips(
    theirs: PolicyLoss, loss_type: str, given: dict[str, Any], options: dict[str, Any]
) -> None:
    preset = PRESETS[loss_type]
    bounds = {"ratio_high", "upper_epsilon"} & set(OBJECTIVES[preset.objective].parameters)
    clips = bool(bounds) or "sequence_clipped" in preset.levels
    for ours in ("epsilon", "epsilon_high"):
        used = clips and not (loss_type == "cispo" and ours == "epsilon")
        if not used and given[ours] != _DEFAULTS[_NAMES[ours]]:
            name = ours if ours in options else _NAMES[ours]
            fail(name, f"its default: {loss_type} has no such bound", given[ours])
    untold = given["epsilon_high"] in (None, _DEFAULTS["clip_eps_high"])
    if loss_type == "cispo" and untold and options.get("epsilon_high") is None:
        expected = "the highest ratio itself for cispo, as install(epsilon_high=5.0)"
        fail("clip_eps_high", expected, given["epsilon_high"])
    if loss_type == "ppo" and given["delta"] is None:
        fail("dual_clip", "a number for ppo, as 3.0 (dapo is the same objective without)", None)
    if theirs.policy_loss_type not in ("ppo", loss_type):
        expected = f"its default beside loss_type={loss_type!r}"
        fail("policy_loss_type", expected, repr(theirs.policy_loss_type))


def _aggregation(theirs: PolicyLoss, loss_type: str, options: dict[str, Any]) -> str:
    """The preset's own way to average, unless install or `--actor.loss_agg_mode` says another."""
    scheme = options.get("aggregation") or PRESETS[loss_type].weights
    if theirs.token_level_loss or scheme == "sequence_mean":
        return scheme
    if options.get("aggregation") or scheme != "token_mean":
        expected = f"True (token-mean) with aggregation={scheme!r} of {loss_type}"
        fail("token_level_loss", expected, False)
    return "sequence_mean"


def _correction(theirs: PolicyLoss, loss_type: str) -> dict[str, Any]:
    """`is_correction_*` as rollout correction."""
    if theirs.is_correction_level == "off":
        return {}
    if loss_type in ("gspo", "vespo"):
        reason = {"gspo": "OpenRLHF's gspo takes the ratio to the rollout instead"}
        reason["vespo"] = "the weight of a sequence is not that of its tokens"
        expected = f"off with {loss_type}, since {reason[loss_type]}"
        fail("is_correction_level", expected, repr(theirs.is_correction_level))
    if theirs.is_correction_level != "token":
        expected = "off or token: a sequence is weighted by its own ratio here, not by its tokens'"
        fail("is_correction_level", expected, repr(theirs.is_correction_level))
    if theirs.is_correction_gating != "ratio":
        fail("is_correction_gating", "ratio", repr(theirs.is_correction_gating))
    low, high = theirs.is_correction_threshold
    mode = "truncate" if theirs.is_correction_mode == "clip" else "mask"
    return {
        "rollout_correction": f"token_{mode}",
        "rollout_ratio_min": low,
        "rollout_ratio_max": high,
    }
