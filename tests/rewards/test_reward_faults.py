"""Rewards that raise, exit, hang, fork or return nonsense: no hang, no false zero, a clear name.

Every message names the function and the line in the user's file.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import reward_faults as faults
import torch

from grpo_fast.rewards import RewardSet

TEXTS = ["a", "bb", "ccc"]
LIMIT = 0.15
FILE = "reward_faults.py"


def good(completions, **_):
    return [float(len(text)) for text in completions]


def score(functions, texts=TEXTS, timeout=5.0, **keywords):
    rewards = RewardSet(functions, timeout=timeout)
    return rewards.score(list(texts), list(texts), [[1]] * len(texts), {}, **keywords)


def as_async(function):
    """The same fault inside a coroutine."""

    @functools.wraps(function)
    async def fault(completions, **_):
        await asyncio.sleep(0)
        return function(completions)

    return fault


def as_task(function):
    """The same fault in a task that the coroutine waits for."""

    @functools.wraps(function)
    async def fault(completions, **_):
        async def inner():
            return function(completions)

        return await asyncio.ensure_future(inner())

    return fault


KINDS = {"sync": lambda function: function, "async": as_async, "task": as_task}
PLACES = {
    "alone": lambda fault: [fault],
    "first": lambda fault: [fault, good],
    "last": lambda fault: [good, fault],
}


def fails(functions, **keywords):
    """The one sentence of the error; it comes well before a hang would be noticed."""
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:
        score(functions, **keywords)
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert len(message) < 1000 and "\n" not in message
    return message


def marked_line(function):
    """Number of the line with the comment `here` in a function, or None."""
    lines, first = inspect.getsourcelines(inspect.unwrap(function))
    found = [first + index for index, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return found[0] if found else None


def names_line(message, function):
    number = marked_line(function)
    expected = rf"{FILE}, line {number}\b" if number else rf"{FILE}, line \d+"
    assert re.search(expected, message), message


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", faults.RAISED)
def test_whatever_is_raised_is_named(name, kind, place):
    error = faults.RAISED[name]
    function = faults.raising(error)
    message = fails(PLACES[place](KINDS[kind](function)))
    assert "reward function 'fault'" in message
    if isinstance(error, SystemExit):
        assert f"called sys.exit({error.code!r})" in message
    elif not isinstance(error, StopIteration):
        assert f"raised {type(error).__name__}: " in message
    if kind == "task" and name in ("stop", "cancelled"):
        # Python makes another error of these, which rises at the line that awaits the task
        assert re.search(r"reward_faults.py, line \d+", message)
    else:
        names_line(message, function)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("name", faults.RETURNED)
def test_whatever_is_returned_is_checked(name, kind, place):
    values, text = faults.RETURNED[name]
    function = faults.returning(values)
    message = fails(PLACES[place](KINDS[kind](function)))
    assert "reward function 'fault'" in message and text in message
    names_line(message, function)


@pytest.mark.parametrize("place", ["alone", "last"])
@pytest.mark.parametrize("function", faults.HANGING, ids=lambda f: f.__name__)
def test_what_does_not_return_is_stopped(function, place):
    message = fails(PLACES[place](function), timeout=LIMIT)
    assert f"{function.__name__!r} did not return within {LIMIT:g} s" in message
    assert "for 3 completions" in message
    if function is not faults.stubborn:
        names_line(message, function)


@pytest.mark.parametrize("place", ["alone", "first"])
@pytest.mark.parametrize("function", faults.ASYNC_HANGING, ids=lambda f: f.__name__)
def test_what_does_not_return_asynchronously_is_given_up(function, place):
    message = fails(PLACES[place](function), timeout=LIMIT)
    assert f"{function.__name__!r} did not return within {LIMIT:g} s" in message
    names_line(message, function)


def test_in_another_thread_the_limit_holds_at_the_next_byte_code():
    found = []
    thread = threading.Thread(target=lambda: found.append(fails([faults.busy], timeout=LIMIT)))
    thread.start()
    thread.join(10)
    assert found and "'busy' did not return" in found[0]


def test_a_loop_in_c_ends_the_process_with_a_trace():
    """It holds the interpreter's lock, so that nothing of Python's can stop it."""
    script = (
        "from grpo_fast.rewards import RewardSet\n"
        "import reward_worker_faults\n"
        "def held(completions, **_):\n    reward_worker_faults.do_hold()\n"
        "RewardSet(held, timeout=0.2).score(['p'], ['c'], [[1]], {})\n"
    )
    path = os.pathsep.join([*filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "in held" in done.stderr


def test_nothing_was_lost_on_the_way():
    """The faults of this file, counted: raised, returned, hung."""
    raised = len(faults.RAISED) * 9
    returned = len(faults.RETURNED) * 7  # one of them in the tests of the workers
    hung = 2 * len(faults.HANGING) + 2 * len(faults.ASYNC_HANGING)
    assert raised + returned + hung >= 500
    assert torch.is_grad_enabled()
