"""One call of a reward function: limited in time, contained, and named in what goes wrong."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from .containment import CALL, Output, restored
from .places import definition, last_user_line, stack_frames, traceback_frames, user_frames
from .worker import Reported

logger = logging.getLogger(__name__)

TIMEOUT = 1800.0
NOTICE = 60.0

# Nobody uses it, and it does nothing to a process without a handler. It ends a sleep or a read.
_SIGNAL = getattr(signal, "SIGURG", None)
# Of a timer of CPU seconds: it comes from the kernel, so that it reaches a loop in C that holds the
# interpreter's lock and looks at signals, as a regular expression does, when no thread of ours can.
_TIMER = getattr(signal, "SIGVTALRM", None)


@dataclass(frozen=True)
class Call:
    """What a message says of a call: which function, on how many completions, how long at most."""

    name: str
    function: Callable[..., Any]
    size: int
    timeout: float | None = TIMEOUT
    """Seconds after which it is stopped; None: never."""
    notice: float = NOTICE
    """Seconds after which a first notice is given; the next ones after twice as long each."""

    def raised(self, error: BaseException) -> ValueError:
        """The error to report for an exception that came out of the function."""
        if isinstance(error, Reported):
            return ValueError(f"reward function {self.name!r} {error}")
        place = last_user_line(_origin(error, self.function), self.function)
        at = f" ({place})" if place else ""
        if isinstance(error, SystemExit):
            return ValueError(
                f"reward function {self.name!r} called sys.exit({error.code!r}){at}: expected one "
                "number or None for each completion."
            )
        kind = type(error).__name__
        try:
            text = " ".join(str(error)[:10_000].split())[:500]
        # a __str__ of the user's
        except Exception:
            text = "its text cannot be shown"
        return ValueError(f"reward function {self.name!r} raised {kind}: {text}{at}")

    def overdue(self, seconds: float, frames: list[tuple[str, int]]) -> ValueError:
        """The error to report for a function that was stopped."""
        return ValueError(
            f"reward function {self.name!r} did not return within {seconds:g} s (reward_timeout) "
            f"for {self.size} completions; it was at {last_user_line(frames, self.function)}."
        )

    def warn(self, seconds: float, frames: list[tuple[str, int]]) -> None:
        """Say that the function has not returned yet."""
        limit = "" if self.timeout is None else f"; it is stopped after {self.timeout:g} s"
        logger.warning(
            "reward function %r has not returned for %.3g s with %d completions; it is at %s%s.",
            self.name,
            seconds,
            self.size,
            last_user_line(frames, self.function),
            limit,
        )

    def output(self) -> Output:
        """What cuts the output of this call."""
        return Output(self.name)


def located(call: Call) -> str:
    """`'name' (file, line n)`, for what is wrong with what a function returned."""
    place = definition(call.function)
    return f"{call.name!r} ({place})" if place else repr(call.name)


def contained(call: Call, function: Callable[[], Any]) -> Any:
    """The result of `function()` in this thread, as `Call` describes it.

    A child process that the function has forked, and that returns or raises here, ends here: it
    would go on with the run a second time.

    Raises:
        ValueError: naming the function and the user's line, for anything it raised, `sys.exit`
            included, and when it did not return in time.
        KeyboardInterrupt: Ctrl-C is the user's.
    """
    token = CALL.set(call.output())
    try:
        with restored(), _Watch(call):
            return _in_one_process(function)
    except Overdue as stop:
        raise call.overdue(call.timeout or 0.0, stop.frames) from None
    except KeyboardInterrupt:
        raise
    # the boundary to user code: whatever it raises is reported under the function's name
    except BaseException as error:
        raise call.raised(error) from error
    finally:
        CALL.reset(token)


def _in_one_process(function: Callable[[], Any]) -> Any:
    process = os.getpid()
    try:
        return function()
    finally:
        # before anything else: locks that another thread held at the fork stay locked in the child
        if os.getpid() != process:
            os._exit(0)


class Overdue(BaseException):
    """Raised inside a function that is out of time; no `except Exception` stops it."""

    def __init__(self, frames: list[tuple[str, int]] | None = None) -> None:
        super().__init__("out of time")
        self.frames = frames or []


def interrupt_thread(ident: int) -> None:
    """Raise `Overdue` at the next byte code of a thread that is not the main one."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Overdue))


class _Watch:
    """Notices while a function runs in this thread, then an exception inside it.

    In the main thread the exception is raised by a signal, which ends sleeps, reads, joins and
    regular expressions too. In another thread it waits for the next byte code. What can be ended by
    neither, a loop in C that holds the interpreter's lock, ends the process after a further while:
    a run that hangs holds its machines until somebody looks.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._done = threading.Event()
        self._active = False
        self._ident = threading.get_ident()
        main = threading.current_thread() is threading.main_thread()
        self._signals = main and _SIGNAL is not None and call.timeout is not None
        self._previous: list[Any] = []
        self._began = time.monotonic()

    def __enter__(self) -> _Watch:
        if self._signals:
            self._previous = [signal.signal(n, self._on_signal) for n in (_SIGNAL, _TIMER)]
            # once more each second, since CPU seconds of several threads pass faster than the clock
            signal.setitimer(signal.ITIMER_VIRTUAL, self._call.timeout, 1.0)
        self._last_resort()
        self._active = True
        threading.Thread(target=self._watch, name="reward-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._active = False
        self._done.set()
        if self._call.timeout is not None:
            faulthandler.cancel_dump_traceback_later()
        if self._signals:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
            for number, handler in zip((_SIGNAL, _TIMER), self._previous, strict=True):
                signal.signal(number, handler or signal.SIG_DFL)

    def _last_resort(self) -> None:
        if self._call.timeout is None:
            return
        later = self._call.timeout + min(30.0, max(1.0, self._call.timeout))
        # a notebook's stderr is no file
        with suppress(ValueError, OSError, AttributeError, RuntimeError):
            faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)

    def _watch(self) -> None:
        call, began = self._call, self._began
        notice, timeout = call.notice, float("inf") if call.timeout is None else call.timeout
        while not self._done.wait(max(0.0, min(notice, timeout) - (time.monotonic() - began))):
            passed = time.monotonic() - began
            if passed >= timeout:
                break
            if passed >= notice:
                call.warn(passed, self._stack())
                notice *= 2
        # again and again: the function may catch it, or sleep while it cleans up
        while not self._done.wait(0.0):
            self._interrupt()
            self._done.wait(0.5)

    def _stack(self) -> list[tuple[str, int]]:
        return stack_frames(sys._current_frames().get(self._ident), __file__)

    def _interrupt(self) -> None:
        if self._signals:
            signal.pthread_kill(self._ident, _SIGNAL)
        elif self._active:
            interrupt_thread(self._ident)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        late = time.monotonic() - self._began >= (self._call.timeout or 0.0)
        if self._active and late:
            raise Overdue(stack_frames(frame, __file__))


def _origin(error: BaseException, function: Callable[..., Any]) -> list[tuple[str, int]]:
    """The frames of an error, or of its cause: a StopIteration in a coroutine leaves no others."""
    cause: BaseException | None = error
    while cause is not None:
        frames = user_frames(_below(cause.__traceback__), function)
        if frames:
            return frames
        cause = cause.__cause__
    return []


def _below(traceback: TracebackType | None) -> list[tuple[str, int]]:
    frames = traceback_frames(traceback)
    inside = [index for index, frame in enumerate(frames) if frame[0] == __file__]
    return frames[inside[-1] + 1 :] if inside else frames
