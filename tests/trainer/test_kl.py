"""Controllers and the stop: trajectories by hand, and a run whose steps are dropped."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_trainer import Recording, config, spread_reward, trainer

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


def stopping(tmp_path, **overrides):
    """Four uses of each window of one micro-batch, with a step far too long for its KL."""
    settings = {"num_iterations": 4, "max_steps": 8, "learning_rate": 3e-2, "target_kl": 1e-3}
    return trainer(
        tmp_path,
        reward=spread_reward,
        cls=Recording,
        **{**settings, "weight_decay": 0.1} | overrides,
    )


def test_a_stopped_window_moves_no_weight(tmp_path):
    """The first step of each window has a KL of 0 and is taken, the others are dropped: every
    weight keeps its bits, and steps, schedule and tokens go on."""
    run = stopping(tmp_path)
    run.train()
    weights = [step["weights"] for step in run.steps]
    weights.append(run.model.state_dict())
    moved = [
        any(not torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(weights, weights[1:], strict=False)
    ]
    assert moved == [True, False, False, False] * 2
    assert run.state.global_step == 8 and run.lr_scheduler.last_epoch == 8
    assert run.kl_stop.skipped == 6 and len(run.windows) == 2
    logs = [log for log in run.state.log_history if "skipped_steps" in log]
    assert [log["skipped_steps"] for log in logs] == [0, 1, 2, 3, 3, 4, 5, 6]
    assert logs[0]["approx_kl"] < 1e-10 and logs[1]["approx_kl"] > 1.5e-3


def test_a_wide_target_changes_no_bit(tmp_path):
    """Measuring alone, with a target that is never reached, trains as without it."""
    runs = []
    for name, target in (("a", 1e6), ("b", None)):
        # one after the other: they share the global random state
        runs.append(stopping(tmp_path / name, target_kl=target))
        runs[-1].train()
    one, other = (run.model.state_dict() for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_resume_inside_a_stopped_window(tmp_path, step):
    """Also at a step that was dropped, the continued run ends in the same bits."""
    whole = stopping(tmp_path / "whole")
    whole.train()
    part = stopping(tmp_path / "part", save_strategy="steps", save_steps=step)
    part.train()
    again = stopping(tmp_path / "part", save_strategy="steps", save_steps=step)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{step}"))
    one, other = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert again.kl_stop.skipped == whole.kl_stop.skipped
    last = [run.state.log_history[-2]["skipped_steps"] for run in (whole, again)]
    assert last[0] == last[1]


def test_beta_follows_its_target(tmp_path):
    """doubling: the KL is far above the target, so beta doubles after every step but the first,
    in which the policy is its own reference and beta is halved."""
    run = trainer(
        tmp_path,
        reward=spread_reward,
        beta=0.1,
        kl_controller="doubling",
        kl_target=1e-4,
        max_steps=4,
    )
    run.train()
    seen = [log["kl_coef"] for log in run.state.log_history if "kl_coef" in log]
    assert seen == [0.1, 0.05, 0.1, 0.2]
    assert run.current_loss_config().beta == 0.4 and run.loss_config.beta == 0.1


@pytest.mark.parametrize(
    "options, named",
    [
        ({"target_kl": 0.1}, "target_kl"),
        ({"target_kl": -1.0, "num_iterations": 2}, "target_kl"),
        ({"target_kl_to": "reference"}, "target_kl_to"),
        ({"target_kl": 0.1, "num_iterations": 2, "target_kl_to": "reference"}, "target_kl_to"),
        ({"target_kl": 0.1, "num_iterations": 2, "target_kl_to": "referense"}, "target_kl_to"),
        ({"kl_controller": "doubling", "kl_target": 1.0}, "kl_controller"),
        ({"kl_target": 1.0}, "kl_target"),
    ],
)
def test_the_config_names_options_without_use(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        config(tmp_path, **options)
