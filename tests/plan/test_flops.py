"""Products with the lm_head, by torch's FLOP counter, in units of NHV over the unmasked tokens."""

import re

import pytest
import torch
from products import LENGTHS, PADDING, TABLE, B, H, T, V, in_nhv, inputs, measured, near_policy

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss


@pytest.mark.parametrize("name, loss_type, active, use_old, frozen, bound", TABLE)
def test_products_of_a_loss(name, loss_type, active, use_old, frozen, bound):
    used = measured(loss_type, active, use_old, frozen)
    case = inputs(active, frozen)
    old = near_policy(case) if use_old else None
    config = LossConfig(loss_type=loss_type)
    plan = linear_policy_loss(**case, old_logp=old, config=config, explain=True)
    assert used <= bound
    assert plan.nhv - 1e-9 <= used <= plan.nhv + 4 * PADDING


def test_no_gradient_no_products():
    """Under no_grad, and where skip_inactive_forward leaves nothing: 2NHV and 0."""
    case = inputs(1.0)
    with torch.no_grad():
        assert in_nhv(lambda: linear_policy_loss(**case)) <= 2.1
    case = inputs(0.0)
    assert in_nhv(lambda: linear_policy_loss(**case, skip_inactive_forward=True)) == 0.0


def test_rows_without_a_derivative_leave_the_products():
    """Clipped tokens: their number is known only inside the pass."""
    case = inputs(1.0)
    old = near_policy(case)
    # half of the tokens are far above the clip
    old[:, ::2] -= 1.0
    used = in_nhv(lambda: linear_policy_loss(**case, old_logp=old))
    _, metrics = linear_policy_loss(**case, old_logp=old)
    share = metrics["active_rows"].item() / sum(LENGTHS)
    assert 0.4 < share < 0.6
    assert 2 + 4 * share <= used + 1e-9 <= 2 + 4 * share + 2 * PADDING + 1e-9


def test_frozen_log_probs():
    case = inputs(1.0, frozen=True)
    used = in_nhv(lambda: linear_logprob(case["hidden"], case["weight"], case["ids"]))
    everything = B * T / sum(LENGTHS)
    assert used == pytest.approx(4 * everything)


def test_an_adapter_of_the_head_costs_its_rank():
    case = inputs(1.0, frozen=True)
    g = torch.Generator().manual_seed(1)
    A = torch.randn(4, H, generator=g).requires_grad_()
    lora = (A, torch.randn(V, 4, generator=g).requires_grad_(), 0.5)
    used = in_nhv(lambda: linear_policy_loss(**case, lora=lora))
    # logits and dhidden at width H + r, dB at width r; what has no V in it is small
    wide = (H + 4) / H
    assert used == pytest.approx(4 * wide + 2 * 4 / H, rel=0.02)


def test_the_plan_reads_well():
    case = inputs(1 / 3)
    text = str(linear_policy_loss(**case, explain=True))
    assert text.startswith("route        one_pass")
    assert re.search(r"rows +1280 unmasked, 1280 computed, 427 \(33%\) may have a gradient", text)
    assert "3.33 NHV" in text and "MiB in fp32" in text
