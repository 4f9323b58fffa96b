"""The event loop of asynchronous rewards, in a thread that outlives what they do to it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from typing import Any

from .calls import Call, interrupt_thread
from .containment import CALL
from .places import stack_frames, waiting_frames

# threads of `asyncio.to_thread`, as many as Python's own executor has at most
_THREADS = 32


class Background:
    """One daemon loop for the life of a set of rewards, so that a client's session stays valid."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(DaemonThreads(_THREADS))
        closing = threading.Event()
        self._thread = threading.Thread(
            target=_run, args=(self._loop, closing), name="rewards", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, _close, self._loop, closing)

    def start(self, call: Call, function: Callable[[], Any]) -> Pending:
        """Begin `await function()` on the loop."""
        return Pending(call, function, self._loop, self._thread)


class Pending:
    """An asynchronous reward that has begun."""

    def __init__(
        self,
        call: Call,
        function: Callable[[], Any],
        loop: asyncio.AbstractEventLoop,
        thread: threading.Thread,
    ) -> None:
        self._call, self._loop, self._thread = call, loop, thread
        self._task: asyncio.Task | None = None
        self._began = time.monotonic()
        self.future: Future = asyncio.run_coroutine_threadsafe(self._outcome(function), loop)

    def result(self) -> Any:
        """What the function returns.

        Raises:
            ValueError: naming the function and the user's line, for anything it raised, an exit
                included, and when it did not return in time.
        """
        call, notice = self._call, self._call.notice
        timeout = float("inf") if call.timeout is None else call.timeout
        while True:
            passed = time.monotonic() - self._began
            if passed >= timeout:
                frames = self._frames()
                # one that computes, instead of waiting, would go on beside the run
                if self._runs():
                    interrupt_thread(self._thread.ident)
                raise call.overdue(timeout, frames) from None
            try:
                value, error = self.future.result(min(notice, timeout) - passed)
                break
            except Late:
                passed = time.monotonic() - self._began
                if notice <= passed < timeout:
                    call.warn(passed, self._frames())
                    notice *= 2
        if error is not None:
            raise call.raised(error) from error
        return value

    async def _outcome(self, function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        process = os.getpid()
        self._task = asyncio.current_task()
        CALL.set(self._call.output())
        try:
            return await function(), None
        # an exit or an interrupt would end the loop's thread, and leave every other reward waiting
        except BaseException as error:
            return None, error
        finally:
            # a child that the function forked has a loop of its own, which nobody would end
            if os.getpid() != process:
                os._exit(0)

    def _runs(self) -> bool:
        return self._task is not None and asyncio.tasks.current_task(self._loop) is self._task

    def _frames(self) -> list[tuple[str, int]]:
        task = self._task
        if task is None:
            return []
        stack = stack_frames(sys._current_frames().get(self._thread.ident), __file__)
        # a task that blocks the loop is on the thread's stack, another one waits in its coroutines
        frames = stack if self._runs() else waiting_frames(task.get_coro())
        return [frame for frame in frames if frame[0] != __file__]


def _run(loop: asyncio.AbstractEventLoop, closing: threading.Event) -> None:
    while not closing.is_set():
        try:
            loop.run_forever()
        # a task of the user's that exits ends run_forever; whoever awaits it gets the exit as well
        except BaseException:
            continue
    for task in asyncio.all_tasks(loop):
        # it hung, which has been said; asyncio would say that it is destroyed
        task._log_destroy_pending = False
    loop.close()


def _close(loop: asyncio.AbstractEventLoop, closing: threading.Event) -> None:
    closing.set()
    loop.call_soon_threadsafe(loop.stop)


class DaemonThreads(ThreadPoolExecutor):
    """Python joins the threads of its own pools at exit: one that hangs would hang the exit."""

    def __init__(self, workers: int) -> None:
        super().__init__(1)
        self._free = threading.Semaphore(workers)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()

        def run() -> None:
            with self._free:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(function(*args, **kwargs))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=run, name="rewards-io", daemon=True).start()
        return future
