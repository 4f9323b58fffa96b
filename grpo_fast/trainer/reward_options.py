"""The fields of `GRPOConfig` about rewards, and what becomes of them: advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_fast.advantages.reward_weights import SCHEMES, check_weighting
from grpo_fast.advantages.table import ADVANTAGES, check_estimator
from grpo_fast.checks import fail
from grpo_fast.presets import PRESETS
from grpo_fast.rewards.checks import check_limit
from grpo_fast.rewards.combination import check_aggregation

from .kl import option as _option
from .loss_options import listed

_SCALES = {True: "group", False: "none", "True": "group", "False": "none"}
# (option, keyword of `reward_weights`)
_WEIGHTING = (
    ("reward_weight_scheme", "scheme"),
    ("reward_weight_temperature", "temperature"),
    ("reward_weight_keep", "keep"),
)


@dataclass
class RewardOptions:
    """Rewards, their limit, and the advantages that are made of them."""

    reward_weights: list[float] | None = _option(None, "One weight per reward; default: 1.0 each.")
    reward_timeout: float | None = _option(
        1800.0, "Seconds after which a reward function that has not returned is stopped."
    )
    multi_objective_aggregation: str = _option(
        "sum_then_normalize",
        "Sum the rewards and take the group's advantages, or 'normalize_then_sum': each reward "
        "within its group first (GDPO).",
    )
    scale_rewards: str | None = _option(
        None,
        "Divide the group's advantages by the std of the 'group' (True), of the 'batch', or 'none' "
        "(False); default: 'group', for gpg 'none'.",
    )
    advantage_estimator: str | None = _option(
        None, f"Advantages: {listed(ADVANTAGES)}; default: the loss type's own."
    )
    reward_weight_scheme: str = _option(
        "softmax", f"Weights of the completions for reward_weighted: {listed(SCHEMES)}."
    )
    reward_weight_temperature: float = _option(
        1.0, "Temperature of the scheme softmax, in units of the reward."
    )
    reward_weight_keep: int = _option(
        1, "Completions of each group that the scheme rejection keeps."
    )

    @property
    def estimator(self) -> tuple[str, dict[str, Any]]:
        """Key of `ADVANTAGES` and its keywords: what the trainer makes of the rewards."""
        name, scale = self.advantage_estimator, self.scale_rewards
        if name is None:
            name = PRESETS[self.loss_type].advantage
            # no paper of TRL's loss types changes TRL's default, and "given" names no estimator
            if name == "given" or self.loss_type == "dr_grpo":
                name = "group"
            if name in ("group", "centered") and scale is not None:
                name = "centered" if scale == "none" else "group"
        if name == "group":
            return name, {"scale": scale or "group"}
        if name == "reward_weights":
            return name, {keyword: getattr(self, option) for option, keyword in _WEIGHTING}
        return name, {}

    def check_rewards(self) -> None:
        """Refuse rewards' options that are unknown, and a moving reference where there is none."""
        check_limit("reward_timeout", self.reward_timeout)
        check_aggregation(self.multi_objective_aggregation)
        self.scale_rewards = _SCALES.get(self.scale_rewards, self.scale_rewards)
        if self.scale_rewards not in ("group", "batch", "none", None):
            fail("scale_rewards", "'group', 'batch' or 'none'", repr(self.scale_rewards))
        if self.sync_ref_model and not self.needs_reference:
            expected = "False with beta = 0, which has no reference"
            fail("sync_ref_model", expected, True, "set beta above 0.")

    def check_advantages(self) -> None:
        """Refuse estimators and weights that do not go together."""
        if self.advantage_estimator is not None:
            check_estimator(self.advantage_estimator, "advantage_estimator")
        name, _ = self.estimator
        source = "loss_type" if self.advantage_estimator is None else "advantage_estimator"
        chosen = f"{source} = {getattr(self, source)!r}"
        scales = ("group", "batch") if name == "group" else ("none",)
        if self.scale_rewards is not None and self.scale_rewards not in scales:
            expected = " or ".join(map(repr, (None, *scales)))
            expected = f"{expected} with the {name} advantages of {chosen}"
            fail("scale_rewards", expected, repr(self.scale_rewards))
        decoupled = self.multi_objective_aggregation == "normalize_then_sum"
        if decoupled and self.estimator != ("group", {"scale": "group"}):
            expected = "'sum_then_normalize' but for advantages of the group divided by its std"
            fail("multi_objective_aggregation", expected, f"'normalize_then_sum' with {name}")
        if name == "reward_weights":
            check_weighting(
                **{keyword: getattr(self, option) for option, keyword in _WEIGHTING},
                prefix="reward_weight_",
            )
            if self.reward_weight_keep > self.num_generations:
                expected = f"at most num_generations = {self.num_generations}"
                fail("reward_weight_keep", expected, self.reward_weight_keep)
            return
        for option, _ in _WEIGHTING:
            value, default = getattr(self, option), type(self).__dataclass_fields__[option].default
            if value != default:
                expected = f"{default!r} with the {name} advantages of {chosen}, without weights"
                hint = "set advantage_estimator='reward_weights' or leave it out."
                fail(option, expected, repr(value), hint)
