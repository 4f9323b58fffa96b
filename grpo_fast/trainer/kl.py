"""KL that is controlled and stopped: coefficients that follow a target, and a stop of a window.

Two targets, two units. A controller's `kl_target` is in nats per completion, the KL summed over its
tokens, as in Fine-Tuning Language Models from Human Preferences (2019). `target_kl` of the stop is
in nats per token, as in the implementations that stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_fast.checks import fail, is_number, nearest


class KLController(Protocol):
    """A coefficient that is told the KL of each window."""

    coefficient: float

    def update(self, kl: float, completions: int) -> None:
        """Learn of the KL of a window, nats per completion, and of how many it was taken."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class FixedKL:
    """The coefficient that was given, whatever the KL is."""

    # every rank has the same: it follows sums of all
    def __init__(self, coefficient: float) -> None:
        self.initial = self.coefficient = coefficient

    def update(self, kl: float, completions: int) -> None:
        """Nothing to learn."""

    def reset(self) -> None:
        """Back to the start of a run."""
        self.coefficient = self.initial

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.coefficient = state["coefficient"]


class ZieglerKL(FixedKL):
    """coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) * completions / horizon.

    Source: Fine-Tuning Language Models from Human Preferences (2019).

    Args:
        coefficient: where it starts.
        target: nats per completion.
        horizon: completions after which a KL of 1.2 targets or more has multiplied it by about e^.2
    """

    def __init__(self, coefficient: float, target: float, horizon: float = 10000) -> None:
        super().__init__(coefficient)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, completions: int) -> None:
        """Learn of the KL of a window; one that is no number changes nothing."""
        if math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * completions / self.horizon


class DoublingKL(FixedKL):
    """coefficient * 2 above 1.5 targets, / 2 below target / 1.5.

    Source: Proximal Policy Optimization Algorithms (2017), its adaptive KL penalty.

    Args:
        coefficient: where it starts.
        target: nats per completion.
    """

    def __init__(self, coefficient: float, target: float) -> None:
        super().__init__(coefficient)
        self.target = target

    def update(self, kl: float, completions: int) -> None:
        """Learn of the KL of a window; one that is no number changes nothing."""
        if kl > 1.5 * self.target:
            self.coefficient *= 2
        elif kl < self.target / 1.5:
            self.coefficient /= 2


CONTROLLERS = ("fixed", "ziegler", "doubling")


def check_controller(
    kind: str, target: float | None, horizon: float | None, coefficient: str, value: float
) -> None:
    """Refuse options of a controller that it cannot honour or has no use for.

    Args:
        kind: one of `CONTROLLERS`; option `kl_controller`.
        target: option `kl_target`, nats per completion.
        horizon: option `kl_horizon`, completions.
        coefficient: name of the option that the controller starts from.
        value: its value.

    Raises:
        ValueError: naming the option.
    """
    if kind not in CONTROLLERS:
        fail("kl_controller", "a known controller", repr(kind), nearest(kind, CONTROLLERS))
    if kind == "fixed" and target is not None:
        fail("kl_target", "None with kl_controller='fixed'", repr(target))
    if kind != "ziegler" and horizon is not None:
        fail("kl_horizon", f"None with kl_controller={kind!r}", repr(horizon))
    if kind == "fixed":
        return
    for name, number in (("kl_target", target), ("kl_horizon", horizon)):
        absent = name == "kl_horizon" and number is None
        if not absent and not (is_number(number) and 0 < number < math.inf):
            fail(name, f"a finite number > 0 with kl_controller={kind!r}", repr(number))
    if value <= 0:
        fail("kl_controller", f"'fixed' where {coefficient} is 0", repr(kind))


def make_controller(
    kind: str, coefficient: float, target: float | None, horizon: float | None
) -> KLController:
    """The controller that `check_controller` has let pass; a horizon of None is 10,000."""
    if kind == "ziegler":
        return ZieglerKL(coefficient, target, 10000 if horizon is None else horizon)
    return FixedKL(coefficient) if kind == "fixed" else DoublingKL(coefficient, target)


class KLStop:
    """Says when the policy has left its window's by too much, and how long that holds.

    The mean of k3 over the tokens of an optimizer step is asked for before the step is taken. Above
    1.5 * target that step is dropped, and with it all further uses of the window: they become
    empty steps, in which no weight moves and every counter goes on.
    Source: the early stop of Stable-Baselines3 (2021); Approximating KL Divergence (2020).

    Args:
        target: nats per token.
    """

    factor = 1.5

    def __init__(self, target: float) -> None:
        self.target = target
        self.reset()

    def reset(self) -> None:
        """Back to the start of a run."""
        self.stopped, self.skipped = False, 0

    def new_window(self) -> None:
        """A fresh window is its own old policy."""
        self.stopped = False

    def judge(self, kl: float) -> bool:
        """Whether the coming optimizer step is to be dropped; NaN drops none."""
        self.stopped = self.stopped or kl > self.factor * self.target
        self.skipped += self.stopped
        return self.stopped

    def state_dict(self) -> dict[str, Any]:
        """Whether the window was stopped, and the steps dropped so far."""
        return {"stopped": self.stopped, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.stopped, self.skipped = state["stopped"], state["skipped"]


POLICIES = ("old", "reference")


def option(default: object, text: str) -> Any:
    """A field of a config with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class KLOptions:
    """The options of this file, for a config that inherits them."""

    kl_controller: str = option(
        "fixed",
        f"How beta (of PPO kl_coef) follows kl_target: {', '.join(CONTROLLERS)}.",
    )
    kl_target: float | None = option(
        None, "KL that the controller aims at, in nats per completion (summed over its tokens)."
    )
    kl_horizon: float | None = option(
        None, "ziegler: completions in which the coefficient may change by a fifth; default: 10000."
    )
    target_kl: float | None = option(
        None,
        "Drop the optimizer steps that are left of a window once the KL of one is above 1.5 times "
        "this, in nats per token.",
    )
    target_kl_to: str = option(
        "old", "What target_kl is against: the 'old' policy that sampled, or the 'reference'."
    )
    ratio_to: str = option(
        "old", "Policy below the importance ratio: the 'old' one that sampled, or the 'reference'."
    )
    kl_in_reward: bool = option(
        False,
        "beta takes the KL of each completion from its reward, in the place of that in the loss.",
    )
    log_kl: bool = option(
        False,
        "Log the KL to the reference, at beta 0 too, and the approximate one to the old policy.",
    )

    @property
    def kl_coefficient(self) -> tuple[str, float]:
        """Name and value of the option that the controller starts from."""
        return "beta", self.beta

    @property
    def needs_reference(self) -> bool:
        """Whether there is a reference policy."""
        return self.beta > 0 or self.ratio_to == "reference" or self.log_kl

    @property
    def logs_approx_kl(self) -> bool:
        """Whether the approximate KL to the old policy is measured."""
        return self.target_kl is not None or self.log_kl

    @property
    def measures_old(self) -> bool:
        """Whether a window needs the log-probs of the policy that sampled it."""
        used = not self.on_policy and (self.ratio_to == "old" or self.logs_approx_kl)
        return used or self.kl_in_reward

    def _check_ratio(self) -> None:
        if self.ratio_to == "old":
            return
        if not self.loss_config().preset.levels:
            expected = f"'old' with {self.loss_type}, which has no ratio"
            fail("ratio_to", expected, repr(self.ratio_to))
        if self.off_policy_mask_threshold is not None:
            expected = "None with ratio_to='reference', from which every policy moves away"
            fail("off_policy_mask_threshold", expected, repr(self.off_policy_mask_threshold))

    def _check_kl_in_reward(self) -> None:
        if not isinstance(self.kl_in_reward, bool):
            fail("kl_in_reward", "a bool", repr(self.kl_in_reward))
        if not self.kl_in_reward:
            return
        if self.beta == 0:
            fail("kl_in_reward", "False with beta = 0, which is its coefficient", True)
        if self.multi_objective_aggregation == "normalize_then_sum":
            expected = "False with normalize_then_sum, which has no reward of a completion"
            fail("kl_in_reward", expected, True)
        for name in ("kl_estimator", "kl_gradient", "use_bias_correction_kl"):
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                expected = f"{default!r} with kl_in_reward, since the loss has no KL"
                fail(name, expected, repr(getattr(self, name)))

    def check_kl(self) -> None:
        """Refuse what cannot be honoured, once the sizes of the window are known.

        Raises:
            ValueError: naming the option.
        """
        options = (self.kl_controller, self.kl_target, self.kl_horizon)
        check_controller(*options, *self.kl_coefficient)
        for name in ("target_kl_to", "ratio_to"):
            value = getattr(self, name)
            if value not in POLICIES:
                fail(name, "a known policy", repr(value), nearest(value, POLICIES))
        self._check_ratio()
        self._check_kl_in_reward()
        if self.target_kl is None:
            if self.target_kl_to != "old":
                fail("target_kl_to", "'old' without target_kl", repr(self.target_kl_to))
            return
        if not is_number(self.target_kl) or not 0 < self.target_kl < math.inf:
            fail("target_kl", "None or a finite number > 0", repr(self.target_kl))
        if self.target_kl_to == "reference" and not self.needs_reference:
            fail("target_kl_to", "'old' without a reference policy", repr(self.target_kl_to))
        steps = self.gradient_accumulation_steps
        if self.on_policy or self.window_uses % steps:
            expected = (
                "None where an optimizer step does not end within a window: the window serves "
                f"{self.window_uses} micro-steps and a step takes {steps}"
            )
            fail("target_kl", expected, repr(self.target_kl))
        if self.fp16:
            # its gradient scaler asks for a gradient in every step
            fail("target_kl", "None with fp16", repr(self.target_kl), "use bf16")


def approximate_kl(logp: Tensor, old_logp: Tensor | None, mask: Tensor | None) -> Tensor:
    """Mean over the kept tokens of k3 = r - 1 - log r, the KL of the old policy to the new one.

    Source: Approximating KL Divergence (Schulman, 2020).

    Args:
        logp: (N,) of the policy now, nats, without gradient.
        old_logp: (N,); None: the policy is its own old policy.
        mask: (N,) bool; None: all.

    Returns:
        0-d, nats per token; 0 without a kept token.
    """
    if old_logp is None:
        return logp.new_zeros(())
    gap = logp - old_logp
    kl = torch.expm1(gap) - gap
    if mask is None:
        return kl.sum() / max(kl.numel(), 1)
    return torch.where(mask, kl, torch.zeros_like(kl)).sum() / mask.sum().clamp(min=1)


class StepKL:
    """KL of the coming optimizer step, summed on the device from its micro-batches."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, metrics: dict[str, Tensor], completions: int) -> None:
        """Add a micro-batch: the loss's means over its tokens, and its completions."""
        tokens = metrics["tokens"].float()
        zero = torch.zeros_like(tokens)
        means = [metrics.get(name, zero).float() for name in ("approx_kl", "kl")]
        # a mean over no tokens is no number that could be multiplied away
        totals = [torch.where(tokens > 0, mean * tokens, zero) for mean in means]
        row = torch.stack((*totals, tokens, torch.full_like(tokens, completions)))
        self.sums = row if self.sums is None else self.sums + row

    def take(self, accelerator: Any) -> dict[str, float] | None:
        """Sums over all ranks: `old` and `reference` in nats, `tokens` and `completions`; None when
        nothing was added. Waits for the device; every rank calls it."""
        if self.sums is None:
            return None
        sums, self.sums = accelerator.reduce(self.sums, "sum"), None
        return dict(zip(("old", "reference", "tokens", "completions"), sums.tolist(), strict=True))
