"""Durations that were measured elsewhere, handed to pytest-benchmark.

Contestants that are timed in turn finish together, while pytest-benchmark times one function after
the other. So the harness measures by itself and `replay` gives pytest-benchmark what it measured:
the test's timer is a clock that shows the recorded durations, one for each round.

    @recorded
    def test_something(benchmark):
        replay(benchmark, durations)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest


class Recorded:
    """A timer in seconds: 0 when a round is set up, its recorded duration when it has run."""

    __name__ = "recorded"

    def __init__(self, durations: Sequence[float] = ()) -> None:
        self.load(durations)

    def load(self, durations: Sequence[float]) -> None:
        """Start over, with these durations for the coming rounds."""
        self._left: Iterator[float] = iter(durations)
        self._now = 0.0

    def rewind(self) -> None:
        # From 0 the difference that pytest-benchmark takes is the duration itself, to the bit.
        self._now = 0.0

    def advance(self) -> None:
        # a profiler asks for one more round than there are
        self._now = next(self._left, 0.0)

    def __call__(self) -> float:
        return self._now


_clock = Recorded()
recorded = pytest.mark.benchmark(timer=_clock)


def replay(benchmark: Any, durations: Sequence[float]) -> None:
    """Make `durations`, in seconds, the rounds of a test that is marked `@recorded`.

    Args:
        benchmark: the fixture, unused so far.
        durations: at least one, in the order in which they were measured.

    Raises:
        ValueError: there are no durations, or the test is not marked.
    """
    if not durations:
        raise ValueError("durations: expected at least one, got none")
    _clock.load(durations)
    benchmark.pedantic(_clock.advance, setup=_clock.rewind, rounds=len(durations))
    if benchmark.enabled and benchmark.stats["data"] != list(durations):
        raise ValueError("benchmark: expected a test marked @recorded, got one with another timer")
