"""LossConfig owns every default of the loss and checks it once; PRESETS is the table of
variants."""

from __future__ import annotations

import difflib
import math
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One variant of the loss: which objective, who counts how much, and over what it is
    averaged."""

    objective: str
    """Name of the per-token function in `objectives.py`."""
    through_ratio: bool
    """True when the objective's derivative reaches the policy through the importance ratio."""
    weights: str
    """One of `weights.UNITS`: `sequence_mean`, `token_mean` or `constant_length`."""
    window: bool
    """True when the denominator spans the accumulation window and all ranks, not one
    micro-batch."""
    source: str
    """The paper the variant comes from (title, year), or who named it."""


_GRPO = "DeepSeekMath: Pushing the Limits of Mathematical Reasoning (2024)"
_DAPO = "DAPO: An Open-Source LLM Reinforcement Learning System at Scale (2025)"
_BNPO = "TRL's token mean over one micro-batch; not the Beta normalization of BNPO (2025)"
_DR_GRPO = "Understanding R1-Zero-Like Training: A Critical Perspective (2025)"
_CISPO = "MiniMax-M1: Scaling Test-Time Compute with Lightning Attention (2025)"

PRESETS: dict[str, Preset] = {
    "grpo": Preset("clip", True, "sequence_mean", True, _GRPO),
    "bnpo": Preset("clip", True, "token_mean", False, _BNPO),
    "dr_grpo": Preset("clip", True, "constant_length", True, _DR_GRPO),
    "dapo": Preset("clip", True, "token_mean", True, _DAPO),
    "cispo": Preset("cispo", False, "token_mean", True, _CISPO),
}
KL_ESTIMATORS = ("k1", "k2", "k3")
LEVELS = ("token", "sequence")


def nearest(name: object, known: tuple[str, ...] | list[str]) -> str:
    """A hint for an unknown name: the closest known one, then all of them."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}."


def _check_number(
    name: str, value: object, low: float, *, above: bool = False, none: bool = False
) -> None:
    if value is None and none:
        return
    bound = f"{'>' if above else '>='} {low:g}"
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or (above and value == low):
        raise ValueError(f"{name} must be a finite number {bound}, got {value!r}.")


@dataclass(frozen=True)
class LossConfig:
    """Every choice of the policy loss, under the names of TRL's `GRPOConfig`.

    With `r = exp(logp - old_logp)` (token level) or `r = exp(mean_t(logp - old_logp))` (sequence
    level), advantage `A`, and token weights `w` of the loss type:

        token_loss = -min(min(r, delta) * A, clamp(r, 1 - epsilon, 1 + epsilon_high) * A)
        token_loss = -stop_gradient(min(r, epsilon_high)) * A * logp          # cispo
        loss = sum(w * (token_loss + beta * [r *] kl(logp, ref_logp)))

    Raises:
        ValueError: for an unknown name (the nearest one is suggested) or a number out of range.
    """

    loss_type: str = "dapo"
    """Row of `PRESETS`."""
    importance_sampling_level: str = "token"
    """`token`, or `sequence`: one geometric-mean ratio per sequence (GSPO, 2025)."""
    epsilon: float = 0.2
    """Lower clip: the ratio is clamped to at least 1 - epsilon."""
    epsilon_high: float | None = None
    """Upper clip, 1 + epsilon_high; None means epsilon. For cispo it is the raw bound (e.g.
    5.0)."""
    delta: float | None = None
    """Two-sided clipping: cap of the unclipped ratio (INTELLECT-2, 2025); above 1 +
    epsilon_high."""
    beta: float = 0.0
    """Coefficient of the KL penalty against the reference policy."""
    kl_estimator: str = "k3"
    """k1: logp - ref; k2: (logp - ref)^2 / 2; k3: exp(ref - logp) - (ref - logp) - 1 (nats)."""
    use_bias_correction_kl: bool = True
    """Multiply the KL by the unclipped ratio, with its gradient (DeepSeek-V3.2, 2025)."""
    temperature: float = 1.0
    """Logits are divided by it, as the sampler did."""
    max_completion_length: int | None = None
    """Tokens; the constant length that dr_grpo divides by."""

    def __post_init__(self) -> None:
        if self.loss_type not in PRESETS:
            hint = nearest(self.loss_type, list(PRESETS))
            raise ValueError(
                f"loss_type: expected a known loss type, got {self.loss_type!r}; {hint}"
            )
        for name, known in (
            ("importance_sampling_level", LEVELS),
            ("kl_estimator", KL_ESTIMATORS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: got {value!r}; {nearest(value, known)}")
        _check_number("temperature", self.temperature, 0.0, above=True)
        _check_number("epsilon", self.epsilon, 0.0)
        _check_number("epsilon_high", self.epsilon_high, 0.0, none=True)
        _check_number("beta", self.beta, 0.0)
        if not isinstance(self.use_bias_correction_kl, bool):
            raise ValueError(
                f"use_bias_correction_kl must be a bool, got {self.use_bias_correction_kl!r}."
            )
        self._check_delta()
        self._check_length()
        if self.loss_type == "cispo" and self.epsilon_high is None:
            warnings.warn(
                f"loss_type='cispo' without epsilon_high bounds the ratio at {self.epsilon} "
                "(as in TRL), which scales every on-policy gradient by that number; set "
                "epsilon_high, e.g. 5.0.",
                stacklevel=3,
            )

    def _check_delta(self) -> None:
        if self.delta is None:
            return
        if self.loss_type == "cispo":
            raise ValueError("delta: cispo already bounds the ratio, expected None, got a number.")
        _check_number("delta", self.delta, self.ratio_bounds[1], above=True)

    def _check_length(self) -> None:
        length = self.max_completion_length
        if length is None and self.loss_type == "dr_grpo":
            raise ValueError(
                "max_completion_length: dr_grpo divides by it, expected tokens, got None."
            )
        if length is not None and (
            not isinstance(length, int) or isinstance(length, bool) or length < 1
        ):
            raise ValueError(f"max_completion_length must be an integer >= 1, got {length!r}.")

    @property
    def preset(self) -> Preset:
        """The row of `PRESETS` this configuration names."""
        return PRESETS[self.loss_type]

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Lowest and highest ratio that still carries a gradient in the direction it pushes."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.preset.objective == "cispo":
            return 0.0, float(high)
        return 1.0 - self.epsilon, 1.0 + high

    @property
    def ratio_cap(self) -> float:
        """`delta`, or infinity."""
        return math.inf if self.delta is None else float(self.delta)
