"""No reward reaches into the run: copies, contained state, exits, forks, output, notices."""

from __future__ import annotations

import asyncio
import logging
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

from grpo_fast.rewards import (
    RewardSet,
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
    random.seed(123)
    np.random.seed(123)
    torch.manual_seed(123)
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
        assert "with 3 completions; it is at" in mine[0] and "test_reward_containment.py" in mine[0]
        assert "stopped after 60 s" in mine[0]
