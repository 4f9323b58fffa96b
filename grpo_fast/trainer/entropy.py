"""The entropy bonus on one scale for every loss, and the coefficient that follows a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import LossConfig
from grpo_fast.presets import AGGREGATIONS

# weights that sum to 1 over an optimizer step, whatever the lengths
_MEANS = ("token_mean", "sequence_mean")


class EntropyBonus:
    """loss = policy loss - coefficient * H, with H a mean entropy in nats per token.

    `LossConfig.entropy_coef` has the weights of the loss, which sum to 1 where the loss is a mean
    over tokens or over completions. With dr_grpo they sum to the tokens over B *
    max_completion_length and with luspo to the mean length, so that the same coefficient would be
    0.01 times or hundreds of times as much. `coefficient_of_step` divides by that sum, and by
    `top_entropy_quantile`, the share of the tokens that has a bonus.

    Adaptive (Skywork Open Reasoner 1, 2025): after every optimizer step with entropy H over its
    tokens and all ranks, the coefficient grows by `delta` where H <= target and shrinks by it
    elsewhere, between `low` and `high`; the bonus of the next step is off where H > target, and in
    the first step.

    Args:
        args: with entropy_coef, use_adaptive_entropy, entropy_coef_min, _max, _delta and
            entropy_target.
    """

    def __init__(self, args: Any) -> None:
        self.initial = self.coefficient = float(args.entropy_coef)
        self.adaptive = args.use_adaptive_entropy
        self.bounds = args.entropy_coef_min, args.entropy_coef_max
        self.delta, self.target = args.entropy_coef_delta, args.entropy_target
        self.quantile = args.top_entropy_quantile
        self.reset()

    @property
    def on(self) -> bool:
        """Whether any step may have a bonus."""
        return self.adaptive or self.initial != 0.0

    def reset(self) -> None:
        """Back to the start of a run."""
        self.coefficient, self.last = self.initial, math.inf
        self._scale, self._sums = 1.0, None

    @property
    def applied(self) -> float:
        """The coefficient of this step's bonus, per nat of the mean entropy."""
        return 0.0 if self.adaptive and self.last > self.target else self.coefficient

    @property
    def coefficient_of_step(self) -> float:
        """`LossConfig.entropy_coef` of this step."""
        return self.applied * self._scale

    def begin(
        self,
        config: LossConfig,
        masks: Sequence[Tensor],
        denominators: Sequence[Tensor],
        accelerator: Any = None,
    ) -> None:
        """Learn the sum of the weights of an optimizer step; one wait for the device, where the
        loss is no mean.

        Args:
            masks: (N,) bool of each micro-batch of this rank.
            denominators: what each of them divides by.
            accelerator: averages over the ranks; None where a batch is this rank's alone.
        """
        if not self.on or not masks:
            return
        self._scale = 1.0 / self.quantile
        if config.weights in _MEANS:
            return
        assert AGGREGATIONS[config.weights] == "sequences"
        tokens = torch.stack([mask.sum() for mask in masks]).sum().float()
        # a rank's micro-batches share the denominator, and ranks are averaged
        total = tokens / denominators[0].to(tokens.device)
        total = (total if accelerator is None else accelerator.reduce(total, "mean")).item()
        length = config.max_completion_length if config.weights == "constant_length" else 1
        self._scale *= length / total if total > 0 else 1.0

    def add(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add the entropy of a micro-batch; nothing waits."""
        if not self.adaptive:
            return
        # MPS has nothing wider
        dtype = torch.float32 if loss.device.type == "mps" else torch.float64
        terms = (loss, metrics["entropy"], metrics["tokens"])
        loss, mean, tokens = (term.detach().to(dtype) for term in terms)
        total = torch.where(tokens > 0, mean * tokens, torch.zeros_like(mean))
        sums = torch.stack([loss, total, tokens])
        self._sums = sums if self._sums is None else self._sums + sums

    def end(self, accelerator: Any) -> float | None:
        """Move the coefficient after the gradients of an optimizer step are complete.

        Returns:
            the loss of the step without its bonus, None where the coefficient is fixed.
        """
        if not self.adaptive or self._sums is None:
            return None
        loss, total, tokens = accelerator.reduce(self._sums, "sum").tolist()
        self._sums = None
        entropy = total / max(tokens, 1.0)
        if not math.isfinite(entropy):
            return None
        policy_loss = loss / accelerator.num_processes + self.applied * entropy
        low, high = self.bounds
        step = self.delta if entropy <= self.target else -self.delta
        self.coefficient = min(max(self.coefficient + step, low), high)
        self.last = entropy
        return policy_loss

    def logs(self, logs: dict[str, float], prefix: str = "") -> dict[str, float]:
        """TRL's two keys: the loss without its bonus, and in training the coefficient."""
        loss, entropy = logs.get(f"{prefix}loss"), logs.get(f"{prefix}entropy")
        if not self.on or loss is None or entropy is None:
            return {}
        bonus = self.applied * entropy if not self.adaptive or prefix else None
        named = {} if bonus is None else {f"{prefix}policy_loss": loss + bonus}
        return named if prefix else {**named, "entropy_coef": self.coefficient}

    def state_dict(self) -> dict[str, Any]:
        """The coefficient and the entropy that it last saw."""
        last = None if math.isinf(self.last) else self.last
        return {"coefficient": self.coefficient, "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.coefficient = state["coefficient"]
        self.last = math.inf if state["last"] is None else state["last"]
