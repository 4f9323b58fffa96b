"""Sandbox: the trainer's side of the runner."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import signal
import socket
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import command, seccomp
from .child import NotPlain, decode, encode
from .command import SandboxUnavailable
from .limits import NOT_STARTED, Limits, Outcome, Program
from .probe import PROBE, explain_failure, read_probe

logger = logging.getLogger(__name__)

ISOLATIONS = ("bwrap", "none")
_RESTARTS = 3
_START = "import sys; sys.path.append({folder!r}); from sandbox.runner import main; main()"


def available_cores() -> int:
    """Cores for this process: those it may run on, shared among the ranks of its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, (cores or 1) // max(1, int(ranks) if ranks.isdigit() else 1))


class Sandbox:
    """Runs programs that nobody has read, several at a time, each in an interpreter of its own.

    The interpreters wait ready behind a runner process, which starts with the first call, is
    replaced when it dies, and ends with this process however that ends. Calls from several threads
    take turns. A forked process starts a runner of its own.

    Args:
        limits: what each program may use.
        size: programs at a time; None takes the cores of this rank.
        packages: installed packages that programs may import beside the standard library.
        isolation: "bwrap"; or "none", which runs programs **unprotected**, with limits alone.

    Raises:
        ValueError: for an unknown isolation, a size below 1 or a package that is not installed.
        SandboxUnavailable: when no sandbox can be started here.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        size: int | None = None,
        packages: Sequence[str] = (),
        isolation: str = "bwrap",
    ) -> None:
        if isolation not in ISOLATIONS:
            raise ValueError(f"sandbox: expected one of {ISOLATIONS}, got {isolation!r}.")
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"size: expected at least 1, got {size!r}.")
        self.limits = limits or Limits()
        self.size = size or available_cores()
        self.isolation = isolation
        self._settings = self._prepare(packages)
        self._forget()

    def _prepare(self, packages: Sequence[str]) -> dict[str, Any]:
        code = command.child_code()
        settings = {
            "size": self.size,
            "limits": {
                **dataclasses.asdict(self.limits),
                "patience": self.limits.patience,
            },
            "python": command.python_command(len(code)),
            "code": code,
        }
        if self.isolation == "none":
            environment = command.ENVIRONMENT | {"PATH": "/usr/bin:/bin"}
            return settings | {"command": [], "environment": environment, "filter": b""}
        bwrap = command.bwrap_command(command.find_bwrap(), self.limits.disk, packages)
        return settings | {"command": bwrap, "environment": {}, "filter": seccomp.build()}

    def check(self) -> dict[str, Any]:
        """Run one program that tries what it must not do; what it found, by name.

        Raises:
            SandboxUnavailable: when it did not run, or something it must not do worked.
        """
        outcome = self.run([PROBE])[0]
        if outcome.status != "done":
            reason = outcome.detail or outcome.status
            if self.isolation == "bwrap":
                reason = explain_failure(self._settings) or reason
            raise SandboxUnavailable(
                f"sandbox: bubblewrap does not start here ({reason}); programs are not run. "
                "docs/sandbox.md says what it needs; sandbox='none' runs them unprotected."
            )
        found, open_doors = read_probe(outcome)
        if open_doors and self.isolation == "bwrap":
            raise SandboxUnavailable(
                f"sandbox: expected a program to be refused {', '.join(open_doors)}, and it was "
                "not; programs are not run."
            )
        return found

    def run(
        self,
        programs: Sequence[Program],
        *,
        wanted: Callable[[int], bool] | None = None,
        on_outcome: Callable[[int, Outcome], None] | None = None,
    ) -> list[Outcome]:
        """What became of each program.

        Args:
            programs: N of them.
            wanted: asked with an index before that program is handed out; False skips it.
            on_outcome: called with (index, outcome) as each is known, in any order.

        Returns:
            N outcomes. "unjudged" marks those that the sandbox itself failed on, after three
            attempts; nothing is raised for them.
        """
        if os.getpid() != self._owner:
            self._forget()
        outcomes: list[Outcome | None] = [None] * len(programs)
        with self._lock:
            try:
                self._serve(programs, outcomes, wanted, on_outcome)
            # an interrupt or an error of a callback leaves tasks behind that nobody waits for
            except BaseException:
                self._stop()
                raise
        return [outcome or Outcome("skipped") for outcome in outcomes]

    def close(self) -> None:
        """End the runner and with it every interpreter; a later call starts another."""
        if os.getpid() != self._owner:
            self._forget()
        with self._lock:
            self._stop()

    def _serve(
        self,
        programs: Sequence[Program],
        outcomes: list[Outcome | None],
        wanted: Callable[[int], bool] | None,
        on_outcome: Callable[[int, Outcome], None] | None,
    ) -> None:
        left = list(range(len(programs)))[::-1]
        handed_out: set[int] = set()
        deaths = failures = 0

        def settle(index: int, outcome: Outcome) -> None:
            outcomes[index] = outcome
            if on_outcome is not None:
                on_outcome(index, outcome)

        while left or handed_out:
            try:
                # two each: one runs, one waits behind it
                while left and len(handed_out) < 2 * self.size:
                    index = left.pop()
                    if wanted is None or wanted(index):
                        handed_out.add(index)
                        self._send(encode([index, dataclasses.asdict(programs[index])]))
                if not handed_out:
                    continue
                index, outcome = self._receive()
            except (OSError, NotPlain, EOFError) as error:
                self._stop()
                deaths += 1
                left += sorted(handed_out, reverse=True)
                handed_out.clear()
                outcome = Outcome("unjudged", f"the runner: {type(error).__name__}: {error}")
            else:
                handed_out.remove(index)
                settle(index, outcome)
                # each of these took seconds of attempts: the rest would take minutes
                failures = failures + 1 if outcome.detail.startswith(NOT_STARTED) else 0
            if deaths > _RESTARTS or failures >= 2 * self.size:
                while left:
                    settle(left.pop(), outcome)

    # ---- the runner

    def _forget(self) -> None:
        """Start anew, in a forked process too: what the parent started stays the parent's."""
        stale = getattr(self, "_socket", None)
        if stale is not None:
            stale.close()
            # not a child of this process: there is nothing to wait for
            self._process.returncode = 0
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], None] | None = None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        folder = str(Path(__file__).resolve().parent.parent)
        with theirs:
            self._process = subprocess.Popen(
                [command.interpreter(), "-s", "-S", "-E", "-c", _START.format(folder=folder)],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        ours.settimeout(self.limits.patience + 30)
        self._socket = ours
        self._end = weakref.finalize(self, _end, self._process, ours, os.getpid())
        self._send(encode(self._settings | {"parent": os.getpid()}))
        return ours

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._socket = self._process = self._end = None

    def _send(self, message: bytes) -> None:
        connection = self._socket or self._start()
        connection.sendall(len(message).to_bytes(4, "big") + message)

    def _receive(self) -> tuple[int, Outcome]:
        size = int.from_bytes(self._exactly(4), "big")
        index, status, detail, replies, stdout, cpu, wall = decode(self._exactly(size))
        return index, Outcome(status, detail, tuple(replies), stdout, cpu, wall)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise EOFError("has ended")
            data += part
        return bytes(data)


def _end(process: subprocess.Popen[bytes], connection: socket.socket, owner: int) -> None:
    """End a runner; its sandboxes are ended by it, and by the kernel should it not come to that."""
    connection.close()
    if os.getpid() != owner:
        return
    # it sees the end of its connection
    handle = os.pidfd_open(process.pid)
    select.select([handle], [], [], 2)
    os.close(handle)
    # before it is waited for, so that its group is still its own: where the runner was killed, a
    # bubblewrap that was starting waits there for a process that is gone (see end_group)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
