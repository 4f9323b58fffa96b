"""The protocol of rewards: copies, contained state, notices, routes, rewards per token, GDPO."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import signal
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo_fast.advantages import group_advantages
from grpo_fast.rewards import (
    RewardSet,
    decoupled_advantages,
    load_reward,
    normalized_within_groups,
)

PROMPTS = ["1 + 1 =", "2 + 2 =", "3 + 3 ="]
COMPLETIONS = [" 2", " four", ""]
IDS = [[5, 1], [7, 8, 1], []]


def score(rewards, columns=None, **keywords):
    return rewards.score(PROMPTS, COMPLETIONS, IDS, columns or {}, **keywords)


def ones(completions, **_):
    return [1.0] * len(completions)


def edits(prompts, completions, completion_ids, answer, trainer_state, **_):
    for ids in completion_ids:
        ids[:] = [9]
    completion_ids.clear()
    prompts[0][0]["content"] = "edited"
    completions[0][0]["content"] = "edited"
    answer[0]["value"].append(9)
    trainer_state.global_step = 99
    trainer_state.log_history[0]["loss"] = 99.0
    return [0.0] * 2


async def edits_later(**keywords):
    await asyncio.sleep(0)
    return edits(**keywords)


@pytest.mark.parametrize("first", [edits, edits_later])
def test_no_reward_edits_what_is_trained_on_or_what_the_next_one_sees(first):
    seen = {}

    def second(**keywords):
        seen.update(keywords)
        return [1.0, 2.0]

    prompts = [[{"role": "user", "content": "p"}] for _ in range(2)]
    completions = [[{"role": "assistant", "content": "c"}] for _ in range(2)]
    ids, answers = [[5, 1], [7]], [{"value": [1]}, {"value": [2]}]
    state = SimpleNamespace(global_step=3, log_history=[{"loss": 1.0}])
    rewards = RewardSet([first, second])
    rewards.score(prompts, completions, ids, {"answer": answers}, trainer_state=state)
    for given in (
        (prompts, completions, ids, answers, state.log_history),
        (seen["prompts"], seen["completions"], seen["completion_ids"], seen["answer"]),
    ):
        assert given[0][0][0]["content"] == "p" and given[1][0][0]["content"] == "c"
        assert given[2] == [[5, 1], [7]] and given[3] == [{"value": [1]}, {"value": [2]}]
    assert state.global_step == 3 and state.log_history == [{"loss": 1.0}]
    assert seen["trainer_state"].global_step == 3


def test_columns_that_are_arrays_tensors_and_clients():
    lock, kept = threading.Lock(), np.zeros(3)
    tensors = [torch.zeros(2) for _ in range(3)]

    def edit(completions, array, tensor, client):
        tensor[0].fill_(1.0)
        assert client[0] is lock
        array[0] = 5.0
        return [0.0] * 3

    score(RewardSet(edit), {"array": kept, "tensor": tensors, "client": [lock] * 3})
    assert kept.tolist() == [0.0, 0.0, 0.0] and tensors[0].tolist() == [0.0, 0.0]


def test_a_list_that_the_function_keeps_cannot_change_its_rewards():
    kept = [1.0, 2.0, 3.0]

    def first(completions):
        return kept

    def second(completions):
        kept[:] = [9.0] * 3
        return [0.0] * 3

    assert score(RewardSet([first, second]))[:, 0].tolist() == [1.0, 2.0, 3.0]


def disturbs(completions, **_):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    np.seterr(all="raise")
    os.chdir("/")
    sys.setrecursionlimit(12_345)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(1)
    return [1.0] * len(completions)


def state_of_the_process():
    return (
        random.getstate(),
        str(np.random.get_state()),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        np.geterr(),
        os.getcwd(),
        sys.getrecursionlimit(),
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        signal.getitimer(signal.ITIMER_REAL),
        sys.stdout,
        sys.stderr,
    )


async def disturbs_later(completions, **_):
    await asyncio.sleep(0)
    return disturbs(completions)


def disturbs_and_raises(completions, **_):
    disturbs(completions)
    raise KeyError("after it")


@pytest.mark.parametrize("function", [disturbs, disturbs_later, disturbs_and_raises])
def test_what_a_reward_sets_is_undone(function):
    before = state_of_the_process()
    if function is disturbs_and_raises:
        with pytest.raises(ValueError, match="raised KeyError"):
            score(RewardSet(function))
    else:
        score(RewardSet(function))
    assert state_of_the_process() == before


def test_every_reward_draws_the_same_whatever_the_others_draw():
    drawn = []

    def draws(completions):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return [1.0] * 3

    score(RewardSet([draws, disturbs, draws]))
    assert drawn[0] == drawn[1]


def test_a_fork_that_returns_does_not_go_on_with_the_run(tmp_path):
    def forks(completions, **_):
        os.fork()
        return [1.0] * len(completions)

    async def forks_later(completions, **_):
        os.fork()
        return [2.0] * len(completions)

    assert score(RewardSet([forks, forks_later])).tolist() == [[1.0, 2.0]] * 3
    (tmp_path / str(os.getpid())).touch()
    time.sleep(0.1)
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_ctrl_c_stays_what_it_is():
    def interrupted(completions, **_):
        signal.raise_signal(signal.SIGINT)
        return [1.0]

    with pytest.raises(KeyboardInterrupt):
        score(RewardSet(interrupted))


def test_a_loop_that_a_task_ended_serves_the_next_window():
    async def leaves(completions, **_):
        async def inner():
            sys.exit(3)

        if COMPLETIONS[0] in completions:
            await asyncio.ensure_future(inner())
        return [1.0] * len(completions)

    async def patient(completions, **_):
        await asyncio.sleep(0.05)
        return [2.0] * len(completions)

    rewards = RewardSet([patient, leaves])
    with pytest.raises(ValueError, match=r"'leaves' called sys.exit\(3\)"):
        score(rewards)
    assert rewards.score(["p"], ["c"], [[1]], {}).tolist() == [[2.0, 1.0]]


def test_output_is_cut(capfd):
    def talks(completions, **_):
        print("x" * 5_000_000)
        print("more", file=sys.stderr)
        return [1.0] * len(completions)

    async def talks_later(completions, **_):
        for _ in range(100_000):
            print("yyyy")
        return [1.0] * len(completions)

    def whispers(completions, **_):
        print("short")
        return [1.0] * len(completions)

    score(RewardSet([talks, talks_later, whispers]))
    print("after")
    out = capfd.readouterr().out
    assert len(out) < 25_000 and "short" in out and "after" in out
    assert "'talks': the rest of its output is left out" in out
    assert "'talks_later': the rest of its output is left out" in out


def test_a_notice_says_which_function_where_how_long_and_for_how_many(caplog):
    def slow(completions, **_):
        time.sleep(0.5)
        return [1.0] * len(completions)

    async def slow_later(completions, **_):
        await asyncio.sleep(0.9)
        return [1.0] * len(completions)

    with caplog.at_level(logging.WARNING):
        score(RewardSet([slow, slow_later], timeout=60.0, notice=0.1))
    texts = [record.getMessage() for record in caplog.records]
    for name in ("slow", "slow_later"):
        mine = [text for text in texts if f"'{name}'" in text]
        assert len(mine) >= 2
        assert "with 3 completions; it is at" in mine[0] and "test_reward_protocol.py" in mine[0]
        assert "stopped after 60 s" in mine[0]


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
