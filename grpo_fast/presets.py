"""The table of variants: one row is one loss, with the paper it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One variant of the loss: what each token costs, at which level its ratio is taken, who counts
    how much, and over what it is averaged."""

    objective: str
    """Name of the per-token function in `objectives.py`."""
    levels: tuple[str, ...]
    """Levels of the importance ratio it is defined for (`levels.py`), the default first; empty
    where there is no ratio."""
    weights: str
    """Key of `AGGREGATIONS`, the default of `aggregation`."""
    window: bool
    """True when the denominator spans the accumulation window and all ranks, not one
    micro-batch."""
    advantage: str
    """How its paper makes advantages of rewards: a row of `advantages.ADVANTAGES`, or "given"."""
    source: str
    """The paper the variant comes from (title, year), or who named it."""
    cap: float = math.inf
    """Cap of the unclipped ratio where `delta` is None."""


@dataclass(frozen=True)
class Objective:
    """What the engine has to know of a function of `objectives.py`."""

    through_ratio: bool
    """True when its derivative reaches the policy through the importance ratio."""
    parameters: tuple[str, ...]
    """Attributes of `LossConfig` that it gets as its numbers, at most four."""
    bounds: tuple[str, str] | None = None
    """Attributes of `LossConfig`: lowest and highest ratio that still carries a gradient in the
    direction its advantage pushes. None: those of the level, if any."""
    raw_bound: bool = False
    """True when epsilon_high is the highest ratio itself, not its distance from 1."""
    factor_of: str | None = None
    """The objective of whose advantage this one is a factor, so that a KL is weighted by each
    token's own ratio; its ratio is that to the policy that sampled. None: it is a loss itself."""


@dataclass(frozen=True)
class Level:
    """What the importance ratio of a token is made of (`objective/levels.py`)."""

    of_sequence: bool
    """True when it needs the log-probs of its whole sequence."""
    clips_tokens: bool = False
    """True when the log-ratios of tokens are clipped to epsilon nats before they are averaged, each
    on the side of its own advantage."""


OBJECTIVES: dict[str, Objective] = {
    "clip": Objective(
        True, ("ratio_low", "ratio_high", "ratio_cap"), bounds=("clip_low", "clip_high")
    ),
    "surrogate": Objective(True, ()),
    "sapo": Objective(True, ("sapo_temperature_pos", "sapo_temperature_neg")),
    "cispo": Objective(
        False,
        ("cispo_ratio_min", "upper_epsilon"),
        bounds=("cispo_ratio_min", "upper_epsilon"),
        raw_bound=True,
    ),
    "reinforce": Objective(False, ()),
    "vespo": Objective(
        False,
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        factor_of="reinforce",
    ),
    "dppo_tv": Objective(False, ("epsilon", "upper_epsilon", "ratio_cap")),
    "dppo_kl": Objective(False, ("epsilon", "upper_epsilon", "ratio_cap")),
}


_GRPO = "DeepSeekMath: Pushing the Limits of Mathematical Reasoning (2024)"
_DAPO = "DAPO: An Open-Source LLM Reinforcement Learning System at Scale (2025)"
_BNPO = "TRL's token mean over one micro-batch; not the Beta normalization of BNPO (2025)"
_DR_GRPO = "Understanding R1-Zero-Like Training: A Critical Perspective (2025)"
_CISPO = "MiniMax-M1: Scaling Test-Time Compute with Lightning Attention (2025)"
_SAPO = "Soft Adaptive Policy Optimization (2025)"
_LUSPO = "Length-Unbiased Sequence Policy Optimization (2026)"
_VESPO = "VESPO: Variational Sequence-Level Soft Policy Optimization (2026)"
_GSPO = "Group Sequence Policy Optimization (2025)"
_GMPO = "Geometric-Mean Policy Optimization (2025)"
_REINFORCE = "Simple Statistical Gradient-Following Algorithms (1992)"
_RLOO = "Back to Basics: Revisiting REINFORCE Style Optimization (2024)"
_PPO = "Proximal Policy Optimization Algorithms (2017), with the dual clip of 2020"
_DPPO = "Rethinking the Trust Region in LLM Reinforcement Learning (2026)"
_GPG = "GPG: A Simple and Strong Reinforcement Learning Baseline (2025)"
_RWR = "Reinforcement Learning by Reward-Weighted Regression (2007), over whole completions"
# geometric mean of the token ratios: GSPO
_ANY_LEVEL = ("token", "sequence", "sequence_token")
PRESETS: dict[str, Preset] = {
    "grpo": Preset("clip", _ANY_LEVEL, "sequence_mean", True, "group", _GRPO),
    "bnpo": Preset("clip", _ANY_LEVEL, "token_mean", False, "group", _BNPO),
    "dr_grpo": Preset("clip", _ANY_LEVEL, "constant_length", True, "centered", _DR_GRPO),
    "dapo": Preset("clip", _ANY_LEVEL, "token_mean", True, "group", _DAPO),
    "cispo": Preset("cispo", _ANY_LEVEL, "token_mean", True, "group", _CISPO),
    "sapo": Preset("sapo", _ANY_LEVEL, "sequence_mean", True, "group", _SAPO),
    "luspo": Preset("clip", ("sequence", "token"), "sequence_sum", True, "group", _LUSPO),
    "vespo": Preset("vespo", ("sequence_product",), "token_mean", True, "group", _VESPO),
    "gspo": Preset("clip", ("sequence",), "sequence_mean", True, "group", _GSPO),
    "gspo_token": Preset("clip", ("sequence_token",), "sequence_mean", True, "group", _GSPO),
    "gmpo": Preset("surrogate", ("sequence_clipped",), "sequence_mean", True, "group", _GMPO),
    "reinforce": Preset("reinforce", (), "sequence_sum", True, "given", _REINFORCE),
    "rloo": Preset("clip", ("sequence_product",), "sequence_mean", True, "leave_one_out", _RLOO),
    "ppo": Preset("clip", ("token",), "token_mean", True, "given", _PPO, cap=3.0),
    "dppo_tv": Preset("dppo_tv", ("token",), "token_mean", True, "group", _DPPO, cap=20.0),
    "dppo_kl": Preset("dppo_kl", ("token",), "token_mean", True, "group", _DPPO, cap=20.0),
    "gpg": Preset("reinforce", (), "token_mean", True, "centered", _GPG),
    "reward_weighted": Preset("reinforce", (), "sequence_sum", True, "reward_weights", _RWR),
}
# what `denominator` counts for each way to aggregate
AGGREGATIONS = {
    "sequence_mean": "sequences",
    "sequence_sum": "sequences",
    "token_mean": "tokens",
    "constant_length": "sequences",
}
KL_ESTIMATORS = ("k1", "k2", "k3", "absolute")
LEVELS = {
    "token": Level(of_sequence=False),
    "sequence": Level(of_sequence=True),
    "sequence_token": Level(of_sequence=True),
    "sequence_product": Level(of_sequence=True),
    "sequence_clipped": Level(of_sequence=True, clips_tokens=True),
}
# field of `LossConfig` -> the objective that alone reads it
OWNED = {
    field: name
    for name, objective in OBJECTIVES.items()
    for field in objective.parameters
    if field.startswith(f"{name}_")
}
ROLLOUT_CORRECTIONS = tuple(
    f"{level}_{mode}"
    for level in ("token", "sequence", "geometric")
    for mode in ("truncate", "mask")
)
