"""One sandboxed interpreter as the runner sees it: a process, two pipes, and what it has used."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# os.wait4 imports it at its first call, which fails when there is no file handle left
importlib.import_module("resource")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Launch:
    """How an interpreter is started."""

    command: list[str]
    """bubblewrap and its options; empty starts the interpreter unprotected."""
    python: list[str]
    environment: dict[str, str]
    filter: bytes
    code: bytes
    """The compiled child, its first input."""


class Worker:
    """A single-use interpreter: it starts, says ready, runs one program and is killed.

    Args:
        launch: how it is started.
        selector: where its pipes are registered; their callbacks are data of the keys.
        on_message: called with (worker, message) for each message.
        on_exit: called with (worker) when the process has ended and its output has been read.

    Raises:
        OSError: when no process can be started.
    """

    def __init__(
        self,
        launch: Launch,
        selector: selectors.BaseSelector,
        on_message: Callable[[Worker, bytes], None],
        on_exit: Callable[[Worker], None],
    ) -> None:
        self.selector, self.on_message, self.on_exit = selector, on_message, on_exit
        self.started = time.monotonic()
        self.ready = False
        self.task: Any = None
        self.raw = False
        """From here on the output is the program's own, not messages."""
        self.killed = ""
        """Why the runner ended it; empty when it did not."""
        self.killed_at = math.inf
        self.received = 0
        self.output = bytearray()
        self.cpu = 0.0
        """Seconds of CPU from its first instruction to its end; 0 until then."""
        self.closed_at = math.inf
        """When its output ended, in seconds of the monotonic clock."""
        self.closed = False
        self._pending = bytearray()
        self._inside: int | None = None
        self._inside_handle = -1
        self._usage = (0.0, 0)
        self._open(launch)
        self.send(launch.code, framed=False)

    def _open(self, launch: Launch) -> None:
        extra: list[int] = []
        arguments = list(launch.command)
        information = -1
        if launch.command:
            # a pipe for each: bubblewrap reads a shared file from where the last one left it
            source, target = os.pipe()
            extra = [source]
            with open(target, "wb") as file:
                file.write(launch.filter)
            try:
                information, reported = os.pipe()
            except OSError:
                os.close(source)
                raise
            extra = [source, reported]
            arguments += ["--seccomp", str(source), "--info-fd", str(reported)]
        try:
            self.process = subprocess.Popen(
                [*arguments, *launch.python],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=launch.environment,
                pass_fds=extra,
                bufsize=0,
            )
        except OSError:
            if information >= 0:
                os.close(information)
            raise
        finally:
            for number in extra:
                os.close(number)
        self.source, self.target = self.process.stdout.fileno(), self.process.stdin.fileno()
        os.set_blocking(self.source, False)
        os.set_blocking(self.target, False)
        self._information = information
        try:
            self.handle = os.pidfd_open(self.process.pid)
        except OSError:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            if information >= 0:
                os.close(information)
            raise
        self.selector.register(self.source, selectors.EVENT_READ, self._read)
        self.selector.register(self.handle, selectors.EVENT_READ, self._exited)

    @property
    def idle(self) -> bool:
        """Whether it waits for a program."""
        return self.ready and self.task is None and not self.killed

    def find_inside(self) -> bool:
        """Learn the process inside the sandbox; False when it is gone or out of reach."""
        if self._information < 0:
            self._inside = self.process.pid
        else:
            # it has said ready, so bubblewrap has written this line
            text = os.read(self._information, 4096)
            os.close(self._information)
            self._information = -1
            self._inside = json.loads(text)["child-pid"]
        try:
            self._inside_handle = os.pidfd_open(self._inside)
        except OSError:
            return False
        return True

    def send(self, message: bytes, framed: bool = True) -> None:
        """Queue a message; it is written as the pipe takes it."""
        if self.closed:
            return
        if not self._pending:
            self.selector.register(self.target, selectors.EVENT_WRITE, self._write)
        self._pending += len(message).to_bytes(4, "big") + message if framed else message

    def usage(self) -> tuple[float, int]:
        """CPU seconds of the process inside and of all its threads, and how many threads it has."""
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/{self._inside}/stat", "rb") as file:
                rest = file.read().rpartition(b")")[2].split()
            self._usage = ((int(rest[11]) + int(rest[12])) / _TICKS, int(rest[17]))
        return self._usage

    def waited(self) -> float:
        """Seconds the process inside has waited for a free core."""
        return run_delay(self._inside) if self._inside is not None else 0.0

    def kill(self, why: str, wrapper: bool = False) -> None:
        """End it at once; `on_exit` follows.

        Args:
            why: the reason, of which the first is kept.
            wrapper: end bubblewrap too, which else ends by itself and so has waited for the process
                inside and knows what it has used.
        """
        self.killed = self.killed or why
        self.killed_at = min(self.killed_at, time.monotonic())
        if self.closed:
            return
        inside = self._inside_handle >= 0
        for handle, asked in ((self._inside_handle, inside), (self.handle, wrapper or not inside)):
            # not Popen.kill, which may reap the process before its end is noticed here
            with contextlib.suppress(ProcessLookupError):
                if asked:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)

    def _write(self) -> None:
        try:
            count = os.write(self.target, self._pending)
        except BlockingIOError:
            return
        # it has closed its input or is gone; its exit is reported elsewhere
        except OSError:
            self._pending.clear()
            count = 0
        del self._pending[:count]
        if not self._pending:
            self.selector.unregister(self.target)

    def _read(self) -> bool:
        """Take what has come; False when there is nothing."""
        try:
            data = os.read(self.source, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self.selector.unregister(self.source)
            self.source = -1
            self.closed_at = time.monotonic()
            return False
        self.received += len(data)
        self.output += data
        while not self.raw and len(self.output) >= 4:
            size = int.from_bytes(self.output[:4], "big")
            if len(self.output) < 4 + size:
                break
            message = bytes(self.output[4 : 4 + size])
            del self.output[: 4 + size]
            self.on_message(self, message)
        return True

    def _exited(self) -> None:
        while self.source >= 0 and not self.killed and self._read():
            pass
        # of bubblewrap and of the process inside, for which it has waited
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu = max(self._usage[0], used.ru_utime + used.ru_stime)
        self.close()
        self.on_exit(self)

    def close(self) -> None:
        """Give back the pipes of a process that has ended."""
        self.closed = True
        if self.source >= 0:
            self.selector.unregister(self.source)
        if self._pending:
            self.selector.unregister(self.target)
            self._pending.clear()
        self.selector.unregister(self.handle)
        for number in (self.handle, self._inside_handle, self._information):
            if number >= 0:
                os.close(number)
        self.process.stdin.close()
        self.process.stdout.close()


def run_delay(pid: int | str) -> float:
    """Seconds that a process has been ready to run and waited for a core; 0 where unknown."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
