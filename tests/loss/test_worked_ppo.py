"""PPO by numbers that can be checked with a pencil: clip, dual clip, penalty, value, the sum of all
three. Log-probs are those of a vocabulary of two, so that nothing but the loss is in play."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_fast import LossConfig, policy_loss
from grpo_fast.objective.value import value_loss

LOGP, OLD = [-2.1, -1.8, -0.5, -1.2], [-2.3, -1.9, -0.6, -1.4]


def wide(values):
    return torch.tensor(values, dtype=torch.float64)


def logits_of(logp):
    """(N, 2), whose first column has these log-probs."""
    first = wide(logp)
    return torch.stack((first, torch.log1p(-first.exp())), dim=-1)


def loss_of(logp, old, advantage, **options):
    """The loss of tokens that form one sequence."""
    n = len(logp)
    loss, metrics = policy_loss(
        logits_of(logp)[None],
        torch.zeros(1, n, dtype=torch.int64),
        wide([advantage]),
        config=LossConfig(**{"loss_type": "dapo", **options}),
        old_logp=wide(old)[None],
        ref_logp=wide(old)[None] if options.get("beta") else None,
    )
    return loss.item(), metrics


def test_two_tokens_up_and_two_down():
    """Log-probs -2.1 -1.8 over -2.3 -1.9 with A = .9, and -.5 -1.2 over -.6 -1.4 with A = -.3:
    ratios 1.22140 and 1.10517, terms 1.08 (clipped) and .99465, -.33155 and -.36642."""
    up, _ = loss_of(LOGP[:2], OLD[:2], 0.9)
    down, _ = loss_of(LOGP[2:], OLD[2:], -0.3)
    assert -2 * up == pytest.approx(1.08 + 0.9 * math.exp(0.1), rel=1e-6)
    assert -2 * down == pytest.approx(-0.3 * (math.exp(0.1) + math.exp(0.2)), rel=1e-6)


def test_the_mean_of_four():
    """All four with A = .6: terms .72 .66310 .66310 .72, their sum 2.76621, the loss -.69155."""
    loss, metrics = loss_of(LOGP, OLD, 0.6)
    assert loss == pytest.approx(-0.69155, abs=5e-6)
    assert -4 * loss == pytest.approx(2.76621, abs=1e-5)
    assert metrics["ratio_max"].item() == pytest.approx(1.22140, abs=5e-6)


def test_one_token_that_is_clipped():
    """Log-prob -2.1 -> -1.8, A = .2: ratio 1.34986, .26997 without the clip, .24 with it."""
    loss, metrics = loss_of([-1.8], [-2.1], 0.2)
    assert metrics["ratio_max"].item() == pytest.approx(1.34986, abs=5e-6)
    assert loss == pytest.approx(-0.24, rel=1e-6)
    free, _ = loss_of([-1.8], [-2.1], 0.2, epsilon_high=1e9)
    assert free == pytest.approx(-0.26997, abs=5e-6)


def test_the_dual_clip_is_a_loss_type():
    """A = -1 at a ratio of 5: the plain clip costs 5, `ppo` 3."""
    pair = ([-1.0], [-1.0 - math.log(5.0)], -1.0)
    assert loss_of(*pair)[0] == pytest.approx(5.0, rel=1e-6)
    assert loss_of(*pair, loss_type="ppo")[0] == pytest.approx(3.0, rel=1e-6)


def test_the_penalty():
    """-r A + .5 (1 - r + r log r) at r = 1.34986: -.26997 + .5 * .05510."""
    loss, _ = loss_of([-1.8], [-2.1], 0.2, epsilon=1.0, epsilon_high=1e9, beta=0.5)
    r = math.exp(0.3)
    assert 1 - r + r * 0.3 == pytest.approx(0.05510, abs=5e-6)
    assert loss == pytest.approx(-0.2 * r + 0.5 * (1 - r + 0.3 * r), rel=1e-5)


def test_the_value_and_the_sum():
    """V = .3 and return .5: half of .04 is .02, and the sum with a vf_coef of .5 and an entropy
    bonus of .01 is -.24 + .5 * .02 - .01 H. Who writes c (V - R)^2 with c = .5 has vf_coef = 1."""
    each, slope, _ = value_loss(wide([0.3]), wide([0.5]), wide([0.3]))
    assert each.item() == pytest.approx(0.02, rel=1e-12) and slope.item() == pytest.approx(-0.2)
    p = math.exp(-1.8)
    entropy = -p * math.log(p) - (1 - p) * math.log1p(-p)
    actor, metrics = loss_of([-1.8], [-2.1], 0.2, entropy_coef=0.01)
    assert metrics["entropy"].item() == pytest.approx(entropy, rel=1e-6)
    total = actor + 0.5 * each.item()
    assert total == pytest.approx(-0.24 + 0.01 - 0.01 * entropy, rel=1e-6)
    assert actor + 1.0 * each.item() == pytest.approx(-0.24 + 0.5 * 0.04 - 0.01 * entropy, rel=1e-6)
