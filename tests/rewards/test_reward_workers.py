"""Rewards in processes of their own: what is lost costs its own completions, never a false zero."""

from __future__ import annotations

import inspect
import logging
import re

import pytest
import reward_faults
import reward_worker_faults as faults

from grpo_fast.rewards import RewardSet, in_worker

FILE = "reward_worker_faults.py"


def score(functions, texts, timeout=30.0):
    rewards = RewardSet(functions, timeout=timeout)
    return rewards.score(list(texts), list(texts), [[1]] * len(texts), {})


def marked_line(function):
    """Number of the line with the comment `here` in a function, or None."""
    lines, first = inspect.getsourcelines(inspect.unwrap(function))
    found = [first + index for index, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return found[0] if found else None


def names_line(message, function):
    number = marked_line(function)
    expected = rf"{FILE}, line {number}\b" if number else rf"{FILE}, line \d+"
    assert re.search(expected, message), message


def in_processes(function, texts, caplog, **options):
    with caplog.at_level(logging.WARNING):
        return score([in_worker(function, **options)], texts)[:, 0].tolist()


@pytest.mark.parametrize("function", faults.LOST, ids=lambda f: f.__name__)
def test_a_lost_worker_costs_its_own_completions_alone(function, caplog):
    """The poisoned completion is in the second of four requests; no reward becomes 0."""
    texts = ["a", "bb", faults.POISON, "cc", "dd", "ee", "ff", "gg"]
    values = in_processes(function, texts, caplog, workers=1, timeout=0.8, chunk=2)
    expected = [1.0, 2.0, None, None, 2.0, 2.0, 2.0, 2.0]
    assert [None if value != value else value for value in values] == expected
    message = next(r.getMessage() for r in caplog.records if function.__name__ in r.getMessage())
    assert "for 2 completions" in message and "without a reward" in message
    act = getattr(faults, function.__name__.replace("worker_", "do_"))
    number = marked_line(act)
    assert re.search(rf"{FILE}, line {number if number else ''}", message), message


@pytest.mark.parametrize("function", faults.FAILED, ids=lambda f: f.__name__)
def test_an_error_in_a_worker_is_the_functions(function):
    with pytest.raises(ValueError) as caught:
        score([in_worker(function, chunk=2)], ["a", faults.POISON, "c"])
    message = str(caught.value)
    assert f"reward function {function.__name__!r} " in message
    names_line(message, getattr(faults, function.__name__.replace("worker_", "do_")))


@pytest.mark.parametrize("function", faults.FINE, ids=lambda f: f.__name__)
def test_what_a_worker_survives(function, caplog, capfd):
    texts = ["a", faults.POISON, "ccc", "dd"]
    values = in_processes(function, texts, caplog, chunk=1, timeout=5.0)
    assert values == [1.0, float(len(faults.POISON)), 3.0, 2.0] and not caplog.records
    assert len(capfd.readouterr().out) < 11_000


@pytest.mark.parametrize("name", reward_faults.RETURNED)
def test_values_of_a_worker_are_checked_as_well(name):
    """As JSON they arrive as numbers, lists or texts; what is wrong stays wrong."""
    from grpo_fast.rewards.worker_child import _plain

    values, _ = reward_faults.RETURNED[name]
    if name in ("generator", "map", "object", "class", "text", "bytes", "dict"):
        assert not isinstance(_plain(values), list)
        return
    function = reward_faults.returning(_plain(values))
    with pytest.raises(ValueError, match="reward function 'fault'"):
        score([function], "abc")
