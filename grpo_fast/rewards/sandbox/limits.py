"""What one program may use, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

NOT_STARTED = "the sandbox did not start"


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Raises:
        ValueError: for a limit that is not positive and finite, or whole where it has to be.
    """

    cpu: float = 2.0
    """Seconds of CPU, of all threads together."""
    wall: float = 10.0
    """Seconds from the start of the program without those it waited for a free core."""
    memory: int = 512
    """MiB of address space."""
    output: int = 256
    """KiB of results, or of standard output."""
    disk: int = 16
    """MiB of files in its only writable folder, and of one file."""
    threads: int = 32
    """Threads at a time, its first included."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            whole = isinstance(entry.default, int)
            kinds = (int,) if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{entry.name}: expected {kind} above 0, got {value!r}.")

    @property
    def patience(self) -> float:
        """Seconds after which a program that never got a core counts as not judged."""
        return max(60.0, 10 * self.wall)


@dataclass(frozen=True)
class Program:
    """One program to run.

    `kind` says how: "call" defines the code and calls `entry` with each of `calls`; "program" runs
    it as a script on `stdin`; "test" runs `tests` in a second sandbox, where `candidate` calls
    `entry` in the first.
    """

    kind: str
    code: str
    entry: str = ""
    calls: tuple[bytes, ...] = ()
    """Each the encoding of [arguments, keywords]."""
    stdin: bytes = b""
    before: str = ""
    """Code that runs in front of the tests, beside them."""
    tests: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    `status` is "done"; or why it was ended: "cpu", "wall", "output", "threads", "crashed"; or
    "unjudged" when the sandbox itself failed, which says nothing about the program; or "skipped".
    """

    status: str
    detail: str = ""
    replies: tuple[bytes, ...] = ()
    """Of a call: one message for each that was answered; of a test: the verdict."""
    stdout: bytes = b""
    cpu: float = 0.0
    """Seconds of CPU that the sandbox and the program used from its start."""
    wall: float = 0.0

    @property
    def judged(self) -> bool:
        """Whether the program has been run to its end or to a limit of its own."""
        return self.status not in ("unjudged", "skipped")
