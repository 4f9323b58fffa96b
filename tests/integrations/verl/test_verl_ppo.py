"""Advantages, value loss and KL controllers of PPO against verl's own functions, on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl", reason="needs verl, which `make test-verl` lays over the environment")
from verl.trainer.ppo.core_algos import (
    AdaptiveKLController,
    FixedKLController,
    compute_gae_advantage_return,
    compute_value_loss,
    kl_penalty,
)

from grpo_fast.advantages import gae, token_kl, token_rewards, whiten
from grpo_fast.objective.value import value_loss
from grpo_fast.trainer.kl import FixedKL, ZieglerKL

# where the definitions coincide
SAME = {"rtol": 1e-6, "atol": 1e-6}


def case(seed: int, gaps: bool, dtype: torch.dtype = torch.float64):
    """A padded batch (B, T) with its mask: completions of 1 to 24 tokens, on request with places
    inside that the policy did not write."""
    g = torch.Generator().manual_seed(seed)
    rows, width = 7, 24
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    inside = torch.arange(width) < lengths[:, None]
    mask = inside & (torch.rand(rows, width, generator=g) < 0.7) if gaps else inside
    # a completion keeps its first token
    mask[:, 0] = True
    rewards = torch.randn(rows, width, generator=g, dtype=dtype) * mask
    values = torch.randn(rows, width, generator=g, dtype=dtype)
    bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    return rewards, values, inside, mask, bounds


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.0)])
def test_advantages_and_returns(gaps, gamma, lam):
    """Theirs are padded and whitened within one batch; masked places of theirs hold leftovers."""
    for seed in range(20):
        rewards, values, inside, mask, bounds = case(seed, gaps)
        theirs, their_returns = compute_gae_advantage_return(
            rewards, values, mask.double(), gamma, lam
        )
        kept = mask[inside]
        ours, returns = gae(
            rewards[inside], values[inside], bounds, gamma=gamma, lam=lam, mask=kept
        )
        (white,) = whiten([ours], [kept])
        torch.testing.assert_close(white[kept], theirs[mask], **SAME)
        torch.testing.assert_close(returns[kept], their_returns[mask], **SAME)
        assert not white[~kept].any()


@pytest.mark.parametrize("clip", [0.05, 0.2, 0.5])
def test_value_loss(clip):
    """Loss, its gradient by the values, and the share of tokens where the clip binds."""
    for seed in range(20):
        returns, old, inside, mask, _ = case(seed, gaps=True)
        moved = old + 0.4 * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed))
        moved.requires_grad_()
        theirs, their_share = compute_value_loss(moved, returns, old, mask.double(), clip)
        (gradient,) = torch.autograd.grad(theirs, moved)
        each, slope, binds = value_loss(moved[mask], returns[mask], old[mask], cliprange=clip)
        torch.testing.assert_close(each.mean(), theirs.detach(), **SAME)
        torch.testing.assert_close(slope / mask.sum(), gradient[mask], **SAME)
        assert binds.double().mean().item() == pytest.approx(float(their_share), abs=1e-6)
        assert 0 < binds.sum() < binds.numel() or clip == 0.5


def test_kl_controllers():
    """One rule; their KL is the mean over tokens, ours the sum over those of a completion, so that
    the same trajectory needs the target in the same unit."""
    theirs, ours = AdaptiveKLController(0.2, 6.0, 10000), ZieglerKL(0.2, 6.0, 10000)
    fixed, our_fixed = FixedKLController(0.2), FixedKL(0.2)
    for kl in (12.0, 3.0, 6.0, 6.3, 5.9, 0.0, -1.0, 100.0):
        for one, other in ((theirs, ours), (fixed, our_fixed)):
            one.update(kl, 512)
            other.update(kl, 512)
        assert ours.coefficient == pytest.approx(float(theirs.value), rel=1e-12)
        assert our_fixed.coefficient == fixed.value
    assert ours.coefficient != 0.2


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_kl_in_the_reward(name):
    """Per token. Theirs cuts k3 off at 10 nats, ours does not below a log-ratio of 20."""
    g = torch.Generator().manual_seed(0)
    logp = -torch.rand(500, generator=g, dtype=torch.float64) * 5
    ref = logp + 0.8 * torch.randn(500, generator=g, dtype=torch.float64)
    torch.testing.assert_close(token_kl(logp, ref, name), kl_penalty(logp, ref, name), **SAME)
    far = torch.tensor([4.0], dtype=torch.float64)
    ours, theirs = (f(0 * far, far, "k3") for f in (token_kl, kl_penalty))
    assert theirs.item() == 10.0 and ours.item() == pytest.approx(far.exp().item() - 5)


def test_the_reward_of_a_token():
    """Score on the last kept token, minus coefficient times KL: what their trainer hands to GAE."""
    rewards, values, inside, mask, bounds = case(3, gaps=True)
    scores = torch.arange(1.0, 8.0, dtype=torch.float64)
    kl = (values - rewards)[inside]
    placed = torch.zeros_like(values)
    last = (mask * torch.arange(mask.shape[1])).argmax(-1)
    placed[torch.arange(len(scores)), last] = scores
    theirs = placed - 0.3 * (values - rewards) * mask
    ours = token_rewards(scores, bounds, kl=kl, kl_coef=0.3, mask=mask[inside])
    torch.testing.assert_close(ours, theirs[inside], **SAME)


def test_one_token_is_whitened_by_us_alone():
    with pytest.raises(ValueError, match="division by zero"):
        compute_gae_advantage_return(*(torch.ones(1, 1) for _ in range(3)), 1.0, 1.0)
    assert whiten([torch.tensor([3.0])])[0].item() == 0.0
