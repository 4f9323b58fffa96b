"""What scales or silences an objective, and temperatures of their own: the calls, and the float64
autograd of `reference.py` for them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import torch
from loss_cases import Case, make_case, preset_config

from grpo_fast import LossConfig, reference

# one of one token, one of none
LENGTHS = (9, 1, 0, 6, 5, 7)
# of advantages, in place of theirs: the fifth, of a sequence that drifted, becomes negative
SIGNS = (1.0, 1.0, 1.0, 1.0, -1.0, -1.0)
# longer sweeps, minutes of them
FULL = os.environ.get("GRPO_FAST_TEST_FULL") == "1"


@dataclass(frozen=True)
class Correction:
    """Options of the loss, and what a call is given with them."""

    options: dict = field(default_factory=dict)
    rollout: bool = False
    temperature: str | None = None
    threshold: float | None = None

    def config(self, loss_type: str, **more) -> LossConfig:
        """Of a loss type, with bounds that some tokens leave and some do not."""
        return preset_config(loss_type, **{**self.options, **more})


def _rollouts() -> dict[str, Correction]:
    out = {}
    for level in ("token", "sequence", "geometric"):
        for mode in ("truncate", "mask"):
            name = f"{level}_{mode}"
            most = {"token": 1.15, "sequence": 1.15, "geometric": 1.02}[level]
            for low, high in ((None, most), (0.96, most), (0.97, None), (None, None)):
                bounds = {"rollout_ratio_min": low, "rollout_ratio_max": high}
                options = {"rollout_correction": name, **bounds}
                given = {(True, True): "both", (True, False): "low", (False, True): "high"}
                kind = given.get((low is not None, high is not None), "none")
                out[f"{name}_{kind}"] = Correction(options, rollout=True)
    return out


KL = {"beta": 0.2, "kl_estimator": "k3"}
TOP = {"top_entropy_quantile": 0.45}
CORRECTIONS = _rollouts() | {
    "off_policy": Correction({"off_policy_mask_threshold": 0.1}),
    # a sequence drifted so far from the rollout's log-probs, but not from the old ones
    "off_policy_rollout": Correction(
        {"off_policy_mask_threshold": 0.35, "rollout_ratio_max": 1.2}, rollout=True
    ),
    "top_entropy": Correction(TOP),
    "top_entropy_given": Correction(TOP, threshold=1.5),
    "entropy_bonus": Correction({"entropy_coef": 0.03}),
    "temperature_sequence": Correction(temperature="sequence"),
    "temperature_token": Correction(temperature="token"),
    "together": Correction(
        {
            "off_policy_mask_threshold": 0.1,
            "rollout_correction": "token_mask",
            "rollout_ratio_min": 0.9,
            "rollout_ratio_max": 1.2,
            "entropy_coef": 0.03,
            **TOP,
            **KL,
        },
        rollout=True,
        temperature="token",
    ),
    "together_without_top": Correction(
        {
            "rollout_correction": "token_truncate",
            "rollout_ratio_max": 1.1,
            "entropy_coef": 0.03,
            **KL,
            "kl_gradient": "k2",
        },
        rollout=True,
        temperature="sequence",
    ),
}


@dataclass
class Extras:
    """What a call is given beside a `Case`, NaN in its masked places."""

    rollout_logp: torch.Tensor
    temperature: dict[str | None, torch.Tensor | None]
    advantages: torch.Tensor
    """(B, T), of both signs in one sequence, and 0."""


def correction_case(dtype: torch.dtype = torch.float32, lengths=LENGTHS) -> Case:
    """Sequences of A < 0 that drifted and that did not."""
    case = make_case(lengths=lengths, dtype=dtype)
    return replace(case, advantages=case.advantages * case.advantages.new_tensor(SIGNS))


def make_extras(case: Case) -> Extras:
    """Rollout log-probs near the old ones, two of them missing; temperatures and advantages."""
    device = case.ids.device
    g = torch.Generator().manual_seed(11)
    B, T = case.ids.shape
    noise = 0.12 * torch.randn(B, T, generator=g) + 0.02 * torch.randn(B, 1, generator=g)
    rollout = case.old_logp + noise.to(device)
    rollout[0, 3] = rollout[3, 1] = float("nan")
    by_sequence = 0.6 + torch.rand(B, generator=g).to(device)
    by_token = 0.6 + torch.rand(B, T, generator=g).to(device)
    by_token[~case.mask] = float("nan")
    advantages = torch.randn(B, T, generator=g).to(device)
    advantages[:, ::4] = 0.0
    kinds = {None: None, "sequence": by_sequence, "token": by_token}
    return Extras(rollout, kinds, advantages)


def expected(case: Case, extras: Extras, correction: Correction, config, old, ref, advantages):
    """Leaves in float64 (hidden, weight, logits) with their gradients, and the loss."""
    clean = torch.where(case.mask[..., None], case.hidden, torch.zeros_like(case.hidden))
    leaves = [t.double().clone().requires_grad_() for t in (clean, case.weight)]
    logits = reference.head_logits(*leaves)
    logits.retain_grad()
    temperature = extras.temperature[correction.temperature]
    if temperature is not None:
        temperature = temperature.double()
        temperature = temperature[:, None] if temperature.dim() == 1 else temperature
        temperature = temperature.expand(case.ids.shape)
    loss = reference.policy_loss(
        logits,
        case.ids,
        advantages.double(),
        config,
        mask=case.mask,
        old_logp=case.old_logp.double() if old else None,
        ref_logp=case.ref_logp.double() if ref else None,
        rollout_logp=extras.rollout_logp.double() if correction.rollout else None,
        temperature=temperature,
        entropy_threshold=correction.threshold,
    )
    loss.backward()
    return loss.detach(), *leaves, logits


def arguments(
    case: Case, extras: Extras, correction: Correction, config, old, ref, advantages
) -> dict:
    """Keyword arguments of a padded call of either loss."""
    return {
        "ids": case.ids,
        "advantages": advantages,
        "config": config,
        "mask": case.mask,
        "old_logp": case.old_logp if old else None,
        "ref_logp": case.ref_logp if ref else None,
        "rollout_logp": extras.rollout_logp if correction.rollout else None,
        "temperature": extras.temperature[correction.temperature],
        "entropy_threshold": correction.threshold,
    }


def packed(given: dict) -> dict:
    """The same call without its masked places, (N,) with cu_seqlens."""
    mask = given["mask"]
    cu = torch.cat((mask.new_zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)))
    out = {**given, "mask": None, "cu_seqlens": cu}
    for name in ("ids", "advantages", "old_logp", "ref_logp", "rollout_logp", "temperature"):
        value = given[name]
        if name == "temperature" and value is not None and value.dim() == 1:
            value = value[:, None].expand(mask.shape)
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            out[name] = value[mask]
    return out
