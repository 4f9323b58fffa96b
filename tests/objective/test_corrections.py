"""Corrections of the objective and temperatures of their own against the float64 reference, on the
backend of the run."""

from dataclasses import replace

import pytest
import torch
from correction_cases import (
    CORRECTIONS,
    FULL,
    arguments,
    correction_case,
    expected,
    make_extras,
    packed,
)
from loss_cases import BOUND, relative

from grpo_fast import PRESETS, linear_policy_loss, policy_loss, reference

SLOW_INTERPRETED = pytest.mark.slow_interpreted
# every kind of level and of objective; the others with GRPO_FAST_TEST_FULL=1
WIDE = ("dapo", "gspo", "gspo_token", "gmpo", "vespo", "rloo")


def check_corrections(
    loss_type: str, name: str, *, old: bool, ref: bool = False, per_token: bool = False
) -> None:
    """Loss, dhidden, dweight and dlogits of both losses, padded and packed, with a correction."""
    case = correction_case()
    correction, extras = CORRECTIONS[name], make_extras(case)
    config = correction.config(loss_type)
    ref = ref or config.beta > 0
    common = (old, ref, extras.advantages if per_token else case.advantages)
    loss, hidden, weight, logits = expected(case, extras, correction, config, *common)
    padded = arguments(case, extras, correction, config, *common)
    for given in (padded, packed(padded)):
        mask = case.mask if given["mask"] is None else torch.ones_like(case.mask)
        leaf = case.hidden[mask] if given["mask"] is None else case.hidden
        ours = [t.clone().requires_grad_() for t in (leaf, case.weight)]
        got, metrics = linear_policy_loss(*ours, **given)
        got.backward()
        want = hidden.grad[mask].view(leaf.shape)
        _agree(got, loss)
        assert relative(ours[0].grad, want) < BOUND and relative(ours[1].grad, weight.grad) < BOUND
        assert metrics["tokens"] == case.mask.sum() and metrics["nonfinite_tokens"] == 0
        stored = torch.full(logits.shape, torch.nan)
        stored[case.mask] = logits.detach()[case.mask].float()
        leaf = (stored[mask] if given["mask"] is None else stored).clone().requires_grad_()
        got, same = policy_loss(leaf, **given)
        got.backward()
        _agree(got, loss)
        assert relative(leaf.grad, logits.grad[mask].view(leaf.shape)) < BOUND
        # logits of a row without a gradient have none at all
        assert metrics["active_rows"] == logits.grad.any(-1).sum()
        for key, value in metrics.items():
            assert abs(value - same[key]) <= 1e-5 * max(1.0, abs(value)), key


def _agree(got: torch.Tensor, want: torch.Tensor) -> None:
    # The loss sums terms of both signs near 1: vespo's is -0.003, and fp32 products of another CPU
    # move it by 2e-7, which is 2.01e-5 of 0.01.
    assert abs(got.item() - want.item()) <= BOUND * max(abs(want.item()), 2e-2)


# the interpreter takes what the one-pass rows apply themselves, at token level, and one of each
INTERPRETED = ("token_mask_both", "token_truncate_high", "entropy_bonus", "temperature_token")
NAMES = [
    name if name in (*INTERPRETED, "together") else pytest.param(name, marks=SLOW_INTERPRETED)
    for name in CORRECTIONS
]


@pytest.mark.kernels
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_corrections(backend, name, old):
    loss_types = PRESETS if FULL else WIDE
    if backend.name != "torch":
        loss_types = ("dapo", "gmpo") if FULL or name == "together" else ("dapo",)
    for loss_type in loss_types:
        check_corrections(loss_type, name, old=old)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", PRESETS)
def test_corrections_together(loss_type, old):
    for name in (
        "together",
        "together_without_top",
        "off_policy_rollout",
        "entropy_bonus",
        "sequence_mask_high",
    ):
        check_corrections(loss_type, name, old=old, ref=True)
        check_corrections(loss_type, name, old=old, per_token=True)


def test_the_cases_tell_corrections_apart():
    """Every rollout mode bounds or cuts some and leaves others; one sequence drifted, one not."""
    case = correction_case()
    extras, mask = make_extras(case), case.mask
    gap = torch.where(mask, case.old_logp - extras.rollout_logp, 0.0)
    for name, correction in CORRECTIONS.items():
        config = correction.config("dapo")
        if not name.startswith(("token", "sequence", "geometric")):
            continue
        q = reference._rollout_factor(
            replace(config, rollout_ratio_min=None, rollout_ratio_max=None), gap, mask
        )
        got = reference._rollout_factor(config, gap, mask)
        changed = (q != got)[mask]
        assert changed.any() == (not name.endswith("none")) and not changed.all(), name
        assert ((got == 0)[mask].any()) == ("mask" in name and changed.any()), name
    beyond = []
    for sampled in (case.old_logp, extras.rollout_logp):
        hidden = torch.nan_to_num(case.hidden)
        logits = reference.head_logits(hidden, case.weight)
        logp = reference.logprob(logits, case.ids.clamp(min=0), 0.9)[0]
        drift = torch.where(mask, (sampled - logp).nan_to_num(), 0.0).sum(1) / mask.sum(1)
        off = drift[(case.advantages < 0) & mask.any(1)] > 0.1
        assert off.any() and not off.all()
        beyond.append((drift[case.advantages < 0] > 0.35).any().item())
    assert beyond == [False, True]
