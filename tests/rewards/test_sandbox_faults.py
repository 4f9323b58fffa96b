"""When the sandbox itself fails: no hang, no false zero, nothing left behind.

GRPO_FAST_SANDBOX=full injects 500 faults instead of 40.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_fast.rewards import code
from grpo_fast.rewards.code import code_reward
from grpo_fast.rewards.sandbox import (
    Limits,
    Program,
    Sandbox,
    SandboxUnavailable,
    available_cores,
    command,
    pool,
)
from grpo_fast.rewards.sandbox.child import encode

ROOT = Path(__file__).resolve().parents[2]
FULL = os.environ.get("GRPO_FAST_SANDBOX") == "full"


def _bubblewrap() -> bool:
    try:
        command.find_bwrap()
    except SandboxUnavailable:
        return False
    return True


pytestmark = pytest.mark.skipif(not _bubblewrap(), reason="needs bubblewrap")


def _program(code: str, argument: int = 3) -> Program:
    return Program("call", code, "f", (encode([[argument], {}]),))


SQUARE = _program("def f(x): return x * x")
NAP = _program("import time\ndef f(x):\n    time.sleep(0.2)\n    return x * x")


def _right(outcome) -> bool:
    return outcome.status == "done" and outcome.replies[-1] == b"vi9;"


def _commands(parent: int | None = None) -> dict[int, bytes]:
    """Command lines of the processes of a sandbox, of one parent or of any."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            line = (entry / "cmdline").read_bytes()
            status = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            alive = status[0] != b"Z" and (parent is None or int(status[1]) == parent)
            if alive and (b"posix.read(0, " in line or b"sandbox.runner" in line):
                found[int(entry.name)] = line
    return found


def _gone(pids: set[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while pids & _commands().keys() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not pids & _commands().keys()


@pytest.fixture
def sandbox():
    """A sandbox that ends with the test and leaves nothing."""
    before = set(_commands())
    sandbox = Sandbox(Limits(cpu=1.0, wall=5.0))
    yield sandbox
    sandbox.close()
    assert _gone(set(_commands()) - before)


def _victims(sandbox: Sandbox) -> dict[str, list[int]]:
    runner = sandbox._process.pid
    wrappers = list(_commands(runner))
    inside = [pid for wrapper in wrappers for pid in _commands(wrapper)]
    return {"runner": [runner], "wrapper": wrappers, "inside": inside}


def _kill_during(sandbox: Sandbox, kinds: list[str], pause: float) -> threading.Thread:
    def kill():
        for kind in kinds:
            time.sleep(random.uniform(0, pause))
            with contextlib.suppress(ProcessLookupError, IndexError, AttributeError):
                os.kill(random.choice(_victims(sandbox)[kind]), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_killed_processes_give_no_false_verdict(sandbox):
    """Runner, bubblewrap and interpreter killed at random: every verdict right, or None."""
    faults, judged, unjudged = 500 if FULL else 40, 0, 0
    sandbox.run([SQUARE])
    for _ in range(faults // 20):
        kinds = random.choices(["wrapper", "inside", "runner"], [10, 10, 1], k=20)
        thread = _kill_during(sandbox, kinds, 0.08)
        while thread.is_alive():
            for outcome in sandbox.run([SQUARE, NAP, SQUARE, SQUARE]):
                assert _right(outcome) or outcome.status == "unjudged", outcome
                judged += outcome.judged
                unjudged += not outcome.judged
        thread.join()
    assert all(map(_right, sandbox.run([SQUARE] * 20)))
    assert judged > 10 * unjudged


def test_a_program_that_is_killed_each_time_is_not_judged(sandbox):
    sandbox.run([SQUARE])
    stop = threading.Event()

    def kill():
        while not stop.is_set():
            for pid in _victims(sandbox)["inside"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = sandbox.run([NAP])[0]
    stop.set()
    thread.join()
    assert outcome.status == "unjudged" and "ended with status" in outcome.detail


def test_killed_tests_do_not_fail_the_program(sandbox):
    """The second sandbox, in which the test body runs, is killed: the program is not to blame."""
    tests = "import time\ntime.sleep(0.2)\nassert candidate(3) == 9"
    program = Program("test", "def f(x): return x * x", "f", tests=tests)
    sandbox.run([SQUARE])
    thread = _kill_during(sandbox, ["inside"] * 3, 0.15)
    outcomes = sandbox.run([program] * 3)
    thread.join()
    assert all(o.status == "unjudged" or o.replies == (b"p",) for o in outcomes), outcomes
    assert any(outcome.judged for outcome in outcomes)


def test_a_runner_that_cannot_start_sandboxes(sandbox):
    """Out of file handles: not judged and said why; judged again when there are some."""
    sandbox.run([SQUARE])
    runner = sandbox._process.pid
    limits = resource.prlimit(runner, resource.RLIMIT_NOFILE)
    resource.prlimit(runner, resource.RLIMIT_NOFILE, (3, limits[1]))
    outcomes = sandbox.run([SQUARE] * 30)
    missing = [outcome for outcome in outcomes if not outcome.judged]
    assert missing and all("Too many open files" in outcome.detail for outcome in missing)
    assert all(_right(outcome) for outcome in outcomes if outcome.judged)
    resource.prlimit(runner, resource.RLIMIT_NOFILE, limits)
    assert all(map(_right, sandbox.run([SQUARE] * 10)))
    assert sandbox._process.pid == runner


def test_a_stopped_runner_is_replaced(sandbox):
    sandbox.run([SQUARE])
    stopped = sandbox._process.pid
    sandbox._socket.settimeout(0.3)
    os.kill(stopped, signal.SIGSTOP)
    assert _right(sandbox.run([SQUARE])[0])
    assert sandbox._process.pid != stopped and _gone({stopped})


def test_an_interrupt_leaves_a_sandbox_that_works(sandbox):
    def interrupt(index, outcome):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sandbox.run([SQUARE] * 8, on_outcome=interrupt)
    assert all(map(_right, sandbox.run([SQUARE] * 8)))


def test_threads_take_turns_and_may_end(sandbox):
    """bubblewrap dies with the thread that started it: none of ours may be that thread."""
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(sandbox.run([SQUARE] * 5))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 30 and all(map(_right, results))
    time.sleep(0.3)
    assert all(map(_right, sandbox.run([SQUARE] * 5)))


def test_a_forked_process_has_a_runner_of_its_own(sandbox):
    sandbox.run([SQUARE])
    parents = sandbox._process.pid
    child = os.fork()
    if child == 0:
        # whatever happens here must not run the rest of the tests twice
        try:
            right = _right(sandbox.run([SQUARE])[0]) and sandbox._process.pid != parents
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _right(sandbox.run([SQUARE])[0]) and sandbox._process.pid == parents


SCRIPT = """
import sys, threading, time
from sandbox import Limits, Program, Sandbox
from sandbox.child import encode
sandbox = Sandbox(Limits(cpu=60, wall=60))
calls = (encode([[3], {}]),)
print(sandbox.run([Program("call", "def f(x): return x * x", "f", calls)])[0].status, flush=True)
if sys.argv[1] != "exit":
    endless = [Program("call", "import time\\ndef f(x): time.sleep(60)", "f", calls),
               Program("call", "def f(x):\\n    while True: pass", "f", calls)]
    threading.Thread(target=sandbox.run, args=(endless,), daemon=True).start()
    time.sleep(0.5)
    print("running", flush=True)
    time.sleep(1 if sys.argv[1] == "end" else 60)
"""


@pytest.mark.parametrize("ending", ["exit", "end", "SIGKILL", "SIGTERM", "SIGINT"])
def test_nothing_is_left_behind(ending):
    """However the trainer ends, with programs running or without."""
    before = set(_commands())
    # the package alone: with grpo_fast comes torch
    folders = [str(ROOT / "grpo_fast" / "rewards"), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    trainer = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert trainer.stdout.readline() == "done\n"
    if ending != "exit":
        assert trainer.stdout.readline() == "running\n"
        assert set(_commands()) - before
    if ending.startswith("SIG"):
        os.kill(trainer.pid, getattr(signal, ending))
    trainer.wait(20)
    trainer.stdout.close()
    assert _gone(set(_commands()) - before)


def test_a_killed_runner_takes_its_programs_along():
    sandbox = Sandbox(Limits(cpu=60, wall=60))
    before = set(_commands())
    sandbox.run([SQUARE])
    endless = _program("def f(x):\n    while True: pass")
    thread = threading.Thread(target=sandbox.run, args=([endless],), daemon=True)
    thread.start()
    time.sleep(0.5)
    sandbox._socket.close()
    started = set(_commands()) - before
    os.kill(sandbox._process.pid, signal.SIGKILL)
    assert len(started) > 2
    sandbox._start = lambda: (_ for _ in ()).throw(OSError("no more runners"))
    thread.join(10)
    assert not thread.is_alive() and _gone(started)


def test_dropping_the_sandbox_ends_it():
    sandbox = Sandbox()
    sandbox.run([SQUARE])
    pids = {sandbox._process.pid, *_commands(sandbox._process.pid)}
    del sandbox
    gc.collect()
    assert _gone(pids)


def _refusing(folder: Path, text: str) -> str:
    script = folder / "bwrap"
    script.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n")
    script.chmod(0o755)
    return str(script)


def test_no_sandbox_no_run(monkeypatch, tmp_path):
    """It says why and refuses; the program that would leave a mark never runs."""
    reason = "bwrap: No permissions to create a new namespace"
    monkeypatch.setattr(command, "find_bwrap", lambda: _refusing(tmp_path, reason))
    with pytest.raises(SandboxUnavailable, match=f"{reason}.*sandbox='none'") as caught:
        code_reward()
    assert isinstance(caught.value, ValueError)


def test_a_sandbox_with_a_hole_is_refused(monkeypatch):
    """The probe finds a missing filter, and a root that can be written to."""
    allow_all = b"\x06\x00\x00\x00\x00\x00\xff\x7f"
    with monkeypatch.context() as patch:
        patch.setattr(pool.seccomp, "build", lambda: allow_all)
        with pytest.raises(SandboxUnavailable, match="refused a process of its own, a socket"):
            code_reward()
    prepared = command.bwrap_command

    def without(option, value, count):
        def changed(*arguments):
            options, at = prepared(*arguments), 0
            while (
                at := next(
                    (
                        i
                        for i in range(at, len(options) - 1)
                        if options[i] == option and value in options[i + 1]
                    ),
                    -1,
                )
            ) >= 0:
                del options[at : at + count]
            return options

        return changed

    monkeypatch.setattr(command, "bwrap_command", without("--remount-ro", "/", 2))
    with pytest.raises(SandboxUnavailable, match="expected a program to be refused writing to /,"):
        code_reward()
    hiding = without("--tmpfs", "-packages", 4)
    monkeypatch.setattr(command, "bwrap_command", hiding)
    with pytest.raises(SandboxUnavailable, match="to be refused installed packages,"):
        code_reward()


def test_a_sandbox_that_fails_later_gives_none_and_says_so_once(monkeypatch, tmp_path, caplog):
    reward = code_reward()
    reward.close()
    settings = reward.sandbox._settings
    settings["command"] = [_refusing(tmp_path, "bwrap: gone")]
    code._warned.cache_clear()
    columns = {"entry_point": ["f"] * 3, "cases": [[[[3], 9]]] * 3}
    with caplog.at_level(logging.WARNING, logger="grpo_fast.rewards.code"):
        for _ in range(2):
            assert reward(["def f(x): return x * x"] * 3, **columns) == [None] * 3
    reward.close()
    said = [record for record in caplog.records if "could not judge" in record.getMessage()]
    assert len(said) == 1 and "did not start" in said[0].getMessage()


@pytest.mark.parametrize(
    ("system", "machine", "message"),
    [("darwin", "arm64", "got darwin on arm64"), ("linux", "riscv64", "got linux on riscv64")],
)
def test_other_machines_are_refused_by_name(monkeypatch, system, machine, message):
    monkeypatch.setattr(command.sys, "platform", system)
    monkeypatch.setattr(command.platform, "machine", lambda: machine)
    with pytest.raises(SandboxUnavailable, match=f"expected Linux on x86_64 or aarch64, {message}"):
        code_reward()


def test_without_bubblewrap(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    with pytest.raises(SandboxUnavailable, match=r"expected bubblewrap, found none.*\[sandbox\]"):
        code_reward()


def test_size_is_within_the_cores_of_a_rank(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(Path, "read_text", lambda path: "400000 100000")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_cores() == 4
    monkeypatch.setattr(Path, "read_text", lambda path: "max 100000")
    assert available_cores() == 8
    for ranks, cores in (("2", 4), ("3", 2), ("16", 1), ("many", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert available_cores() == cores


def test_never_more_at_a_time_than_its_size():
    """Two programs that each see the other's file cannot: one runs after the other."""
    sandbox = Sandbox(size=1)
    moments = []
    outcomes = sandbox.run([NAP] * 4, on_outcome=lambda *_: moments.append(time.monotonic()))
    sandbox.close()
    assert all(map(_right, outcomes))
    gaps = [b - a for a, b in zip(moments, moments[1:], strict=False)]
    assert min(gaps) > 0.15
