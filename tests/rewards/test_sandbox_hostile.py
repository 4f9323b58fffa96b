"""Hostile programs: none earns anything, learns anything, harms anything or outlives its limit.

The programs are the sections of hostile.txt. They run in one batch, honest ones between them, so
that a program which harms its neighbours shows. GRPO_FAST_SANDBOX=full runs the batch five times.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from pathlib import Path

import pytest

from grpo_fast.rewards.code import code_reward
from grpo_fast.rewards.sandbox import Limits, Program, Sandbox, SandboxUnavailable
from grpo_fast.rewards.sandbox.child import encode
from grpo_fast.rewards.sandbox.command import find_bwrap

TEXT = (Path(__file__).parent / "hostile.txt").read_text(encoding="utf-8")
SECTIONS = [section.partition("\n") for section in TEXT.split("\n=== ")[1:]]
PROGRAMS = {head.split(" | ")[0]: code for head, _, code in SECTIONS}
AIMS = {head.split(" | ")[0]: head.split(" | ")[1] for head, _, _ in SECTIONS}
# those that are after the verdict meet a test body too
CUNNING = [name for name, aim in AIMS.items() if aim in ("forge", "leak", "pool")]
REPEATS = 5 if os.environ.get("GRPO_FAST_SANDBOX") == "full" else 1
LIMITS = {"cpu": 0.3, "wall": 1.0, "memory": 256, "output": 64, "disk": 8}
HONEST = "def f(x):\n    return x * x + 1\n"


def _bubblewrap() -> bool:
    try:
        find_bwrap()
    except SandboxUnavailable:
        return False
    return True


pytestmark = pytest.mark.skipif(not _bubblewrap(), reason="needs bubblewrap")


def _sandboxed() -> set[int]:
    """Processes that are sandboxed interpreters or the bubblewrap around one."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"posix.read(0, " in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


class _World:
    """What hostile programs are after: a file, two sockets, a secret, this process."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / "canary.txt"
        self.canary.write_text("untouched")
        self.secret = secrets.randbits(60) | 1 << 60
        self.visits: list[str] = []
        self.port = socket.create_server(("127.0.0.1", 0))
        self.path = socket.socket(socket.AF_UNIX)
        self.path.bind(str(folder / "socket"))
        self.named = socket.socket(socket.AF_UNIX)
        self.named.bind("\0" + str(folder / "socket"))
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(self.port.getsockname())
        for listening in (self.port, self.path, self.named):
            listening.listen()
            threading.Thread(target=self._accept, args=(listening,), daemon=True).start()
        self.datagrams.setblocking(False)
        self.words = {
            "@CANARY@": str(self.canary),
            "@UNIX@": str(folder / "socket"),
            "@PORT@": str(self.port.getsockname()[1]),
            "@PARENT@": str(os.getpid()),
        }

    def _accept(self, listening: socket.socket) -> None:
        while True:
            listening.accept()
            self.visits.append(str(listening.getsockname()))

    def program(self, name: str) -> str:
        code = PROGRAMS[name]
        for word, value in self.words.items():
            code = code.replace(word, value)
        return code


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The batch, run REPEATS times; what came of it is in its attributes."""
    os.environ["SECRET_OF_THE_TRAINER"] = "a secret of the environment"
    world = _World(tmp_path_factory.mktemp("outside"))
    before = _sandboxed()
    started = time.monotonic()
    reward = code_reward(**LIMITS)
    names, completions, expected = [], [], []
    for name in list(PROGRAMS) * REPEATS:
        names += [name, "honest"]
        completions += [world.program(name), HONEST]
        expected += [world.secret, 10]
    cases = [[[[3], value]] for value in expected]
    rewards = reward(completions, entry_point=["f"] * len(names), cases=cases)
    world.rewards = {name: [] for name in names}
    for name, value in zip(names, rewards, strict=True):
        world.rewards[name].append(value)
    bodies = [world.program(name) for name in CUNNING]
    tests = [f"assert candidate(3) == {world.secret}"] * len(bodies)
    judged = reward(bodies, entry_point=["f"] * len(bodies), test=tests)
    world.judged = dict(zip(CUNNING, judged, strict=True))
    reward.close()
    world.seconds = time.monotonic() - started
    deadline = time.monotonic() + 5
    while (left := _sandboxed() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    world.survivors = left
    del os.environ["SECRET_OF_THE_TRAINER"]
    return world


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program_earns_nothing(world, name):
    """0 with cases and against a test body, and that is a verdict: not None."""
    assert world.rewards[name] == [0.0] * REPEATS
    assert world.judged.get(name, 0.0) == 0.0


def test_there_are_sixty_and_more():
    assert len(PROGRAMS) >= 60
    assert set(AIMS.values()) == {"forge", "leak", "write", "network", "limit", "pool"}


def test_honest_neighbours_are_judged_right(world):
    assert world.rewards["honest"] == [1.0] * len(PROGRAMS) * REPEATS


def test_nothing_outside_was_touched(world):
    assert world.canary.read_text() == "untouched"
    assert sorted(path.name for path in world.canary.parent.iterdir()) == ["canary.txt", "socket"]
    for folder in ("/", "/usr/lib", "/dev", "/etc", os.path.dirname(os.__file__)):
        assert not (Path(folder) / "canary-written").exists()


def test_no_network_was_reached(world):
    assert world.visits == []
    with pytest.raises(BlockingIOError):
        world.datagrams.recv(1)


def test_nothing_survives(world):
    assert world.survivors == set()


def test_no_program_outlived_its_limit(world):
    """All limits together on one core, and as much again for the start of each."""
    runs = REPEATS * len(PROGRAMS) + len(CUNNING)
    assert world.seconds < runs * (LIMITS["wall"] + 1)


def test_no_expected_value_comes_out(tmp_path):
    """Whatever the leaking programs return, neither the secret nor the environment is in it.

    The secret is in `tests`, which a program that is called must not be given.
    """
    world = _World(tmp_path)
    tests = f"assert candidate(3) == {world.secret}"
    programs = [
        Program("call", world.program(name), "f", (encode([[3], {}]),), tests=tests)
        for name, aim in AIMS.items()
        if aim == "leak"
    ]
    sandbox = Sandbox(Limits(**{**LIMITS, "output": 4096}))
    outcomes = sandbox.run(programs)
    sandbox.close()
    assert len(outcomes) >= 10
    everything = repr(outcomes)
    for text in (str(world.secret), f"{world.secret:x}", "untouched", "of the environment"):
        assert text not in everything
    # what is inside does come out, so this test can fail
    assert "serve_calls" in everything
