"""Small batches with realistic, peaked logits, and the float64 truth of `grpo_fast/reference.py`
for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo_fast import PRESETS, LossConfig, reference
from grpo_fast.engine.chunks import FIXED_BYTES

LENGTHS = (9, 1, 0, 6)
# old and reference log-probs are drawn near the policy at this temperature
TEMPERATURE = 0.9
# relative L2 of results from fp32 inputs; what is observed is near 3e-7
BOUND = 2e-5


@dataclass
class Case:
    """A padded batch whose masked places hold NaN, and out-of-range ids."""

    hidden: torch.Tensor
    weight: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    old_logp: torch.Tensor
    ref_logp: torch.Tensor


def make_case(
    V: int = 77, H: int = 24, lengths=LENGTHS, seed: int = 0, dtype=torch.float32
) -> Case:
    """Hidden states that point at their target with a strength from none to 10 nats.

    The numbers are the same on every device.
    """
    device = torch.get_default_device()
    with torch.device("cpu"):
        case = _make_case(V, H, lengths, seed, dtype)
    return Case(**{name: value.to(device) for name, value in vars(case).items()})


def _make_case(V: int, H: int, lengths, seed: int, dtype) -> Case:
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64) / H**0.5
    ids = torch.randint(V, (B, T), generator=g)
    strength = 10 * torch.rand(B, T, 1, generator=g, dtype=torch.float64)
    direction = weight[ids] / weight[ids].square().sum(-1, keepdim=True)
    hidden = strength * direction + torch.randn(B, T, H, generator=g, dtype=torch.float64)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    logits = reference.head_logits(hidden.double(), weight.double())
    logp = reference.logprob(logits, ids, TEMPERATURE)[0]
    noise = torch.randn(B, T, generator=g, dtype=torch.float64)
    # per-sequence drift, so that sequence-level ratios leave the clip range too
    drift = torch.tensor([-0.45, 0.3, 0.0, -0.25, 0.5, -0.1])[:B, None]
    # at most nearly certain, as probabilities are
    old = (logp + 0.25 * noise + drift).clamp(max=-1e-3).float()
    ref = (logp + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64)).float()
    advantages = torch.tensor([1.3, -0.7, 0.4, -1.1, 0.9, -0.2])[:B].contiguous()
    for tensor in (hidden, old, ref):
        tensor[~mask] = float("nan")
    ids[~mask] = -100
    return Case(hidden, weight, ids, mask, advantages, old, ref)


def generator(seed: int) -> torch.Generator:
    """On the default device, which `--backend cuda` sets."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def truth(case: Case, config: LossConfig, *, use_old: bool, use_ref: bool, **head):
    """Loss, dhidden, dweight and dlogits of the reference in float64."""
    hidden = torch.where(case.mask[..., None], case.hidden, torch.zeros_like(case.hidden))
    hidden = hidden.double().clone().requires_grad_()
    weight = case.weight.double().clone().requires_grad_()
    logits = reference.head_logits(hidden, weight, **head)
    logits.retain_grad()
    loss = reference.policy_loss(
        logits,
        case.ids,
        case.advantages.double(),
        config,
        mask=case.mask,
        old_logp=case.old_logp.double() if use_old else None,
        ref_logp=case.ref_logp.double() if use_ref else None,
    )
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, logits.grad


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance; inf when got holds a NaN."""
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)
    return float("inf") if torch.isnan(error) else error.item()


def preset_config(loss_type: str, **more) -> LossConfig:
    """A configuration of a loss type whose bounds some tokens of a case leave and some do not."""
    objective = PRESETS[loss_type].objective
    options = {"temperature": TEMPERATURE, "max_completion_length": 12, "epsilon_high": 0.28}
    if objective == "clip":
        options["delta"] = 1.6
    if loss_type == "rloo":
        # the ratio of nine tokens is seldom near 1
        options["epsilon"] = 0.3
    if objective == "cispo":
        options |= {"epsilon_high": 1.2, "cispo_ratio_min": 0.9}
    if objective == "dppo_tv":
        options |= {"epsilon": 0.05, "epsilon_high": 0.07, "delta": 1.5}
    if objective == "dppo_kl":
        # a token of A < 0 lies between the two
        options |= {"epsilon": 0.01, "epsilon_high": 0.04, "delta": 1.5}
    return LossConfig(loss_type=loss_type, **{**options, **more})


def configurations() -> list[tuple[LossConfig, bool, bool]]:
    """Every loss type x level, with old log-probs and without, with a KL and without; and for a
    token-level and a sequence-level one every KL, plain and ratio-weighted."""
    out = []
    for loss_type, preset in PRESETS.items():
        for level in preset.levels or (None,):
            base = {"importance_sampling_level": level}
            out += [(preset_config(loss_type, **base), old, False) for old in (False, True)]
            every = loss_type in ("dapo", "cispo", "gspo", "gmpo")
            for kl in ("k1", "k2", "k3", "absolute") if every else ("k3",):
                for weighted in (False, True):
                    more = {"beta": 0.3, "kl_estimator": kl, "use_bias_correction_kl": weighted}
                    config = preset_config(loss_type, **base, **more)
                    out += [(config, old, True) for old in (False, True)]
    for weighted in (False, True):
        more = {"beta": 0.3, "kl_gradient": "k2", "use_bias_correction_kl": weighted}
        out += [(preset_config("dapo", **more), old, True) for old in (False, True)]
    for aggregation in ("sequence_mean", "sequence_sum", "constant_length"):
        out.append((preset_config("dapo", aggregation=aggregation), True, False))
    return out


def tight(case) -> int:
    """Workspace of 16 rows."""
    V, H = case.weight.shape
    return FIXED_BYTES + 16 * 4 * (V + 3 * H)
