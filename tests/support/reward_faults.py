"""Reward functions that do what no reward should, for the tests of the protocol.

Nothing heavy is imported: worker processes import this file too. The line that an error has to name
ends with the comment `here`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import queue
import re
import select
import socket
import subprocess
import sys
import threading
import time

POISON = "poison"


class Odd(BaseException):
    """Neither an Exception nor an exit."""


class Mute(Exception):
    """One that cannot be shown."""

    def __str__(self):
        raise RuntimeError("no text")


class Unfloat:
    """A number that is none."""

    def __float__(self):
        raise KeyError("unfloat")

    def __repr__(self):
        raise KeyError("unrepr")


RAISED = {
    "value": ValueError("bad value"),
    "key": KeyError("gone"),
    "zero": ZeroDivisionError("division"),
    "runtime": RuntimeError("broken"),
    "os": OSError(28, "No space left on device"),
    "memory": MemoryError(),
    "recursion": RecursionError("too deep"),
    "stop": StopIteration(3),
    "assertion": AssertionError(),
    "generator": GeneratorExit(),
    "cancelled": asyncio.CancelledError(),
    "timeout": TimeoutError("slow"),
    "future": concurrent.futures.TimeoutError(),
    "broken_pool": concurrent.futures.BrokenExecutor("pool"),
    "unicode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    "json": json.JSONDecodeError("bad", "doc", 0),
    "called": subprocess.CalledProcessError(2, "grader"),
    "odd": Odd("odd"),
    "mute": Mute(),
    "long": ValueError("x" * 1_000_000),
    "lines": ValueError("two\nlines\x1b[31m"),
    "warning": UserWarning("careful"),
    "import": ModuleNotFoundError("no module named grader"),
    "attribute": AttributeError("score"),
    "lookup": IndexError("list index out of range"),
    "exit_0": SystemExit(0),
    "exit_1": SystemExit(1),
    "exit_none": SystemExit(None),
    "exit_text": SystemExit("done"),
}


def raising(error):
    """A function that raises this error."""

    def fault(completions, **_):
        raise error  # here

    return fault


# what a function returns for three completions, and a part of the message
RETURNED = {
    "nan": ([0.0, float("nan"), 1.0], "finite"),
    "inf": ([float("inf"), 0.0, 1.0], "finite"),
    "minus_inf": ([0.0, 0.0, float("-inf")], "finite"),
    "huge": ([0.0, 1e39, 0.0], "finite"),
    "huge_int": ([0.0, 10**5000, 0.0], "finite"),
    "none": (None, "list of 3"),
    "number": (1.0, "list of 3"),
    "true": (True, "list of 3"),
    "text": ("abc", "list of 3"),
    "bytes": (b"abc", "list of 3"),
    "dict": ({0: 1.0, 1: 1.0, 2: 1.0}, "list of 3"),
    "generator": ((x for x in (1.0, 2.0, 3.0)), "list of 3"),
    "map": (map(float, "123"), "list of 3"),
    "object": (object(), "list of 3"),
    "class": (int, "list of 3"),
    "short": ([1.0, 2.0], "3 rewards"),
    "long": ([1.0] * 4, "3 rewards"),
    "empty": ([], "3 rewards"),
    "one": ([1.0], "3 rewards"),
    "wrapped": ([[1.0, 2.0, 3.0]], "3 rewards"),
    "string": ([0.0, "1.0", 0.0], "a number"),
    "empty_string": ([0.0, "", 0.0], "a number"),
    "byte": ([0.0, b"1", 0.0], "a number"),
    "complex": ([0.0, 1j, 0.0], "a number"),
    "list": ([0.0, [1.0], 0.0], "each token"),
    "tuple": ([(0.0, 1.0), 0.0, 0.0], "each token"),
    "inner_dict": ([0.0, {}, 0.0], "a number"),
    "function": ([0.0, len, 0.0], "a number"),
    "pair": ([0.0, 0.0, ("right", 1.0)], "each token"),
    "exception": ([0.0, ValueError("x"), 0.0], "a number"),
    "inner_object": ([0.0, object(), 0.0], "a number"),
    "long_text": ([0.0, "x" * 1_000_000, 0.0], "a number"),
}


def returning(values):
    """A function that returns these values."""

    def fault(completions, **_):
        return values

    return fault


# functions that do not return


def busy(completions, **_):
    while True:
        completions = list(completions)


def sleeping(completions, **_):
    time.sleep(1e6)  # here


def swallowing(completions, **_):
    while True:
        try:
            time.sleep(1e6)  # here
        except Exception:
            continue


def stubborn(completions, **_):
    try:
        time.sleep(1e6)
    finally:
        time.sleep(1e6)


def locked(completions, **_):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # here


def waiting(completions, **_):
    threading.Event().wait()


def queued(completions, **_):
    queue.Queue().get()


def selecting(completions, **_):
    select.select([], [], [])  # here


def reading(completions, **_):
    os.read(os.pipe()[0], 1)  # here


def accepting(completions, **_):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.accept()


def backtracking(completions, **_):
    re.match(r"^(\s*\w+\s*)+$", "a " * 40 + "!")


def child(completions, **_):
    subprocess.run([sys.executable, "-I", "-S", "-c", "import time; time.sleep(20)"], check=True)


def joining(completions, **_):
    thread = threading.Thread(target=time.sleep, args=(20,), daemon=True)
    thread.start()
    thread.join()


HANGING = (
    *(busy, sleeping, swallowing, stubborn, locked, waiting, queued, selecting, reading),
    *(accepting, backtracking, child, joining),
)


async def async_sleeping(completions, **_):
    await asyncio.sleep(1e6)  # here


async def async_future(completions, **_):
    await asyncio.get_running_loop().create_future()  # here


async def async_event(completions, **_):
    await asyncio.Event().wait()


async def async_queue(completions, **_):
    await asyncio.Queue().get()


async def async_lock(completions, **_):
    lock = asyncio.Lock()
    await lock.acquire()
    await lock.acquire()  # here


async def async_inner(completions, **_):
    async def inner():
        await asyncio.sleep(1e6)  # here

    return await inner()


async def async_gather(completions, **_):
    await asyncio.gather(asyncio.sleep(1e6), asyncio.sleep(1e6))  # here


async def async_busy(completions, **_):
    while True:
        completions = list(completions)


async def async_blocking(completions, **_):
    time.sleep(2)  # here
    return [1.0] * len(completions)


async def async_thread(completions, **_):
    await asyncio.to_thread(time.sleep, 20)  # here


async def async_shielded(completions, **_):
    await asyncio.shield(asyncio.sleep(1e6))  # here


async def async_swallowing(completions, **_):
    for _ in range(3):
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            continue


ASYNC_HANGING = (
    *(async_sleeping, async_future, async_event, async_queue, async_lock, async_inner),
    *(async_gather, async_blocking, async_thread, async_shielded, async_swallowing, async_busy),
)
