"""Corrections of the objective, temperatures of their own, adapters, references from hidden states
and fixed capacities, on the torch backend against the float64 reference."""

from dataclasses import replace

import pytest
import torch
from correction_checks import CORRECTIONS, FULL, check_corrections, correction_case, make_extras

from grpo_fast import PRESETS, reference

# every kind of level and of objective; the others with GRPO_FAST_TEST_FULL=1
WIDE = ("dapo", "gspo", "gspo_token", "gmpo", "vespo", "rloo")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections(name, old):
    for loss_type in PRESETS if FULL else WIDE:
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
