"""The process beside the trainer that starts sandboxes, feeds them, limits them and ends them.

It is a process of its own for four reasons: the trainer, with its threads and its GPU, never forks;
a reward that holds the interpreter lock delays no limit; bubblewrap dies with the *thread* that
started it, and this process has one; and when the trainer is killed, its end is seen here at once.
It never sees an expected value, but for test bodies, which it passes on to a sandbox of their own.

Only the standard library and this package are imported: it runs in the bare interpreter.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from .child import decode, encode
from .limits import NOT_STARTED
from .worker import Launch, Worker, run_delay

# seconds between two looks at what the running programs have used
_TICK = 0.02
# seconds that an interpreter has to start, and to end after it closed its output
_START, _CLOSED = 30.0, 0.5
# seconds that all of them have to end when the trainer has
_LEAVE = 1.0
_ATTEMPTS = 3
# failed starts in a row after which the rest of the tasks is given back
_FAILED_STARTS = 8


@dataclass
class Task:
    """A program on its way through the sandboxes."""

    number: int
    job: dict[str, Any]
    attempts: int = 0
    workers: list[Worker] = field(default_factory=list)
    """The program's, and for a test body that of the tests behind it."""
    started: float = 0.0
    base: list[tuple[float, float]] = field(default_factory=list)
    """CPU seconds and seconds of waiting that each worker had used before."""
    delay: float = 0.0
    replies: list[bytes] = field(default_factory=list)
    verdict: str = ""
    """The limit it broke, once it did."""


class Runner:
    """Runs at most `size` tasks at a time, in interpreters that wait ready."""

    def __init__(self, connection: socket.socket, settings: dict[str, Any]) -> None:
        self.connection = connection
        self.size = settings["size"]
        self.limits = settings["limits"]
        self.launch = Launch(
            command=settings["command"],
            python=settings["python"],
            environment=settings["environment"],
            filter=settings["filter"],
            code=settings["code"],
        )
        self.selector = selectors.DefaultSelector()
        self.workers: list[Worker] = []
        self.waiting: list[Task] = []
        self.running: list[Task] = []
        self.failed_starts = 0
        self.rest_until = self.checked = 0.0
        self._incoming = bytearray()
        self._outgoing = bytearray()
        parent = os.pidfd_open(settings["parent"])
        if os.getppid() != settings["parent"]:
            sys.exit(0)
        self.selector.register(parent, selectors.EVENT_READ, self._leave)
        connection.setblocking(False)
        self.selector.register(connection, selectors.EVENT_READ, self._receive)

    def run(self) -> None:
        """Serve until the trainer ends or closes the connection."""
        while True:
            self._fill()
            self._dispatch()
            busy = self.running or not all(worker.idle for worker in self.workers)
            timeout = _TICK if busy or self.rest_until > time.monotonic() else None
            for key, _ in self.selector.select(timeout):
                # a callback of the same round may have closed it, and another opened its number
                if self.selector.get_map().get(key.fd) is key:
                    key.data()
            self._check(time.monotonic())

    def _leave(self) -> None:
        # in its turn: the process inside, then bubblewrap, which waits for it; one that is still
        # starting reads the end of its input
        for worker in self.workers:
            if worker.ready:
                worker.kill("end")
            worker.process.stdin.close()
        deadline = time.monotonic() + _LEAVE
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    time.sleep(0.005)
        end_group()

    # ---- the trainer's side

    def _receive(self) -> None:
        try:
            data = self.connection.recv(1 << 20)
        except BlockingIOError:
            # the socket is registered for writing too while there is something to write
            self._flush()
            return
        except OSError:
            data = b""
        if not data:
            self._leave()
        self._incoming += data
        while len(self._incoming) >= 4:
            size = int.from_bytes(self._incoming[:4], "big")
            if len(self._incoming) < 4 + size:
                break
            number, job = decode(bytes(self._incoming[4 : 4 + size]))
            del self._incoming[: 4 + size]
            self.waiting.append(Task(number, job))

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self.connection.send(self._outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            self._leave()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        self.selector.modify(self.connection, events, self._receive)

    def _report(self, task: Task, status: str, detail: str = "", stdout: bytes = b"") -> None:
        cpu = sum(worker.cpu or worker.usage()[0] for worker in task.workers)
        wall = time.monotonic() - task.started if task.started else 0.0
        message = encode([task.number, status, detail, task.replies, stdout, cpu, wall])
        self._outgoing += len(message).to_bytes(4, "big") + message
        self._flush()

    # ---- starting

    def _fill(self) -> None:
        # one is ready for each that runs: a start is half CPU and half waiting for the kernel
        alive = sum(not worker.killed for worker in self.workers)
        for _ in range(2 * self.size - alive if time.monotonic() >= self.rest_until else 0):
            try:
                worker = Worker(self.launch, self.selector, self._message, self._exited)
            except OSError as error:
                self._start_failed(f"{type(error).__name__}: {error}")
                return
            self.workers.append(worker)

    def _start_failed(self, why: str) -> None:
        # a machine out of processes or memory recovers when other programs end
        self.failed_starts += 1
        self.rest_until = time.monotonic() + 0.05 * self.failed_starts
        if self.failed_starts >= _FAILED_STARTS and not self.running:
            for task in self.waiting:
                self._report(task, "unjudged", f"{NOT_STARTED}: {why}")
            self.waiting.clear()
            self.failed_starts = 0

    def _dispatch(self) -> None:
        idle = [worker for worker in self.workers if worker.idle]
        while self.waiting and len(self.running) < self.size:
            needed = 2 if self.waiting[0].job["kind"] == "test" else 1
            if len(idle) < needed:
                return
            task = self.waiting.pop(0)
            task.workers = [idle.pop(0) for _ in range(needed)]
            self._begin(task)

    def _begin(self, task: Task) -> None:
        job, limits = task.job, self.limits
        task.attempts += 1
        task.started, task.replies, task.verdict = time.monotonic(), [], ""
        task.base = [(worker.usage()[0], worker.waited()) for worker in task.workers]
        task.delay = run_delay("self")
        self.running.append(task)
        size = limits["disk"] << 20
        rlimits = {"RLIMIT_AS": limits["memory"] << 20, "RLIMIT_FSIZE": size}
        rlimits |= {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64, "RLIMIT_MEMLOCK": 0}
        # seconds, counted from the start of the process: a second wall behind _check
        rlimits["RLIMIT_CPU"] = math.ceil(limits["cpu"]) + 2
        if self.launch.command:
            rlimits["RLIMIT_NPROC"] = limits["threads"]
        for worker in task.workers:
            worker.task = task
        program, *tests = task.workers
        kind = "call" if tests else job["kind"]
        # not the rest of the job: the tests know what is expected
        known = {name: job[name] for name in ("code", "entry", "stdin")}
        program.send(encode({**known, "kind": kind, "limits": rlimits}))
        for call in job["calls"]:
            program.send(call)
        for worker in tests:
            rlimits = {**rlimits, "RLIMIT_CPU": 2 * rlimits["RLIMIT_CPU"]}
            known = {name: job[name] for name in ("before", "tests", "entry", "kind")}
            worker.send(encode({**known, "limits": rlimits}))

    # ---- what the sandboxes say

    def _message(self, worker: Worker, message: bytes) -> None:
        task = worker.task
        if not worker.ready:
            if message == b"ready" and worker.find_inside():
                worker.ready, self.failed_starts = True, 0
            else:
                worker.kill("no start")
        elif task is None:
            worker.kill("spoke unasked")
        elif worker is not task.workers[0]:
            self._tests_message(task, message)
        elif message == b"started" and not task.replies:
            task.replies.append(message)
            worker.raw = task.job["kind"] == "program"
            if worker.raw:
                worker.received = len(worker.output)
        elif len(task.workers) == 2:
            # what defines the program is no answer
            if len(task.replies) < 2:
                task.replies.append(message)
            else:
                task.workers[1].send(message)
        else:
            task.replies.append(message)
            # started, defined, and an answer to each call
            if len(task.replies) == 2 + len(task.job["calls"]):
                self._finish(task, "done")

    def _tests_message(self, task: Task, message: bytes) -> None:
        if message[:1] == b"c":
            task.workers[0].send(message[1:])
        elif message != b"started":
            task.replies = [message]
            self._finish(task, "done")

    def _exited(self, worker: Worker) -> None:
        self.workers.remove(worker)
        task = worker.task
        if not worker.ready:
            self._start_failed(f"exit status {worker.process.returncode}")
        if task is None or task not in self.running:
            return
        status = worker.process.returncode
        raw = worker.raw and not task.verdict
        if raw and status == 0:
            self._finish(task, "done", stdout=bytes(worker.output))
        elif task.verdict == "unjudged":
            self._finish(task, "unjudged", "the machine was too busy to run it")
        elif task.verdict:
            self._finish(task, task.verdict)
        # the kernel's own limit, where this process was too late
        elif status == 137 and worker.cpu > self.limits["cpu"]:
            self._finish(task, "cpu")
        elif self._fault(task, worker, status):
            self._retry(task, f"a process of the sandbox ended with status {status}")
        else:
            self._finish(task, "crashed", f"exit status {status}")

    def _fault(self, task: Task, worker: Worker, status: int) -> bool:
        """Whether the sandbox, not the program, ended this worker."""
        if worker.killed == "closed":
            return False
        # a signal to bubblewrap itself, or SIGKILL to the interpreter: the program can send neither
        return not task.replies or worker is not task.workers[0] or status < 0 or status == 137

    def _retry(self, task: Task, why: str) -> None:
        if task.attempts >= _ATTEMPTS:
            self._finish(task, "unjudged", why)
            return
        self._release(task)
        task.workers = []
        self.waiting.insert(0, task)

    def _finish(self, task: Task, status: str, detail: str = "", stdout: bytes = b"") -> None:
        self._report(task, status, detail, stdout)
        self._release(task)

    def _release(self, task: Task) -> None:
        self.running.remove(task)
        for worker in task.workers:
            worker.task = None
            worker.kill("done")

    # ---- limits

    def _check(self, now: float) -> None:
        for task in self.running:
            if any(worker.received > self.limits["output"] << 10 for worker in task.workers):
                self._end(task, "output")
        if now - self.checked < _TICK:
            return
        self.checked = now
        for worker in self.workers:
            if not worker.ready and now - worker.started > _START:
                worker.kill("no start")
            elif now - worker.killed_at > _CLOSED:
                worker.kill("no end", wrapper=True)
            # a program may close its output and go on, but a call can then not be answered
            elif worker.task is not None and not worker.raw and now - worker.closed_at > _CLOSED:
                worker.kill("closed")
        for task in self.running:
            verdict = self._broken(task, now)
            if verdict:
                self._end(task, verdict)

    def _end(self, task: Task, verdict: str) -> None:
        task.verdict = task.verdict or verdict
        for worker in task.workers:
            worker.kill(verdict)

    def _broken(self, task: Task, now: float) -> str:
        """The limit that a task has broken; empty for none."""
        limits = self.limits
        for index, worker in enumerate(task.workers):
            cpu, threads = worker.usage()
            # the tests of a program may take as long again
            if cpu - task.base[index][0] > limits["cpu"] * (1 + index):
                return "cpu"
            if threads > limits["threads"]:
                return "threads"
        elapsed = now - task.started
        if elapsed <= limits["wall"]:
            return ""
        waited = run_delay("self") - task.delay
        for worker, (_, before) in zip(task.workers, task.base, strict=True):
            waited += worker.waited() - before
        if elapsed - waited > limits["wall"]:
            return "wall"
        return "unjudged" if elapsed > limits["patience"] else ""


def end_group() -> None:
    """End this process and every bubblewrap that is still starting.

    One that is killed between its two processes leaves the second waiting for the first, for ever,
    in this process group; once it has left the group, it reads the end of its input or dies with
    the first.
    """
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve the socket that is standard input; the first message has the settings."""
    connection = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    head = connection.recv(4, socket.MSG_WAITALL)
    size = int.from_bytes(head, "big")
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size or not head:
        return
    try:
        Runner(connection, decode(data)).run()
    # the end of the group is the end of this process too, before Python would print it
    except Exception:
        traceback.print_exc()
    finally:
        end_group()
