"""The protocol of rewards: limits, what they log, routes, rewards per token, normalisation."""

from __future__ import annotations

import logging
import math
import time

import numpy as np
import pytest
import torch

from grpo_fast.advantages import (
    decoupled_advantages,
    group_advantages,
    normalized_within_groups,
)
from grpo_fast.rewards import RewardSet, load_reward

PROMPTS = ["1 + 1 =", "2 + 2 =", "3 + 3 ="]
COMPLETIONS = [" 2", " four", ""]
IDS = [[5, 1], [7, 8, 1], []]


def score(rewards, columns=None, **keywords):
    return rewards.score(PROMPTS, COMPLETIONS, IDS, columns or {}, **keywords)


def ones(completions, **_):
    return [1.0] * len(completions)


@pytest.mark.parametrize("timeout", [0, -1, "60", True, math.nan])
def test_a_limit_is_seconds(timeout):
    with pytest.raises(ValueError, match="reward_timeout: expected seconds > 0 or None"):
        RewardSet(ones, timeout=timeout)


def logs(values, name="parsed"):
    def function(completions, log_extra, **_):
        log_extra(name, values)
        return [1.0] * len(completions)

    return function


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([1, "a", None], ["1", "a", None]),
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([True, False, None], [True, False, None]),
        ([True, 1, 2], ["True", "1", "2"]),
        ([np.float32(1.5), torch.tensor(2), 3], [1.5, 2.0, 3.0]),
        ([[1], {"a": 1}, None], ["[1]", "{'a': 1}", None]),
        ([2**70, 1, 2], [str(2**70), "1", "2"]),
        (np.arange(3), [0, 1, 2]),
        (("a", "\ud800", "b"), ["a", "?", "b"]),
    ],
)
def test_extras_become_storable(values, stored, tmp_path):
    from grpo_fast.rewards import notes

    extras = {}
    score(RewardSet(logs(values)), log_extra=extras.__setitem__)
    if stored[1] == "?":
        extras["parsed"] = [notes._text(value) for value in extras["parsed"]]
    assert extras == {"parsed": stored}
    import pyarrow

    assert pyarrow.table(extras).num_rows == 3


@pytest.mark.parametrize("values", [["only one"], 3, None, "abc", iter("abc")])
def test_extras_that_do_not_fit_are_left_out_and_said(values, caplog):
    extras = {}
    rewards = RewardSet(logs(values))
    with caplog.at_level(logging.WARNING):
        score(rewards, log_extra=extras.__setitem__)
        score(rewards, log_extra=extras.__setitem__)
    assert extras == {} and len(caplog.records) == 1
    assert "'function': log_extra('parsed') expected 3 values" in caplog.text


def test_columns_of_the_table_cannot_be_taken():
    extras = {}
    functions = [logs(["a"] * 3, "completion"), logs(["b"] * 3, "parsed"), logs(["c"] * 3)]
    score(RewardSet(functions), log_extra=extras.__setitem__)
    assert set(extras) == {"function/completion", "parsed", "function_3/parsed"}


@pytest.mark.parametrize("name", ["reward", "loss", "kl", "rewards/x/mean", "eval_reward", "epoch"])
def test_metrics_cannot_take_the_trainers_names(name, caplog):
    def shadows(completions, log_metric, **_):
        log_metric(name, 100.0)
        log_metric("own", 1)
        log_metric("text", "abc")
        return [1.0] * len(completions)

    metrics = []
    with caplog.at_level(logging.WARNING):
        score(RewardSet(shadows), log_metric=lambda *pair: metrics.append(pair))
    assert metrics == [(f"shadows/{name}", 100.0), ("own", 1.0)]
    assert f"'shadows': log_metric({name!r}) is a name of the trainer's" in caplog.text
    assert "log_metric('text') expected a number, got str" in caplog.text


def test_routes_choose_the_functions_of_a_row():
    seen = {}

    def short(prompts, completions, rewards, log_extra, **_):
        seen["short"] = prompts
        log_extra("n", list(range(len(prompts))))
        return [1.0] * len(prompts)

    async def long(prompts, **_):
        seen["long"] = prompts
        return [2.0] * len(prompts)

    extras = {}
    exact = load_reward("rule:exact")
    columns = {"rewards": ["short", ["long", "rule:exact"], None], "answer": ["2", "four", "6"]}
    scored = score(RewardSet([short, long, exact]), columns, log_extra=extras.__setitem__)
    expected = [[1, math.nan, math.nan], [math.nan, 2, 1], [1, 2, 0]]
    torch.testing.assert_close(scored, torch.tensor(expected), equal_nan=True, check_dtype=False)
    assert seen == {"short": [PROMPTS[0], PROMPTS[2]], "long": PROMPTS[1:]}
    assert extras == {"n": [0, None, 1]}


def test_a_function_without_a_row_is_not_called():
    def never(completions, **_):
        raise AssertionError

    scored = score(RewardSet([ones, never]), {"rewards": ["ones"] * 3})
    assert scored[:, 0].tolist() == [1.0] * 3 and scored[:, 1].isnan().all()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([["oness"], None, None], "row 0: no reward function is called 'oness'; did you mean"),
        ([None, None, 0.5], "row 2: expected names of reward functions .* got 0.5; rename"),
    ],
)
def test_bad_routes_are_refused_before_any_work(cells, message):
    rewards = RewardSet([ones])
    with pytest.raises(ValueError, match=message):
        rewards.check_routes(cells)
    with pytest.raises(ValueError, match=message):
        score(rewards, {"rewards": cells})


def test_rewards_for_each_token():
    def dense(completions, completion_ids, **_):
        return [[0.25 * (t + 1) for t in range(len(ids))] for ids in completion_ids]

    def sparse(completions, **_):
        return [1.0, None, 3.0]

    rewards = RewardSet([dense, sparse], weights=[2.0, 0.5])
    scored, shaped = rewards.score_tokens(PROMPTS, COMPLETIONS, IDS, {})
    expected = torch.tensor([[0.75, 1.0], [1.5, math.nan], [math.nan, math.nan]])
    torch.testing.assert_close(scored, expected, equal_nan=True)
    assert [row.tolist() for row in shaped] == [[0.5, 1.5], [0.5, 1.0, 1.5], []]
    with pytest.raises(ValueError, match="completion 0: expected a number or None; a reward for"):
        score(rewards)
    with pytest.raises(ValueError, match="returned 1 numbers for completion 0: expected 2"):
        RewardSet(lambda **_: [[1.0], 0.0, 0.0]).score_tokens(PROMPTS, COMPLETIONS, IDS, {})


def test_normalisation_of_each_reward_within_its_group():
    """Two groups of two, rewards on scales of 1 and 10; sample std, by hand."""
    rewards = torch.tensor(
        [[1.0, 10.0], [0.0, 0.0], [1.0, 5.0], [1.0, 5.0], [0.0, 0.0], [math.nan, 8.0]]
    ).double()
    scaled = normalized_within_groups(rewards, 2, eps=0.0)
    half = 0.5**0.5
    expected = torch.tensor(
        [[half, half], [-half, -half], [0, 0], [0, 0], [0, -half], [math.nan, half]]
    ).double()
    torch.testing.assert_close(scaled, expected, equal_nan=True)
    weights = torch.tensor([1.0, 0.5]).double()
    total = torch.tensor([1.5, -1.5, 0.0, 0.0, -0.5, 0.5]).double() * half
    advantages = decoupled_advantages(rewards, weights, 2)
    # eps 1e-4 in each of the two divisions
    torch.testing.assert_close(advantages, total / total.std(), rtol=5e-4, atol=0)
    assert advantages[2:4].tolist() == [0.0, 0.0]


def test_gdpo_tells_apart_what_a_sum_merges():
    """(1, 0) and (0, 1) have one sum; with a third completion their advantages differ."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    merged = group_advantages(rewards.sum(1)[None])[0]
    apart = decoupled_advantages(rewards, torch.ones(2), 4)
    assert merged[0] == merged[1] and apart[1] > apart[0] > apart[2]


def test_bad_shapes_of_groups():
    with pytest.raises(ValueError, match="B a multiple of 2"):
        normalized_within_groups(torch.zeros(3, 2), 2)
    with pytest.raises(ValueError, match="finite"):
        normalized_within_groups(torch.full((2, 1), math.inf), 2)


def test_a_window_of_long_completions_is_copied_in_milliseconds():
    ids = [list(range(16_384)) for _ in range(64)]
    rewards = RewardSet(ones)
    took = time.process_time()
    rewards.score(["p"] * 64, ["c"] * 64, ids, {})
    assert time.process_time() - took < 0.5


def test_a_limit_of_tokens_is_given_to_functions_that_name_it():
    seen = {}

    def named(completions, max_completion_length):
        seen["named"] = max_completion_length
        return [0.0] * len(completions)

    def variadic(completions, **keywords):
        seen["variadic"] = "max_completion_length" in keywords
        return [0.0] * len(completions)

    score(RewardSet([named, variadic], max_completion_length=7))
    assert seen == {"named": 7, "variadic": False}
    with pytest.raises(ValueError, match="'named' needs 'max_completion_length'"):
        score(RewardSet(named))
