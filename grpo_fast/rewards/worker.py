"""A process that answers requests and is killed when it takes too long; see `worker_child.py`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_PROGRAM = str(Path(__file__).with_name("worker_child.py"))
# what a worker of ours gets of the environment: no keys and tokens
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "SYSTEMROOT")
_FRAME = re.compile(r'File "(.+?)", line (\d+) in')
# seconds that the start may take: math-verify imports sympy
_START = 120.0
# an overloaded machine gives a process a tenth of a core
_PATIENCE = 10.0
# a float that no answer is as long as
_ANSWER = 64 << 20


class Lost(Exception):
    """A worker that did not answer, and is gone; the next request gets a new one.

    `late` is true when it was out of time; `frames` are where it was, as far as that is known.
    """

    def __init__(self, text: str, frames: list[tuple[str, int]], late: bool = False) -> None:
        super().__init__(text)
        self.frames, self.late = frames, late


class Reported(ValueError):
    """An error whose text says already what a function did, and where."""


class Worker:
    """One process for one task, started at its first request.

    Args:
        task: key of `TASKS` in `worker_child.py`.
        setup: what the task is built from, JSON.
        cpu: CPU seconds of one request; the clock may take ten times as long. None: no such limit.
        wall: seconds of one request by the clock; None: ten times `cpu`.
        memory: bytes of address space; None: no limit.
        inherit: give it the whole environment, for functions of the user's own.

    Threads may share one: they take turns. It needs no signal handler, so it works in any thread.
    """

    def __init__(
        self,
        task: str,
        setup: dict[str, Any],
        *,
        cpu: float | None = None,
        wall: float | None = None,
        memory: int | None = None,
        inherit: bool = False,
    ) -> None:
        self._setup = {**setup, "task": task, "cpu": cpu, "memory": memory}
        self._cpu = cpu
        self._wall = wall if wall is not None else (cpu or 0.0) * _PATIENCE + 1.0
        self._inherit = inherit
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Lost: when it takes too long or the process ends.
            ValueError: when the task cannot be set up, such as for a package that is missing.
        """
        with self._lock:
            if self._owner != os.getpid() or self._process is None:
                self._start()
            self._log.truncate(0)
            return self._exchange(request, self._cpu, self._wall)

    def close(self) -> None:
        """Kill the process, if there is one."""
        with self._lock:
            if self._process is not None and self._owner == os.getpid():
                self._kill()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        follow, life = os.pipe()
        # appended to, so that emptying it between requests leaves no hole
        self._log = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
        environment = dict(os.environ) if self._inherit else {}
        environment.update({n: os.environ[n] for n in _ENVIRONMENT if n in os.environ})
        descriptors = (theirs.fileno(), follow)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "utf8", _PROGRAM, *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=descriptors,
                start_new_session=True,
                env=environment,
            )
        finally:
            theirs.close()
            os.close(follow)
        self._socket, self._life, self._owner = ours, life, os.getpid()
        self._buffer = b""
        answer = self._exchange({**self._setup, "path": sys.path}, None, _START)
        if "error" in answer:
            self._kill()
            raise ValueError(answer["error"])

    def _exchange(self, request: dict[str, Any], cpu: float | None, wall: float) -> dict[str, Any]:
        began, used = time.monotonic(), self._used()
        try:
            self._socket.settimeout(wall)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            wait = 0.02
            while b"\n" not in self._buffer:
                late = time.monotonic() - began > wall
                if late or (cpu is not None and self._used() - used > cpu):
                    raise self._late()
                self._receive(wait)
                wait = min(2 * wait, 0.25, 0.5 * cpu if cpu else 0.25)
        except TimeoutError:
            raise self._late() from None
        except OSError:
            raise self._gone({}) from None
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "gone" in answer:
            raise self._gone(answer)
        return answer

    def _receive(self, seconds: float) -> None:
        self._socket.settimeout(seconds)
        try:
            received = self._socket.recv(1 << 20)
        except TimeoutError:
            # a child of its own may hold the socket open
            if self._process.poll() is not None:
                raise self._gone({}) from None
            return
        if not received or len(self._buffer) > _ANSWER:
            raise self._gone({})
        self._buffer += received

    def _used(self) -> float:
        """CPU seconds of the process so far; 0 where the system does not say."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text()
        except OSError:
            return 0.0
        # the name in parentheses may hold anything
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _late(self) -> Lost:
        frames: list[tuple[str, int]] = []
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        for _ in range(20):
            frames = self._logged()
            if frames or self._process.poll() is not None:
                break
            time.sleep(0.01)
        self._kill()
        return Lost("did not return in time", frames, late=True)

    def _gone(self, answer: dict[str, Any]) -> Lost:
        frames = [tuple(frame) for frame in answer.get("frames", [])] or self._logged()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.poll()
        self._kill()
        text = answer.get("gone")
        if text is None and code is not None and code < 0:
            name = signal.Signals(-code).name
            text = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return Lost(text or f"ended its process with exit code {code}", frames)

    def _logged(self) -> list[tuple[str, int]]:
        """The frames that faulthandler has written, outermost first."""
        self._log.seek(0)
        text = self._log.read(1 << 16).decode("utf-8", "replace")
        frames = [(name, int(line)) for name, line in _FRAME.findall(text) if name != _PROGRAM]
        return frames[::-1]

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        self._log.close()
        os.close(self._life)
        self._process = None
