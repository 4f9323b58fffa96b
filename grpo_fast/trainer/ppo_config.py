"""PPOConfig: `GRPOConfig` with a critic in the place of the group."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from grpo_fast.advantages import KL_IN_REWARD
from grpo_fast.checks import fail, is_number, nearest
from grpo_fast.config import LossConfig
from grpo_fast.models.critic import CRITICS, is_saved_critic
from grpo_fast.objective.value import VALUE_LOSSES, check_value_loss

from .config import GRPOConfig
from .kl import option as _option

# above every ratio that there is: the log of one is bounded by 20 nats
_UNBOUNDED = 1e9
# options of GRPOConfig that make advantages of a group
_OF_GROUPS = (
    "advantage_estimator",
    "scale_rewards",
    "multi_objective_aggregation",
    "reward_weight_scheme",
    "reward_weight_temperature",
    "reward_weight_keep",
)


@dataclass
class PPOConfig(GRPOConfig):
    """Arguments of `PPOTrainer`.

    Those of `GRPOConfig`, but for the options that make advantages of a group, which are refused.
    `loss_type="dapo"`, the default, is the clip of PPO with a mean over tokens; `"ppo"` adds the
    dual clip. Defaults that differ: num_generations 1, num_iterations 4.

    Raises:
        ValueError: for any value out of range or without use, before anything is loaded.
    """

    fewest_generations: ClassVar[int] = 1

    num_generations: int = _option(1, "Completions per prompt. At least 1.")
    num_iterations: int = _option(4, "How often each window of completions is used: the epochs.")
    reshuffle: bool = _option(
        True, "Deal the completions of a window onto other micro-batches in each of its epochs."
    )
    penalty_coef: float = _option(
        0.0, "KL to the old policy in the loss, in the place of the clip; kl_controller moves it."
    )

    # advantages
    gamma: float = _option(1.0, "Discount of a token; 0.99 is a horizon of 100 tokens.")
    lam: float = _option(0.95, "Lambda of the advantages: 1 is the return, 0 the TD error.")
    lam_length_alpha: float | None = _option(
        None, "Lambda 1 - 1 / (alpha * length) of each completion in the place of lam (VAPO: 0.05)."
    )
    value_lam: float | None = _option(
        None, "Lambda of the value targets; default: that of the advantages (VAPO: 1)."
    )
    whiten_advantages: bool = _option(
        True, "Advantages of mean 0 and variance 1 over the window and all ranks."
    )

    # rewards of tokens
    kl_coef: float = _option(
        0.05, "KL to the reference in the reward of each token, per nat; beta is that in the loss."
    )
    kl_reward_estimator: str = _option(
        "k1", f"KL in the reward: {', '.join(KL_IN_REWARD)}; k1 may be negative at a token."
    )
    missing_eos_penalty: float | None = _option(
        None, "Taken from the reward of a completion that was cut at max_completion_length."
    )

    # critic
    critic: str = _option(
        "shared", "A value head on the policy's hidden states, or a 'separate' backbone."
    )
    value_detach: bool = _option(
        False, "shared: keep the gradient of the values out of the policy's backbone."
    )
    critic_model: str | None = _option(
        None,
        "The critic/ folder of a run, to start from. separate: also a checkpoint, of a reward "
        "model too; default: a copy of the policy.",
    )
    value_loss: str = _option("mse", f"One of {', '.join(VALUE_LOSSES)}; the half is in both.")
    cliprange_value: float | None = _option(
        0.2, "How far a value may move in a window, in units of the reward; None: no clip."
    )
    huber_delta: float = _option(1.0, "huber: error above which it is linear, as the reward.")
    vf_coef: float = _option(0.5, "Coefficient of the value loss, in which the half is.")
    value_warmup_steps: int = _option(0, "First optimizer steps, in which the critic alone learns.")
    value_learning_rate: float | None = _option(
        None, "Peak learning rate of the critic; default: learning_rate."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_groups()
        self._check_loss_type()
        self._check_penalty()
        self._check_returns()
        self._check_critic()

    @property
    def kl_coefficient(self) -> tuple[str, float]:
        """Name and value of the option that the controller starts from."""
        name = "penalty_coef" if self._penalised else "kl_coef"
        return name, getattr(self, name)

    @property
    def _penalised(self) -> bool:
        # checked later than it is asked for
        return is_number(self.penalty_coef) and 0 < self.penalty_coef < math.inf

    @property
    def needs_reference(self) -> bool:
        """Whether there is a reference policy."""
        return super().needs_reference or self.kl_coef > 0

    @property
    def deals(self) -> bool:
        """Whether the completions of a window are dealt anew in its epochs."""
        return self.reshuffle and self.num_iterations > 1 and self.steps_per_generation > 1

    def loss_config(self) -> LossConfig:
        """The loss of the policy; with a penalty, its KL term is that, and its clip binds never."""
        config = super().loss_config()
        if not self._penalised:
            return config
        return replace(config, beta=self.penalty_coef, epsilon=1.0, epsilon_high=_UNBOUNDED)

    def _number(self, name: str, low: float, high: float = math.inf, zero: bool = True) -> None:
        value = getattr(self, name)
        inside = is_number(value) and low <= value <= high and abs(value) < math.inf
        if not inside or (value == 0 and not zero):
            bounds = f"{'[' if zero else '('}{low:g}, {high:g}{')' if high == math.inf else ']'}"
            fail(name, f"a finite number in {bounds}", repr(value))

    def _unused(self, name: str, reason: str) -> None:
        default = type(self).__dataclass_fields__[name].default
        if getattr(self, name) != default:
            fail(name, f"{default!r} {reason}", repr(getattr(self, name)))

    def _check_groups(self) -> None:
        for name in _OF_GROUPS:
            self._unused(name, "with PPO, whose advantages come from its critic")
        self._unused("kl_in_reward", "with PPO, where kl_coef is that of the reward")
        reason = "with PPO, whose advantages are those of tokens"
        self._unused("off_policy_mask_threshold", reason)

    def _check_loss_type(self) -> None:
        config = self.loss_config()
        if not config.preset.levels:
            expected = "a loss with a ratio to the old policy, such as 'dapo' or 'ppo'"
            fail("loss_type", expected, repr(self.loss_type))
        if config.level != "token":
            name = (
                "loss_type"
                if self.importance_sampling_level is None
                else ("importance_sampling_level")
            )
            expected = "the ratio of a token with PPO, whose advantages are those of tokens"
            fail(name, expected, f"{getattr(self, name)!r} ({config.level})")

    def _check_penalty(self) -> None:
        self._number("penalty_coef", 0)
        if not isinstance(self.reshuffle, bool):
            fail("reshuffle", "a bool", repr(self.reshuffle))
        if not self._penalised:
            return
        reason = "with penalty_coef, which takes the place of the clip"
        for name in ("epsilon", "epsilon_high", "delta"):
            self._unused(name, reason)
        preset = self.loss_config().preset
        if preset.objective != "clip" or preset.cap < math.inf:
            fail("loss_type", f"'dapo' or another clip of the ratio alone {reason}", self.loss_type)
        self._unused("beta", "with penalty_coef, since the loss has one KL term; see kl_coef")
        self._unused("ratio_to", "with penalty_coef, whose KL is to the old policy")
        if self.target_kl is not None:
            self._unused("target_kl_to", "with penalty_coef, whose loss has no KL to the reference")
        steps = self.gradient_accumulation_steps
        if self.on_policy or self.window_uses % steps:
            expected = (
                "0 where an optimizer step does not end within a window: the window serves "
                f"{self.window_uses} micro-steps and a step takes {steps}"
            )
            fail("penalty_coef", expected, repr(self.penalty_coef))

    def _check_returns(self) -> None:
        for name in ("gamma", "lam"):
            self._number(name, 0, 1)
        if self.value_lam is not None:
            self._number("value_lam", 0, 1)
        if self.lam_length_alpha is not None:
            self._number("lam_length_alpha", 0, zero=False)
            self._unused("lam", "with lam_length_alpha, which takes its place")
        self._number("kl_coef", 0)
        if self.kl_reward_estimator not in KL_IN_REWARD:
            hint = nearest(self.kl_reward_estimator, KL_IN_REWARD)
            fail("kl_reward_estimator", "a known estimator", repr(self.kl_reward_estimator), hint)
        if self.kl_coef == 0:
            self._unused("kl_reward_estimator", "with kl_coef 0")
        if self.missing_eos_penalty is not None:
            self._number("missing_eos_penalty", 0, zero=False)

    def _check_critic(self) -> None:
        if self.critic not in CRITICS:
            fail("critic", "a known kind", repr(self.critic), nearest(self.critic, CRITICS))
        if self.critic == "shared":
            if self.critic_model is not None and not is_saved_critic(self.critic_model):
                expected = "None, or the folder of a saved critic, with critic='shared'"
                fail("critic_model", expected, repr(self.critic_model))
        else:
            self._unused("value_detach", "with critic='separate'")
        names = ("value_loss", "cliprange_value", "huber_delta")
        check_value_loss(*(getattr(self, n) for n in names), names=names)
        if self.value_loss != "huber":
            self._unused("huber_delta", f"with value_loss={self.value_loss!r}")
        self._number("vf_coef", 0, zero=False)
        steps = self.value_warmup_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            fail("value_warmup_steps", "an integer >= 0", repr(steps))
        if steps and self.fp16:
            # its gradient scaler asks every group for a gradient in every step
            fail("value_warmup_steps", "0 with fp16", repr(steps), "use bf16")
        if self.value_learning_rate is not None:
            self._number("value_learning_rate", 0, zero=False)
