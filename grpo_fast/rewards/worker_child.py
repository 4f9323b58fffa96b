"""The program of a worker process: answers requests until its parent is gone, or kills it.

It is started by its path and imports nothing of ours, so that it is there within milliseconds and
holds no copy of torch. Requests and answers are lines of JSON: what comes out of a process that
handles a model's text is data and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import importlib
import inspect
import io
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import traceback

_OUTPUT = 10_000


class _Printed(io.TextIOBase):
    """The first characters that a request prints."""

    def __init__(self) -> None:
        self.text, self.left = [], _OUTPUT

    def write(self, text: str) -> int:
        if self.left > 0:
            self.text.append(text[: self.left])
            self.left -= len(text)
        return len(text)

    def taken(self) -> str:
        text = "".join(self.text) + ("\n[the rest is left out]\n" if self.left < 0 else "")
        self.__init__()
        return text


PRINTED = _Printed()


class Regex:
    """Does a whole text match a pattern?"""

    def __init__(self, setup: dict) -> None:
        self.pattern = re.compile(setup["pattern"], re.DOTALL)

    def answer(self, request: dict) -> dict:
        return {"value": self.pattern.fullmatch(request["text"]) is not None}


class Mathematics:
    """Is an expression equal to the gold one, by math-verify?"""

    def __init__(self, setup: dict) -> None:
        import logging

        import math_verify

        # it reports each text that it cannot parse
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self.package = math_verify
        # our own parser of the parent has cut deeper nesting off
        sys.setrecursionlimit(5000)

    def answer(self, request: dict) -> dict:
        # its own time limit is a signal of one second's resolution; ours is outside
        gold = self.package.parse(request["gold"], parsing_timeout=None)
        if not gold:
            return {"value": None, "why": "gold"}
        answer = self.package.parse(request["answer"], parsing_timeout=None)
        if not answer:
            return {"value": False}
        return {"value": self.package.verify(gold, answer, timeout_seconds=None)}


class Function:
    """A reward function that can be imported."""

    def __init__(self, setup: dict) -> None:
        function = importlib.import_module(setup["module"])
        for name in setup["attribute"].split("."):
            function = getattr(function, name)
        self.function = getattr(function, "__in_worker__", function)
        parameters = inspect.signature(self.function).parameters.values()
        self.variadic = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.names = {p.name for p in parameters}

    def answer(self, request: dict) -> dict:
        extras, metrics = [], []
        keywords = {
            **request["keywords"],
            "log_extra": lambda name, values: extras.append([str(name), _plain(list(values))]),
            "log_metric": lambda name, value: metrics.append([str(name), float(value)]),
        }
        if not self.variadic:
            keywords = {name: v for name, v in keywords.items() if name in self.names}
        values = self.function(**keywords)
        if inspect.isawaitable(values):
            values = asyncio.run(_awaited(values))
        return {"value": _plain(values), "extras": extras, "metrics": metrics}


TASKS = {"regex": Regex, "mathematics": Mathematics, "function": Function}


async def _awaited(value):
    return await value


def _plain(value):
    """Numbers and lists of them; anything else as its text, which the parent refuses."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        # the parent says what is wrong with a number that is no float
        return value if abs(value) < 2**1100 else float("inf")
    return repr(value)[:200]


def frames(trace) -> list:
    """[file, line] of each frame, outermost first, without this file's."""
    return [[f.filename, f.lineno] for f in trace if f.filename != __file__]


class Channel:
    """Lines of JSON over the socket; each is written whole."""

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)
        self.reader = self.socket.makefile("r", encoding="utf-8")
        self.process = os.getpid()
        self.leave = os._exit

    def say(self, answer: dict) -> None:
        # a child of the function's is not the one that was asked
        if os.getpid() == self.process:
            self.socket.sendall(json.dumps(answer).encode() + b"\n")

    def exiting(self, code: int = 0) -> None:
        """Stands in for os._exit, to say where it was called."""
        with contextlib.suppress(OSError, ValueError):
            stack = traceback.extract_stack()[:-1]
            self.say({"gone": f"called os._exit({code!r})", "frames": frames(stack)})
        self.leave(code)


def limit(cpu: float | None, memory: int | None) -> None:
    """A second fence for a worker whose parent has died in the middle of a request."""
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if cpu is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        allowed = int(used.ru_utime + used.ru_stime + 2 * cpu + 5)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, hard))


def follow(descriptor: int) -> None:
    """End when the parent is gone: its end of this pipe is then closed."""
    with contextlib.suppress(OSError):
        os.read(descriptor, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    channel = Channel(int(sys.argv[1]))
    threading.Thread(target=follow, args=(int(sys.argv[2]),), daemon=True).start()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    os._exit = channel.exiting
    setup = json.loads(channel.reader.readline())
    sys.path[:] = setup["path"]
    sys.stdout = sys.stderr = PRINTED
    try:
        task = TASKS[setup["task"]](setup)
    except BaseException as error:
        channel.say(failure(error))
        return
    limit(None, setup["memory"])
    channel.say({"ready": True})
    for line in channel.reader:
        limit(setup["cpu"], None)
        try:
            answer = task.answer(json.loads(line))
        # the boundary to the user's code: whatever it raises is the answer
        except BaseException as error:
            answer = failure(error)
        if os.getpid() != channel.process:
            channel.leave(0)
        channel.say({**answer, "output": PRINTED.taken()})


def failure(error: BaseException) -> dict:
    """What the parent reports of an exception."""
    text = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else ""
    try:
        message = " ".join(str(error).split())[:500]
    except Exception:
        message = ""
    return {
        "error": text or f"raised {type(error).__name__}: {message}",
        "frames": frames(traceback.extract_tb(error.__traceback__)),
        "kind": type(error).__name__,
    }


if __name__ == "__main__":
    main()
