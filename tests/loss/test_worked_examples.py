"""Numbers worked out by hand, or printed in the literature, through the public losses."""

import math

import pytest
import torch

from grpo_fast import LossConfig, policy_loss
from grpo_fast.advantages.group import leave_one_out_advantages
from grpo_fast.objective import objectives

# the DAPO example: four tokens, advantage 0.6
LOGP = [-2.1, -1.8, -0.5, -1.2]
OLD = [-2.3, -1.9, -0.6, -1.4]


def loss_of(rows, advantages, config=None, old=None, **more):
    """The loss of sequences of log-probs (a list of lists), and its d/dlogp in the same shape.

    Two logits give a token any log-prob: (logp, log(1 - p)) are normalised already.
    """
    T = max(len(row) for row in rows)
    mask = torch.tensor([[t < len(row) for t in range(T)] for row in rows])
    logp = torch.tensor([row + [-1.0] * (T - len(row)) for row in rows], dtype=torch.float64)
    logits = torch.stack((logp, torch.log1p(-logp.exp())), -1).requires_grad_()
    if old is not None:
        old = torch.tensor([r + [float("nan")] * (T - len(r)) for r in old], dtype=torch.float64)
    ids = torch.zeros_like(mask, dtype=torch.long)
    given = {"config": config, "mask": mask, "old_logp": old, **more}
    advantages = torch.tensor(advantages, dtype=torch.float64)
    loss, metrics = policy_loss(logits, ids, advantages, **given)
    loss.backward()
    # d logits of the token is dlogp (1 - p)
    slope = logits.grad[..., 0] / -logp.expm1()
    return loss.item(), slope, metrics


def test_dapo_four_tokens():
    """log-probs -2.1, -1.8, -0.5, -1.2 against -2.3, -1.9, -0.6, -1.4, A = 0.6, epsilon 0.2:
    ratios e^.2 and e^.1; the former are clipped at 1.2."""
    loss, slope, metrics = loss_of([LOGP], [0.6], LossConfig(epsilon=0.2), [OLD])
    assert loss == pytest.approx(-0.6916, abs=5e-5)
    assert loss == pytest.approx(-0.6 * (1.2 + math.exp(0.1)) / 2, rel=1e-12)
    kept = -0.6 * math.exp(0.1) / 4
    assert slope[0].tolist() == pytest.approx([0.0, kept, kept, 0.0], rel=1e-9)
    assert metrics["clip_high"] == 0.5 and metrics["clip_low"] == 0


@pytest.mark.parametrize(
    "advantage, gap, loss, moves",
    [
        # e^.3 = 1.35 is clipped at 1.2: what is maximised is 0.24, so the loss is -0.24
        (0.2, 0.3, -0.24, False),
        (0.2, -0.3, -0.2 * math.exp(-0.3), True),
        (-0.2, 0.3, 0.2 * math.exp(0.3), True),
        (-0.2, -0.3, 0.16, False),
    ],
)
def test_the_sign_of_a_clipped_token(advantage, gap, loss, moves):
    got, slope, _ = loss_of([[-1.0]], [advantage], LossConfig(epsilon=0.2), [[-1.0 - gap]])
    assert got == pytest.approx(loss, rel=1e-12)
    assert slope.item() == pytest.approx(loss if moves else 0.0, rel=1e-9)


def test_gspo_ratio():
    """s = (product of e^.2, e^.1, e^.1, e^.2)^(1/4) = e^.15 is inside; a quarter per token."""
    config = LossConfig(loss_type="gspo", epsilon=0.2)
    loss, slope, metrics = loss_of([LOGP], [0.6], config, [OLD])
    assert loss == pytest.approx(-0.6 * math.exp(0.15), rel=1e-12)
    assert slope[0].tolist() == pytest.approx([-0.6 * math.exp(0.15) / 4] * 4, rel=1e-9)
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(0.15), rel=1e-12)
    # clipped as a whole at 1.1: nothing moves
    loss, slope, _ = loss_of([LOGP], [0.6], LossConfig(loss_type="gspo", epsilon=0.1), [OLD])
    assert loss == pytest.approx(-0.66, rel=1e-12) and not slope.any()


def test_gmpo_ratio():
    """Log-ratios .2 .1 .1 .2 clipped at .15 before their mean, .125; the clipped do not move."""
    config = LossConfig(loss_type="gmpo", epsilon=0.15)
    loss, slope, _ = loss_of([LOGP], [0.6], config, [OLD])
    value = -0.6 * math.exp(0.125)
    assert loss == pytest.approx(value, rel=1e-12)
    assert slope[0].tolist() == pytest.approx([0.0, value / 4, value / 4, 0.0], rel=1e-9)
    # a negative advantage clips from below alone, and nothing is below -.15
    loss, slope, _ = loss_of([LOGP], [-0.6], config, [OLD])
    value = 0.6 * math.exp(0.15)
    assert loss == pytest.approx(value, rel=1e-12)
    assert slope[0].tolist() == pytest.approx([value / 4] * 4, rel=1e-9)


def test_rloo():
    """Rewards 1, 0, 0 leave one out: 1 - 0, 0 - 1/2, 0 - 1/2; on-policy the gradient is REINFORCE
    on whole sequences: -A / 3 for every token, whatever its sequence's length."""
    advantages = leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.0]]).double())[0].tolist()
    assert advantages == pytest.approx([1.0, -0.5, -0.5])
    rows = [[-0.5, -1.0], [-2.0], [-0.1, -0.2, -0.3]]
    loss, slope, _ = loss_of(rows, advantages, LossConfig(loss_type="rloo"))
    assert loss == pytest.approx(0.0, abs=1e-12)
    want = [[-1 / 3, -1 / 3, 0], [1 / 6, 0, 0], [1 / 6] * 3]
    torch.testing.assert_close(slope, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=0)
    # off-policy with the ratio of the whole sequence, e^.1 e^.05
    old = [[-0.6, -1.05], [-2.0], [-0.1, -0.2, -0.3]]
    loss, slope, _ = loss_of(rows, advantages, LossConfig(loss_type="rloo"), old)
    assert loss == pytest.approx(-(math.exp(0.15) - 1) / 3, rel=1e-9)
    assert slope[0, 0].item() == pytest.approx(-math.exp(0.15) / 3, rel=1e-9)


def test_vespo_on_policy_is_reinforce():
    """w = 1: phi = 1 on both sides; with w = e^.6 and A > 0 it is w^2 e^(3 (1 - w))."""
    config = LossConfig(loss_type="vespo")
    loss, slope, _ = loss_of([[-0.5, -1.0], [-2.0, -0.3]], [0.8, -0.4], config)
    assert slope.tolist() == [pytest.approx([-0.2, -0.2]), pytest.approx([0.1, 0.1])]
    assert loss == pytest.approx((0.8 * 1.5 - 0.4 * 2.3) / 4, rel=1e-12)
    _, slope, _ = loss_of([LOGP], [0.6], config, [OLD])
    phi = math.exp(1.2 + 3 * (1 - math.exp(0.6)))
    assert slope[0].tolist() == pytest.approx([-0.6 * phi / 4] * 4, rel=1e-9)


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_dppo_masks():
    """Total variation: .5 -> .72 (gap .22) is stopped at .2 upwards alone, .5 -> .28 downwards
    alone; a rare token whose ratio is 5 but whose gap is .04 goes on."""
    config = LossConfig(loss_type="dppo_tv", epsilon=0.2)
    old = [log(0.5, 0.5, 0.01)]
    for advantage, kept in ((1.0, (False, True, True)), (-1.0, (True, False, True))):
        _, slope, _ = loss_of([log(0.72, 0.28, 0.05)], [advantage], config, old)
        want = [-advantage * r / 3 * k for r, k in zip((1.44, 0.56, 5.0), kept, strict=True)]
        assert slope[0].tolist() == pytest.approx(want, rel=1e-9, abs=1e-15)
    # KL(old || new) of .5 -> .72 is .5 log(.5/.72) + .5 log(.5/.28) = .1076
    for bound, kept in ((0.1075, False), (0.1077, True)):
        config = LossConfig(loss_type="dppo_kl", epsilon=1.0, epsilon_high=bound)
        _, slope, _ = loss_of([log(0.72)], [1.0], config, [log(0.5)])
        assert slope.item() == pytest.approx(-1.44 * kept, rel=1e-9, abs=1e-15)


def test_dual_clip():
    """PPO with A < 0 and a ratio of 5: the loss stops at 3 |A|, and so does the gradient; with A >
    0 it stops at 1.2 A long before."""
    config = LossConfig(loss_type="ppo")
    rows, old = [log(0.5)], [log(0.1)]
    loss, slope, _ = loss_of(rows, [-0.7], config, old)
    assert loss == pytest.approx(2.1, rel=1e-12) and slope.item() == 0.0
    loss, slope, _ = loss_of(rows, [-0.7], LossConfig(loss_type="ppo", delta=6.0), old)
    assert loss == pytest.approx(3.5, rel=1e-12) and slope.item() == pytest.approx(3.5, rel=1e-9)
    assert loss_of(rows, [0.7], config, old)[0] == pytest.approx(-0.84, rel=1e-12)


def test_reward_weighted():
    """sum_i w_i log pi(sequence i): every token of sequence i moves by w_i."""
    weights = [0.7, 0.2, 0.1]
    rows = [[-0.5, -1.0], [-2.0], [-0.1, -0.2, -0.3]]
    config = LossConfig(loss_type="reward_weighted")
    loss, slope, _ = loss_of(rows, weights, config, denominator=1.0)
    assert loss == pytest.approx(0.7 * 1.5 + 0.2 * 2.0 + 0.1 * 0.6, rel=1e-12)
    want = torch.tensor([[-0.7, -0.7, 0], [-0.2, 0, 0], [-0.1] * 3], dtype=torch.float64)
    torch.testing.assert_close(slope, want, rtol=1e-9, atol=0)


def test_sapo_gate_on_policy():
    """The gate's slope at ratio 1 is 4 / tau * tau / 4 = 1: the first step is REINFORCE's."""
    _, slope, _ = loss_of([[-0.5], [-1.0]], [0.8, -0.4], LossConfig(loss_type="sapo"))
    assert slope[:, 0].tolist() == pytest.approx([-0.4, 0.2], rel=1e-9)


def test_k3_and_its_neighbours():
    """Schulman's estimators at logp - ref = log 2: log 2, (log 2)^2 / 2, 1/2 - 1 + log 2."""
    logp, ref = torch.tensor(math.log(0.6)).double(), torch.tensor(math.log(0.3)).double()
    x = math.log(2)
    want = {"k1": (x, 1.0), "k2": (x * x / 2, x), "k3": (x - 0.5, 0.5), "absolute": (x, 1.0)}
    for name, numbers in want.items():
        got = getattr(objectives, name)(logp, ref)
        assert [g.item() for g in got] == pytest.approx(list(numbers), rel=1e-6), name
