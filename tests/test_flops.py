"""Products with the lm_head, by torch's FLOP counter, in units of NHV over the unmasked tokens."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss

B, T, H, V = 6, 320, 64, 300
LENGTHS = (320, 200, 90, 320, 320, 30)
# rows of a product are padded to a multiple of 16
PADDING = 16 / sum(LENGTHS)


def inputs(active: float, frozen: bool = False) -> dict:
    """A padded batch of which this share of the sequences' tokens has an advantage."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    advantages = torch.where(torch.rand(B, T, generator=g) < active, 1.0, 0.0)
    # exactly the share, of the unmasked tokens
    flat = mask.flatten().nonzero()[:, 0]
    keep = flat[torch.randperm(flat.numel(), generator=g)[: round(active * flat.numel())]]
    advantages = torch.zeros(B * T)
    advantages[keep] = 1.0
    return {
        "hidden": torch.randn(B, T, H, generator=g).requires_grad_(),
        "weight": (torch.randn(V, H, generator=g) / 8).requires_grad_(not frozen),
        "ids": torch.randint(V, (B, T), generator=g),
        "advantages": advantages.view(B, T),
        "mask": mask,
    }


def in_nhv(call) -> float:
    """FLOPs of a call and its backward over N H V."""
    with FlopCounterMode(display=False) as counter:
        out = call()
        if out[0].requires_grad:
            out[0].sum().backward()
    return counter.get_total_flops() / (sum(LENGTHS) * H * V)


def near_policy(case: dict) -> torch.Tensor:
    """Old log-probs at which no token is clipped."""
    with torch.no_grad():
        return linear_logprob(case["hidden"], case["weight"], case["ids"]).logp + 0.01


# name, loss type, share active, old log-probs given, frozen head, bound
TABLE = [
    ("trainable head, all active, on-policy", "dapo", 1.0, False, False, 6.1),
    ("trainable head, all active, old log-probs given", "dapo", 1.0, True, False, 6.1),
    ("sequence-level ratio, all active, on-policy", "gspo", 1.0, False, False, 6.1),
    ("sequence-level ratio, all active, old log-probs given", "gspo", 1.0, True, False, 6.1),
    ("a third of the tokens active", "dapo", 1 / 3, True, False, 3.5),
    ("frozen head, all active", "dapo", 1.0, True, True, 4.1),
    ("frozen head, sequence-level ratio, all active", "gspo", 1.0, True, True, 4.1),
    ("no active row", "dapo", 0.0, True, False, 2.1),
]


def measured(loss_type: str, active: float, use_old: bool, frozen: bool) -> float:
    """NHV of one row of the table."""
    case = inputs(active, frozen)
    old = near_policy(case) if use_old else None
    config = LossConfig(loss_type=loss_type)
    return in_nhv(lambda: linear_policy_loss(**case, old_logp=old, config=config))


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
