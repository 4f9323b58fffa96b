"""The value loss: both sides of the clip by hand, verl's formula, and derivatives by autograd."""

from __future__ import annotations

import pytest
import torch

from grpo_fast.objective.value import VALUE_LOSSES, value_loss


def wide(values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(n=400):
    generator = torch.Generator().manual_seed(0)
    old, returns, move = torch.randn(3, n, generator=generator, dtype=torch.float64)
    return old + 0.3 * move, returns, old


def verl_value_loss(values, returns, old, cliprange):
    """What verl's compute_value_loss says of each token: half the larger squared error."""
    clipped = torch.clamp(values, old - cliprange, old + cliprange)
    errors = torch.stack(((values - returns) ** 2, (clipped - returns) ** 2))
    return 0.5 * errors.max(0).values, errors[1] > errors[0]


@pytest.mark.parametrize(
    "value, ret, loss, slope",
    [
        # old value 1, clip 0.2: inside the range
        (1.1, 2.0, 0.405, -0.9),
        # gone too far towards the return: the clipped error (0.8) is larger, no derivative
        (1.5, 2.0, 0.32, 0.0),
        (0.5, 0.0, 0.32, 0.0),
        # gone away from the return: the own error is larger, and pulls back
        (1.5, 0.0, 1.125, 1.5),
        (0.5, 2.0, 1.125, -1.5),
    ],
)
def test_both_sides_of_the_clip(value, ret, loss, slope):
    found = value_loss(wide([value]), wide([ret]), wide([1.0]), cliprange=0.2)
    assert found[0].item() == pytest.approx(loss, abs=1e-15)
    assert found[1].item() == pytest.approx(slope, abs=1e-15)
    assert found[2].item() == (slope == 0.0)


def test_the_half_is_in_the_loss():
    """vf_coef 0.5 on an error of 1 is a quarter."""
    loss, _, _ = value_loss(wide([0.0]), wide([1.0]), cliprange=None)
    assert 0.5 * loss.item() == 0.25


@pytest.mark.parametrize("cliprange", [0.05, 0.2, 0.5])
def test_equals_verl(cliprange):
    values, returns, old = drawn()
    loss, _, binds = value_loss(values, returns, old, cliprange=cliprange)
    expected, clipped = verl_value_loss(values, returns, old, cliprange)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    assert torch.equal(binds, clipped) and 0 < binds.sum() < len(binds)
    single = value_loss(values.float(), returns.float(), old.float(), cliprange=cliprange)[0]
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)


def test_huber_by_hand_and_by_torch():
    values, returns, _ = drawn()
    loss, slope, _ = value_loss(values, returns, kind="huber", cliprange=None, delta=0.7)
    expected = torch.nn.functional.huber_loss(values, returns, reduction="none", delta=0.7)
    torch.testing.assert_close(loss, expected)
    by_hand = value_loss(wide([3.0, 0.5]), wide([0.0, 0.0]), kind="huber", cliprange=None)
    assert by_hand[0].tolist() == [2.5, 0.125] and by_hand[1].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("kind", list(VALUE_LOSSES))
@pytest.mark.parametrize("cliprange", [None, 0.2])
def test_derivative_is_that_of_autograd(kind, cliprange):
    values, returns, old = drawn()
    leaf = values.clone().requires_grad_()

    def penalty(gap):
        if kind == "mse":
            return gap**2 / 2
        return torch.nn.functional.huber_loss(gap, torch.zeros_like(gap), reduction="none")

    loss = penalty(leaf - returns)
    if cliprange is not None:
        clipped = old + (leaf - old).clamp(-cliprange, cliprange)
        loss = torch.where(penalty(clipped - returns) > loss, penalty(clipped - returns), loss)
    loss.sum().backward()
    found = value_loss(values, returns, old, kind=kind, cliprange=cliprange)
    torch.testing.assert_close(found[0], loss.detach())
    torch.testing.assert_close(found[1], leaf.grad)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"values": torch.zeros(2, 2)}, "values"),
        ({"returns": torch.zeros(3)}, "returns"),
        ({"old_values": None}, "old_values"),
        ({"kind": "hubert"}, "kind"),
        ({"cliprange": 0.0}, "cliprange"),
        ({"delta": float("inf")}, "delta"),
    ],
)
def test_bad_input_is_named(change, named):
    call = {"values": torch.zeros(4), "returns": torch.zeros(4), "old_values": torch.zeros(4)}
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        value_loss(**{**call, **change})
