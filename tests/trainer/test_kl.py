"""Controllers and the stop: trajectories by hand, and a run whose steps are dropped."""

from __future__ import annotations

import math

import pytest

from grpo_fast.trainer.kl import (
    DoublingKL,
    FixedKL,
    KLStop,
    ZieglerKL,
    check_controller,
    make_controller,
)


def test_ziegler_by_hand():
    """Twice the target adds 20 % * n / horizon, half of it takes as much, the target nothing."""
    kl = ZieglerKL(0.2, target=6.0, horizon=10000)
    kl.update(12.0, 1000)
    assert kl.coefficient == pytest.approx(0.2 * 1.02, rel=1e-15)
    kl.update(3.0, 500)
    assert kl.coefficient == pytest.approx(0.2 * 1.02 * 0.99, rel=1e-15)
    kl.update(6.0, 10000)
    assert kl.coefficient == pytest.approx(0.2 * 1.02 * 0.99, rel=1e-15)
    # inside the clip: a tenth above the target
    kl.update(6.6, 10000)
    assert kl.coefficient == pytest.approx(0.2 * 1.02 * 0.99 * 1.1, rel=1e-12)
    kl.update(-3.0, 10000)
    kl.update(math.nan, 10000)
    assert kl.coefficient == pytest.approx(0.2 * 1.02 * 0.99 * 1.1 * 0.8, rel=1e-12)


def test_doubling_by_hand():
    kl = DoublingKL(1.0, target=0.3)
    seen = []
    for value in (0.46, 0.44, 0.3, 0.21, 0.19, 0.1, math.nan, 9.0):
        kl.update(value, 1)
        seen.append(kl.coefficient)
    # between 0.2 and 0.45 nothing happens
    assert seen == [2.0, 2.0, 2.0, 2.0, 1.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("kind", ["fixed", "ziegler", "doubling"])
def test_state_comes_back(kind):
    target, horizon = (None if kind == "fixed" else 1.0), (5.0 if kind == "ziegler" else None)
    one, other = (make_controller(kind, 0.3, target, horizon) for _ in range(2))
    one.update(7.0, 2)
    other.load_state_dict(one.state_dict())
    assert other.coefficient == one.coefficient
    assert (one.coefficient == 0.3) == (kind == "fixed")
    other.reset()
    assert other.coefficient == 0.3


def test_fixed_stays():
    kl = FixedKL(0.05)
    kl.update(1e9, 10**6)
    assert kl.coefficient == 0.05


def test_stop_by_hand():
    stop = KLStop(0.1)
    assert not stop.judge(0.15) and stop.judge(0.151)
    # the rest of the window is dropped whatever its KL is
    assert stop.judge(0.0) and stop.skipped == 2
    other = KLStop(0.1)
    other.load_state_dict(stop.state_dict())
    assert other.stopped and other.skipped == 2
    other.new_window()
    assert not other.judge(0.0) and not other.judge(math.nan) and other.skipped == 2


@pytest.mark.parametrize(
    "options, named",
    [
        (("zigler", 1.0, None, 0.1), "kl_controller"),
        (("fixed", 1.0, None, 0.1), "kl_target"),
        (("ziegler", None, None, 0.1), "kl_target"),
        (("doubling", 0.0, None, 0.1), "kl_target"),
        (("doubling", 1.0, 10.0, 0.1), "kl_horizon"),
        (("ziegler", 1.0, -1.0, 0.1), "kl_horizon"),
        (("ziegler", 1.0, None, 0.0), "kl_controller"),
    ],
)
def test_options_without_use_are_named(options, named):
    kind, target, horizon, value = options
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        check_controller(kind, target, horizon, "beta", value)
