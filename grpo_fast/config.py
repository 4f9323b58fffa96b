"""LossConfig: every choice of a loss, its default, checked once."""

from __future__ import annotations

import functools
import json
import math
import warnings
from dataclasses import asdict, dataclass, fields

from grpo_fast.checks import fail, nearest
from grpo_fast.presets import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    LEVELS,
    OBJECTIVES,
    OWNED,
    PRESETS,
    ROLLOUT_CORRECTIONS,
    Objective,
    Preset,
)


def _check_number(
    name: str, value: object, low: float, *, above: bool = False, none: bool = False
) -> None:
    if value is None and none:
        return
    bound = f"{'>' if above else '>='} {low:g}"
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or (above and value == low):
        fail(name, f"a finite number {bound}", repr(value))


# fields that are numbers of at least 0: whether above 0, whether None is allowed
_NUMBERS = (
    ("temperature", True, False),
    ("epsilon", False, False),
    ("epsilon_high", False, True),
    ("beta", False, False),
    ("entropy_coef", False, False),
    ("top_entropy_quantile", True, False),
    ("rollout_ratio_min", False, True),
    ("rollout_ratio_max", True, True),
    ("off_policy_mask_threshold", False, True),
    ("cispo_ratio_min", False, False),
    ("sapo_temperature_pos", True, False),
    ("sapo_temperature_neg", True, False),
    ("vespo_k_pos", False, False),
    ("vespo_lambda_pos", True, False),
    ("vespo_k_neg", False, False),
    ("vespo_lambda_neg", True, False),
)


@dataclass(frozen=True)
class LossConfig:
    """Every choice of the policy loss, under the names of TRL's `GRPOConfig`.

    With the ratio r at its level (token: exp(logp - old_logp)), advantages A, and token weights w:

        token_loss = -min(min(r, delta) A, clamp(r, 1 - epsilon, 1 + epsilon_high) A)
        token_loss = -stop_gradient(clamp(r, cispo_ratio_min, epsilon_high)) A logp    # cispo
        token_loss = ...                                  # the others: see `objectives.py`
        A = A * c * keep          # rollout correction, off-policy mask, top-entropy set; see below
        loss = sum(w * (token_loss + beta [r] kl(logp, ref_logp) - entropy_coef * entropy))

    Raises:
        ArgumentError: an unknown name (the nearest one is suggested), a number out of range, or an
            option that the loss type has no use for.
    """

    loss_type: str = "dapo"
    """Row of `PRESETS`."""
    importance_sampling_level: str | None = None
    """Level of the ratio, None for the loss type's own (mostly `token`). `sequence`: one geometric
    mean per sequence (GSPO, 2025); `sequence_token`: its value with each token's own gradient
    (GSPO-token)."""
    aggregation: str | None = None
    """How token losses are averaged, a key of `AGGREGATIONS`; None for the loss type's own."""
    epsilon: float = 0.2
    """Lower clip: the ratio is clamped to at least 1 - epsilon. gmpo: lower clip of the log-ratio,
    in nats (its paper takes 0.4); dppo: bound on the divergence of a token of A < 0."""
    epsilon_high: float | None = None
    """Upper clip, 1 + epsilon_high; None means epsilon. For cispo it is the raw bound (e.g. 5.0),
    for gmpo and dppo the counterpart of epsilon."""
    delta: float | None = None
    """Cap of the unclipped ratio, above 1 + epsilon_high: two-sided clipping (INTELLECT-2, 2025),
    which is PPO's dual clip. None: no cap, but 3 for ppo (or 1 + epsilon_high, if that is more) and
    20 for dppo."""
    beta: float = 0.0
    """Coefficient of the KL penalty against the reference policy."""
    kl_estimator: str = "k3"
    """k1: logp - ref; k2: (logp - ref)^2 / 2; k3: exp(ref - logp) - (ref - logp) - 1; absolute:
    |logp - ref| (nats)."""
    kl_gradient: str | None = None
    """Straight-through: the estimator whose gradient stands for that of kl_estimator; with `k2` the
    gradient is that of the KL itself. None: its own."""
    use_bias_correction_kl: bool = True
    """Multiply the KL by the unclipped ratio, with its gradient (DeepSeek-V3.2, 2025)."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus (nats), averaged with the weights of the loss."""
    top_entropy_quantile: float = 1.0
    """Share of the tokens, those of highest entropy, that keep their objective and entropy bonus
    (Beyond the 80/20 Rule, 2025). 1.0: all."""
    rollout_correction: str = "sequence_mask"
    """What to do with p(old) / p(rollout) when rollout_logp is given: multiply the objective by it,
    per token, per sequence (the product) or by the geometric mean of a sequence; bounded
    (`truncate`: Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025) or 0
    outside its bounds (`mask`: IcePop, 2025)."""
    rollout_ratio_min: float | None = None
    """Lower bound of that ratio."""
    rollout_ratio_max: float | None = 3.0
    """Upper bound of that ratio."""
    off_policy_mask_threshold: float | None = None
    """Nats: a sequence of A < 0 whose mean log p(rollout, else old) / p is above it keeps no
    objective (DeepSeek-V3.2, 2025)."""
    cispo_ratio_min: float = 0.0
    """cispo's lower bound of the ratio, as epsilon_high is the upper one. 0: none."""
    sapo_temperature_pos: float = 1.0
    """sapo's tau where A > 0."""
    sapo_temperature_neg: float = 1.05
    """sapo's tau where A <= 0."""
    vespo_k_pos: float = 2.0
    """vespo's exponent of w where A >= 0."""
    vespo_lambda_pos: float = 3.0
    """vespo's decay in w where A >= 0."""
    vespo_k_neg: float = 3.0
    """vespo's exponent of w where A < 0."""
    vespo_lambda_neg: float = 2.0
    """vespo's decay in w where A < 0."""
    temperature: float = 1.0
    """Logits are divided by it, as the sampler did."""
    max_completion_length: int | None = None
    """Tokens; the constant length that dr_grpo divides by."""

    def __post_init__(self) -> None:
        # under torch.compile one string of all fields is one guard, and no guard on each of them
        object.__setattr__(self, "text", json.dumps(asdict(self)))
        self._check_names()
        for name, above, none in _NUMBERS:
            _check_number(name, getattr(self, name), 0.0, above=above, none=none)
        if not isinstance(self.use_bias_correction_kl, bool):
            fail("use_bias_correction_kl", "a bool", repr(self.use_bias_correction_kl))
        if self.top_entropy_quantile > 1.0:
            fail("top_entropy_quantile", "a share in (0, 1]", repr(self.top_entropy_quantile))
        low, high = self.rollout_ratio_min, self.rollout_ratio_max
        if low is not None and high is not None and low > high:
            fail("rollout_ratio_min", f"at most rollout_ratio_max = {high:g}", f"{low:g}")
        low, high = self.ratio_bounds
        if low > high:
            fail(self.objective.bounds[0], f"at most epsilon_high = {high:g}", f"{low:g}")
        self._check_delta()
        self._check_owned()
        self._check_length()
        if self.objective.raw_bound and self.epsilon_high is None:
            warnings.warn(
                f"loss_type={self.loss_type!r} without epsilon_high bounds the ratio at "
                f"{self.epsilon} (as in TRL), which scales every on-policy gradient by that "
                "number; set epsilon_high, e.g. 5.0.",
                stacklevel=3,
            )

    def _check_names(self) -> None:
        if self.loss_type not in PRESETS:
            hint = nearest(self.loss_type, list(PRESETS))
            fail("loss_type", "a known loss type", repr(self.loss_type), hint)
        for name, known in (
            ("importance_sampling_level", tuple(LEVELS)),
            ("aggregation", tuple(AGGREGATIONS)),
            ("kl_estimator", KL_ESTIMATORS),
            ("kl_gradient", KL_ESTIMATORS),
            ("rollout_correction", ROLLOUT_CORRECTIONS),
        ):
            value = getattr(self, name)
            optional = name in ("importance_sampling_level", "aggregation", "kl_gradient")
            if value not in known and not (optional and value is None):
                fail(name, "a known name", repr(value), nearest(value, known))
        level, levels = self.importance_sampling_level, self.preset.levels
        if level is not None and level not in levels:
            expected = " or ".join(("None", *levels)) if levels else "None: it has no ratio"
            fail("importance_sampling_level", f"{expected} with {self.loss_type}", repr(level))

    def _check_delta(self) -> None:
        if self.delta is None:
            return
        bounded = self.objective.bounds is not None
        if "ratio_cap" not in self.objective.parameters:
            bounded = "already bounds the ratio" if bounded else "has no such cap"
            fail("delta", f"None: {self.loss_type} {bounded}", repr(self.delta))
        _check_number("delta", self.delta, self._least_cap, above=True)

    def _check_owned(self) -> None:
        for f in fields(self):
            owner, value = OWNED.get(f.name, self.preset.objective), getattr(self, f.name)
            if owner != self.preset.objective and value != f.default:
                expected = f"{f.default} with {self.loss_type}, since only {owner} has it"
                fail(f.name, expected, repr(value))

    def _check_length(self) -> None:
        length = self.max_completion_length
        if length is None and self.weights == "constant_length":
            expected = f"a number of tokens: {self.loss_type} divides by it"
            fail("max_completion_length", expected, None)
        if length is not None and (
            not isinstance(length, int) or isinstance(length, bool) or length < 1
        ):
            fail("max_completion_length", "an integer >= 1", repr(length))

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of_text(cls, text: str) -> LossConfig:
        """The configuration whose `text` this is; its warnings were heard where it was made."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(**json.loads(text))

    @property
    def preset(self) -> Preset:
        """The row of `PRESETS` this configuration names."""
        return PRESETS[self.loss_type]

    @property
    def objective(self) -> Objective:
        """The row of `OBJECTIVES` of its loss."""
        return OBJECTIVES[self.preset.objective]

    @property
    def level(self) -> str:
        """Level of the ratio, one of `LEVELS`."""
        return self.importance_sampling_level or (*self.preset.levels, "token")[0]

    @property
    def weights(self) -> str:
        """How token losses are averaged, a key of `AGGREGATIONS`."""
        return self.aggregation or self.preset.weights

    @property
    def upper_epsilon(self) -> float:
        """epsilon_high, or epsilon where it is None."""
        return float(self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def clip_low(self) -> float:
        """1 - epsilon."""
        return 1.0 - self.epsilon

    @property
    def clip_high(self) -> float:
        """1 + epsilon_high, or 1 + epsilon."""
        return 1.0 + self.upper_epsilon

    @property
    def ratio_low(self) -> float:
        """Lowest ratio that the clip leaves as it is."""
        return self.ratio_bounds[0]

    @property
    def ratio_high(self) -> float:
        """Highest ratio that the clip leaves as it is."""
        return self.ratio_bounds[1]

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Lowest and highest ratio that still carries a gradient in the direction it pushes."""
        if self.objective.bounds is not None:
            low, high = self.objective.bounds
            return getattr(self, low), getattr(self, high)
        if LEVELS[self.level].clips_tokens:
            return math.exp(-self.epsilon), math.exp(self.upper_epsilon)
        return 0.0, math.inf

    @property
    def ratio_cap(self) -> float:
        """`delta`, or the cap of the preset, at least 1 + epsilon_high: it is for A < 0 alone."""
        return max(self.preset.cap, self._least_cap) if self.delta is None else float(self.delta)

    @property
    def _least_cap(self) -> float:
        """The cap has to be above this."""
        return self.ratio_high if self.objective.bounds is not None else 0.0

    @property
    def parameters(self) -> tuple[float, float, float, float]:
        """The numbers of the objective, 0 where it takes fewer."""
        values = [float(getattr(self, name)) for name in self.objective.parameters]
        return tuple(values + [0.0] * (4 - len(values)))
