"""Estimators of advantages and reward weights: by hand, and what holds for any rewards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast import PRESETS
from grpo_fast.advantages.group import (
    centered_advantages,
    group_advantages,
    leave_one_out_advantages,
)
from grpo_fast.advantages.reward_weights import SCHEMES, reward_weights
from grpo_fast.advantages.table import ADVANTAGES, advantages_of

NAN = float("nan")
WEIGHTINGS = [
    {"scheme": "linear"},
    {"scheme": "softmax"},
    {"scheme": "softmax", "temperature": 0.1},
    {"scheme": "rank"},
    {"scheme": "rejection"},
    {"scheme": "rejection", "keep": 3},
]


def close(got, *rows, atol=1e-6):
    torch.testing.assert_close(got, torch.tensor(rows), rtol=0, atol=atol)


def test_group_by_hand():
    rewards = torch.tensor([[1.0, 0.8, 0.4, 0.2]])
    close(group_advantages(rewards, population=True), [1.26, 0.63, -0.63, -1.26], atol=5e-3)
    half = torch.tensor([[1.0] * 4 + [0.0] * 4])
    close(group_advantages(half), [0.94] * 4 + [-0.94] * 4, atol=5e-3)
    close(centered_advantages(rewards), [0.4, 0.2, -0.2, -0.4])


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 0.8, 0.4, 0.2], [3.0, NAN, 0.0, 0.0], [1.0, 0.0, NAN, NAN]])
    close(
        leave_one_out_advantages(rewards),
        # 1 - (0.8 + 0.4 + 0.2) / 3, ...
        [1.6 / 3, 0.8 / 3, -0.8 / 3, -1.6 / 3],
        # 3 - 0, then 0 - 3/2 twice: the unscorable one is nobody's baseline
        [3.0, 0.0, -1.5, -1.5],
        [1.0, -1.0, 0.0, 0.0],
    )


@pytest.mark.parametrize(
    ("rewards", "options", "expected"),
    [
        ([1.0, 0.8, 0.4, 0.2], {"scheme": "linear"}, [2.0, 1.5, 0.5, 0.0]),
        ([5.0, -1.0, NAN, -1.0], {"scheme": "linear"}, [4.0, 0.0, 0.0, 0.0]),
        # exp(0) : exp(-log 3) = 3 : 1
        ([math.log(3), 0.0], {"scheme": "softmax"}, [1.5, 0.5]),
        ([math.log(3), 0.0, NAN], {"scheme": "softmax"}, [2.25, 0.75, 0.0]),
        ([1.0, 0.0], {"scheme": "softmax", "temperature": 1 / math.log(3)}, [1.5, 0.5]),
        ([1.0, 1.0, 0.9, 0.0], {"scheme": "softmax", "temperature": 1e-300}, [2.0, 2.0, 0.0, 0.0]),
        ([0.2, 7.0, 0.4, 0.3], {"scheme": "rank"}, [0.0, 2.0, 4 / 3, 2 / 3]),
        # ranks 0.5, 0.5, 2 of three valid ones, whose sum is 3
        ([0.0, 0.0, NAN, 9.0], {"scheme": "rank"}, [2 / 3, 2 / 3, 0.0, 8 / 3]),
        ([1.0, 0.8, 0.4, 0.2], {"scheme": "rejection"}, [4.0, 0.0, 0.0, 0.0]),
        ([1.0, 0.8, 0.4, 0.2], {"scheme": "rejection", "keep": 2}, [2.0, 2.0, 0.0, 0.0]),
        ([1.0, 1.0, 0.0, 1.0], {"scheme": "rejection"}, [4 / 3, 4 / 3, 0.0, 4 / 3]),
        # one of two places goes to the best, the other is shared
        ([2.0, 1.0, 1.0, 0.0], {"scheme": "rejection", "keep": 2}, [2.0, 1.0, 1.0, 0.0]),
        # fewer valid ones than places: all are kept
        ([2.0, NAN, 1.0, NAN], {"scheme": "rejection", "keep": 3}, [2.0, 0.0, 2.0, 0.0]),
    ],
)
def test_reward_weights_by_hand(rewards, options, expected):
    close(reward_weights(torch.tensor([rewards]), **options), expected)


def test_the_weighted_loss_is_the_mean_over_prompts():
    """sequence_sum over the number of sequences = mean over prompts of -sum w/G log pi."""
    logp = torch.tensor([[-1.0, -2.0, -4.0, -3.0], [-5.0, -1.0, -2.0, -1.0]])
    rewards = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 2.0, 2.0, NAN]])
    weights = reward_weights(rewards, "linear")
    by_hand = ((0.75 * 1 + 0.25 * 2) + (0.5 * 1 + 0.5 * 2)) / 2
    assert (-(weights * logp).sum() / logp.numel()).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_groups_that_say_nothing_are_exactly_zero(name):
    rewards = torch.tensor(
        [[0.1, 0.1, 0.1], [0.3, NAN, 0.3], [NAN, NAN, NAN], [NAN, 0.7, NAN], [0.0, 1.0, NAN]]
    )
    for options in WEIGHTINGS if name == "reward_weights" else [{}]:
        got = advantages_of(name, rewards, **options)
        assert torch.equal(got[:4], torch.zeros(4, 3)), options
        assert got[4, 1] > 0 and got[4, 2] == 0 and torch.isfinite(got).all()
        assert torch.equal(advantages_of(name, torch.ones(3, 1), **options), torch.zeros(3, 1))
        assert advantages_of(name, torch.ones(0, 4), **options).shape == (0, 4)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_dtypes(name):
    rewards = torch.tensor([[1.0, 0.5, 0.25, 0.0]])
    wide = advantages_of(name, rewards.double())
    assert wide.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        got = advantages_of(name, rewards.to(dtype))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wide, rtol=1e-6, atol=1e-7)


# sixteenths, so that sums and shifts are exact and equal rewards stay equal
REWARD = st.one_of(st.integers(-64, 64).map(lambda n: n / 16), st.just(NAN))


@st.composite
def groups(draw):
    prompts, size = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    row = st.lists(REWARD, min_size=size, max_size=size)
    rows = draw(st.lists(row, min_size=prompts, max_size=prompts))
    return torch.tensor(rows, dtype=torch.float64)


def estimates(rewards):
    """What every estimator makes of the rewards; the first four are advantages, not weights."""
    names = [("group", {}), ("group", {"scale": "batch"}), ("centered", {}), ("leave_one_out", {})]
    names += [("reward_weights", options) for options in WEIGHTINGS]
    return [advantages_of(name, rewards, **options) for name, options in names]


def same(got, expected, atol=1e-9):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@given(groups())
@settings(deadline=None)
def test_means_signs_and_the_unscorable(rewards):
    valid = ~torch.isnan(rewards)
    lowest = torch.where(valid, rewards, torch.inf).amin(1)
    told = torch.where(valid, rewards, -torch.inf).amax(1) > lowest
    got = estimates(rewards)
    for advantages in got[:4]:
        assert advantages.sum(1).abs().max() < 1e-9
    for weights in got[4:]:
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.mean(1), told.double())
    for values in got:
        assert values.shape == rewards.shape and torch.isfinite(values).all()
        assert not values[~valid].any()
        # a better reward never counts less
        higher = rewards[:, :, None] > rewards[:, None, :]
        assert (~higher | (values[:, :, None] >= values[:, None, :])).all()
        equal = rewards[:, :, None] == rewards[:, None, :]
        assert (~equal | (values[:, :, None] == values[:, None, :])).all()


@given(groups(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_does_not_matter(rewards, source):
    order = list(range(rewards.shape[1]))
    source.shuffle(order)
    same(estimates(rewards[:, order]), [values[:, order] for values in estimates(rewards)])


@given(groups(), st.integers(-32, 32), st.sampled_from([0.5, 2.0, 4.0]))
@settings(deadline=None)
def test_shifts_and_scales(rewards, shift, factor):
    plain = estimates(rewards)
    same(estimates(rewards + shift), plain)
    # centered and leave_one_out grow with the rewards; linear, rank and rejection do not
    scaled = estimates(rewards * factor)
    same(scaled[2:4], [values * factor for values in plain[2:4]])
    free = [i for i, options in enumerate(WEIGHTINGS, 4) if options["scheme"] != "softmax"]
    same([scaled[i] for i in free], [plain[i] for i in free])
    softmax = reward_weights(rewards * factor, "softmax", temperature=factor)
    same([softmax], [plain[5]])
    for scale in ("group", "batch"):
        free = group_advantages(rewards * factor, scale, eps=0.0)
        same([free], [group_advantages(rewards, scale, eps=0.0)])


@given(groups())
@settings(deadline=None)
def test_leave_one_out_is_the_mean_of_the_others(rewards):
    got = leave_one_out_advantages(rewards)
    for i, row in enumerate(rewards.tolist()):
        for j, reward in enumerate(row):
            others = [r for k, r in enumerate(row) if k != j and not math.isnan(r)]
            known = others and not math.isnan(reward)
            expected = reward - sum(others) / len(others) if known else 0.0
            assert got[i, j].item() == pytest.approx(expected, abs=1e-9)


def test_every_row_of_presets_names_an_estimator():
    assert {preset.advantage for preset in PRESETS.values()} <= {*ADVANTAGES, "given"}
    rewards = torch.tensor([[1.0, 0.8, 0.4, 0.2]])
    for name, function in ADVANTAGES.items():
        assert torch.equal(advantages_of(name, rewards), function(rewards))
    got = advantages_of("group", rewards, scale="batch", eps=0.0)
    assert torch.equal(got, group_advantages(rewards, "batch", eps=0.0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("leave_one", {}, "name: .*'leave_one'; did you mean 'leave_one_out'.* Known: group, cent"),
        ("given", {}, "name: .*got 'given'; it stands for advantages of your own"),
        ("group", {"scale": "groups"}, "scale: expected a known scale, got 'groups'; did you"),
        ("reward_weights", {"scheme": "ranks"}, "scheme: .*got 'ranks'; did you mean 'rank'"),
        (
            "reward_weights",
            {"temperature": 0.0},
            "temperature: expected a finite number > 0, got 0",
        ),
        (
            "reward_weights",
            {"temperature": NAN},
            "temperature: expected a finite number > 0, got n",
        ),
        ("reward_weights", {"scheme": "rejection", "keep": 0}, "keep: expected an integer >= 1"),
        ("reward_weights", {"scheme": "rejection", "keep": 0.5}, "keep: expected an integer >= 1"),
        (
            "reward_weights",
            {"scheme": "rank", "temperature": 2.0},
            "temperature: expected 1 with the scheme 'rank', since only",
        ),
        (
            "reward_weights",
            {"scheme": "linear", "keep": 2},
            "keep: expected 1 with the scheme 'linear', since only 'rej",
        ),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        advantages_of(name, torch.ones(1, 2), **options)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_bad_rewards_are_refused(name):
    for bad in (torch.ones(4), torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"rewards: expected floating-point tensor \(P, G\)"):
            advantages_of(name, bad)
    with pytest.raises(ValueError, match="rewards: expected finite numbers or NaN"):
        advantages_of(name, torch.tensor([[1.0, float("inf")]]))


def test_schemes_are_all_tried():
    assert {options["scheme"] for options in WEIGHTINGS} == set(SCHEMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_an_offset_of_all_rewards_changes_nothing(name, dtype):
    """32 rewards of 1e6 + {0, 1}: their fp32 sum is above 2^24, where there are no ones."""
    torch.manual_seed(0)
    small = torch.randint(2, (4, 32)).to(dtype)
    want = ADVANTAGES[name](small)
    got = ADVANTAGES[name](small + 1e6)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
