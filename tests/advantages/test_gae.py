"""GAE on packed tokens: the notes' examples, a float64 loop over time, and what must not change."""

from __future__ import annotations

import math
import random

import pytest
import torch

from grpo_fast.advantages import (
    explained_variance,
    gae,
    length_lam,
    token_kl,
    token_rewards,
    whiten,
)

F64 = torch.float64


def wide(values):
    return torch.tensor(values, dtype=F64)


def loop(rewards, values, bounds, gamma, lam, mask, bootstrap):
    """The definition: one sequence after the other, from its last kept token to its first."""
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for s in range(len(bounds) - 1):
        following, carried = bootstrap[s], 0.0
        for t in reversed(range(bounds[s], bounds[s + 1])):
            if not mask[t]:
                continue
            delta = rewards[t] + gamma * following - values[t]
            carried = delta + gamma * lam[s] * carried
            advantages[t], returns[t] = carried, carried + values[t]
            following = values[t]
    return advantages, returns


def packing(draw: random.Random):
    """Sequences of 0 to 40 tokens, some of one; rewards, values, mask, bootstraps and lambdas."""
    lengths = [draw.choice((0, 1, 1, 2, 3, 7, 8, 17, 40)) for _ in range(draw.randint(1, 7))]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    n = bounds[-1]
    share = draw.choice((0.0, 0.3, 0.9))
    return {
        "rewards": [draw.gauss(0, 1) for _ in range(n)],
        "values": [draw.gauss(0, 1) for _ in range(n)],
        "bounds": bounds,
        "gamma": draw.choice((1.0, 0.99, 0.5, 0.0)),
        "lam": [draw.choice((0.0, 0.5, 0.95, 1.0)) for _ in lengths],
        "mask": [draw.random() >= share for _ in range(n)],
        "bootstrap": [draw.choice((0.0, draw.gauss(0, 1))) for _ in lengths],
    }


@pytest.mark.parametrize("seed", range(500))
def test_equals_the_loop(seed):
    """500 packings with empty, single-token and fully masked sequences, gaps and bootstraps."""
    case = packing(random.Random(seed))
    expected = loop(**case)
    rewards, values = wide(case["rewards"]), wide(case["values"])
    mask = torch.tensor(case["mask"], dtype=torch.bool)
    rewards[~mask], values[~mask] = math.nan, math.inf
    found = gae(
        rewards,
        values,
        torch.tensor(case["bounds"]),
        gamma=case["gamma"],
        lam=wide(case["lam"]),
        mask=mask,
        bootstrap=wide(case["bootstrap"]),
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wide(want), rtol=0, atol=1e-12)


def test_one_lambda_is_that_lambda_for_every_sequence():
    rewards, values = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=F64)
    bounds = torch.tensor([0, 12, 12, 30])
    one = gae(rewards, values, bounds, lam=0.9)
    each = gae(rewards, values, bounds, lam=torch.full((3,), 0.9, dtype=F64))
    for a, b in zip(one, each, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_batch_mates_change_no_bit(per_sequence):
    """A sequence of 100 tokens alone, and at every alignment among others, long ones too."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 100, generator=generator)
    lam = torch.tensor([0.95]) if per_sequence else 0.95
    alone = gae(rewards, values, torch.tensor([0, 100]), gamma=0.99, lam=lam)
    for before in (0, 1, 3, 16, 1000):
        more = torch.randn(2, before + 500, generator=generator)
        packed = [
            torch.cat((m[:before], own, m[before:]))
            for m, own in zip(more, (rewards, values), strict=True)
        ]
        bounds = torch.tensor([0, before, before + 100, before + 600])
        lams = torch.tensor([0.5, 0.95, 1.0]) if per_sequence else 0.95
        for longest in (None, 1000, 10**6):
            found = gae(*packed, bounds, gamma=0.99, lam=lams, longest=longest)
            for got, want in zip(found, alone, strict=True):
                assert torch.equal(got[before : before + 100], want)


def test_gaps_do_not_decay():
    """What a tool wrote in the middle changes nothing for the tokens around it."""
    rewards, values = wide([0.0, 0.1, 1.0]), wide([0.2, 0.3, 0.4])
    plain = gae(rewards, values, torch.tensor([0, 3]), gamma=0.9, lam=0.8)
    spaced = wide([0.0, math.nan, math.nan, 0.1, math.nan, 1.0])
    mask = torch.tensor([True, False, False, True, False, True])
    found = gae(
        spaced, wide([0.2, 9, 9, 0.3, 9, 0.4]), torch.tensor([0, 6]), gamma=0.9, lam=0.8, mask=mask
    )
    for got, want in zip(found, plain, strict=True):
        assert torch.equal(got[mask], want)
        assert not got[~mask].any()


@pytest.mark.parametrize(
    "gamma, lam, advantages, returns",
    [
        (0.99, 0.95, [0.2351, 0.2], [0.4851, 0.5]),
        (1.0, 0.95, [0.24, 0.2], [0.49, 0.5]),
        (1.0, 1.0, [0.25, 0.2], [0.5, 0.5]),
    ],
)
def test_the_two_token_example(gamma, lam, advantages, returns):
    """r_T = 0.5, V(s_T) = 0.3, V(s_T-1) = 0.25, nothing after T."""
    found = gae(wide([0, 0.5]), wide([0.25, 0.3]), torch.tensor([0, 2]), gamma=gamma, lam=lam)
    torch.testing.assert_close(found[0], wide(advantages), rtol=0, atol=1e-15)
    torch.testing.assert_close(found[1], wide(returns), rtol=0, atol=1e-15)


def test_td_error_is_lambda_zero():
    advantages, _ = gae(
        wide([0, 0.5]), wide([0.25, 0.3]), torch.tensor([0, 2]), gamma=0.99, lam=0.0
    )
    torch.testing.assert_close(advantages, wide([0.047, 0.2]), rtol=0, atol=1e-15)


def test_the_reward_with_kl_example():
    """Reward model 0.8, KL 0.05 nats over the sequence, beta 6: 0.5 in all."""
    kl = wide([0.02, 0.0, 0.03])
    rewards = token_rewards(wide([0.8]), torch.tensor([0, 3]), kl=kl, kl_coef=6.0)
    assert rewards.tolist() == pytest.approx([-0.12, 0.0, 0.8 - 0.18], abs=1e-15)
    assert rewards.sum().item() == pytest.approx(0.5, abs=1e-15)


def test_terminal_reward_is_on_the_last_kept_token():
    """Four sequences: plain, empty, one with a gap at its end, one without a kept token."""
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    rewards = token_rewards(
        wide([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([0, 2, 2, 5, 7]),
        shaped=wide([0.1, 0.2, 0.3, 0.4, math.nan, math.nan, 0.7]),
        mask=mask,
    )
    torch.testing.assert_close(rewards, wide([0.1, 1.2, 0.3, 3.4, 0, 0, 0]))
    plain = token_rewards(wide([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2, 3]))
    assert plain.tolist() == [0.0, 1.0, 3.0]


def test_token_kl_by_hand():
    logp, ref = wide([-1.0, -2.0, -3.0]), wide([-1.5, -1.0, -33.0])
    assert token_kl(logp, ref).tolist() == [0.5, -1.0, 30.0]
    expected = [math.exp(-0.5) - 1 + 0.5, math.e - 2, math.exp(-30) - 1 + 30]
    assert token_kl(logp, ref, "k3").tolist() == pytest.approx(expected, rel=1e-15)
    far = token_kl(wide([-100.0]), wide([-0.1]), "k3").item()
    assert far == pytest.approx(math.exp(20) * (1 + 79.9) - 100.9, rel=1e-12)


def test_length_lam():
    mask = torch.tensor([True] * 40 + [False] * 10 + [True])
    found = length_lam(torch.tensor([0, 50, 50, 51]), 0.05, mask)
    assert found.tolist() == pytest.approx([0.5, 0.0, 0.0])


def test_whitening_spans_parts_and_masks():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(50, generator=generator, dtype=F64) * 3 + 1e3
    mask = torch.rand(50, generator=generator) > 0.3
    kept = values[mask]
    expected = (kept - kept.mean()) * torch.rsqrt(kept.var() + 1e-8)
    holed = torch.where(mask, values, torch.full_like(values, math.nan))
    parts = whiten([holed[:20], holed[20:20], holed[20:]], [mask[:20], mask[20:20], mask[20:]])
    whole = torch.cat(parts)
    torch.testing.assert_close(whole[mask], expected, rtol=1e-12, atol=1e-12)
    assert not whole[~mask].any()


def test_whitening_over_ranks_equals_one():
    """Two ranks, one of them without a token: each adds its sums, and both get the same moments."""
    values = [torch.randn(30, dtype=F64, generator=torch.Generator().manual_seed(3)), wide([])]
    values.append(values[0][:7] + 2)
    alone = whiten(values)
    shares, found = [[values[0]], values[1:]], []
    # the sums that each rank brings to its n-th reduction
    brought: list[list] = [[], []]
    for round_ in range(3):
        for rank, share in enumerate(shares):
            known = iter(zip(*brought, strict=False))
            own: list = []

            def total(value, known=known, own=own):
                own.append(value)
                pair = next(known, None)
                return value if pair is None else pair[0] + pair[1]

            result = whiten(share, total=total)
            if round_ == 2:
                found.extend(result)
            else:
                brought[rank] = own
    for got, want in zip(found, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("values, expected", [([], []), ([3.0], [0.0]), ([2.0, 2.0], [0.0, 0.0])])
def test_whitening_of_nothing_one_and_equal_ones(values, expected):
    assert whiten([wide(values)])[0].tolist() == expected


def test_explained_variance_is_global():
    """Two parts, each constant: the mean of their own variances would be 0."""
    returns = [wide([0.0, 0.0]), wide([1.0, 1.0, 7.0])]
    masks = [None, torch.tensor([True, True, False])]
    values = [wide([0.25, 0.25]), wide([0.75, 0.75, math.nan])]
    share, variance = explained_variance(returns, values, masks)
    assert share.item() == pytest.approx(0.75) and variance.item() == pytest.approx(0.25)
    assert explained_variance([wide([1.0])], [wide([0.0])])[0].isnan()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rewards": torch.zeros(2, 2)}, "rewards"),
        ({"values": torch.zeros(3)}, "values"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens"),
        ({"cu_seqlens": None}, "cu_seqlens"),
        ({"gamma": 1.5}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"lam": torch.ones(4)}, "lam"),
        ({"mask": torch.ones(4)}, "mask"),
        ({"bootstrap": torch.ones(1)}, "bootstrap"),
    ],
)
def test_bad_input_is_named(change, named):
    call = {
        "rewards": torch.zeros(4),
        "values": torch.zeros(4),
        "cu_seqlens": torch.tensor([0, 1, 4]),
    }
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        gae(**{**call, **change})
