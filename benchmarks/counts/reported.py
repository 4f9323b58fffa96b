"""Public timings of kernels whose source is compiled here, to hold the model against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .machines import H100_COPY_RATE, MACHINES
from .records import Count


@dataclass(frozen=True)
class Reported:
    """A time that somebody published, and the count that it is held against."""

    source: str
    gpu: str
    what: str
    contestant: str
    launch: str
    kinds: tuple[str, ...]
    """Passes whose times add up."""
    N: int
    V: int
    milliseconds: float
    note: str


TIMES = (
    Reported(
        "huggingface/trl#7244 (2026-09)",
        "H100",
        "log-prob and entropy, forward, bf16",
        "TRL",
        "logprob_entropy bf16 V=151936",
        ("read",),
        8192,
        151936,
        0.89,
        "a kernel of 40 lines, not necessarily the one that TRL ships, which is counted here",
    ),
    Reported(
        "linkedin/Liger-Kernel#1290 (2026-07)",
        "H100",
        "cross entropy, forward and backward, bf16",
        "Liger",
        "cross_entropy bf16 V=151936",
        ("read", "read and write"),
        8192,
        32000,
        0.7975,
        "the whole operator: two checks of the targets that make the host wait, and an L2 of 50 MB "
        "beside logits of 524 MB, are in it",
    ),
)


def held(counts: Iterable[Count]) -> Iterator[tuple[Reported, float, float]]:
    """(timing, counted ms of issue at boost clock, ms of memory) of each timing whose launch is
    among the counts of sm_90."""
    counts = [c for c in counts if c.target == "sm_90"]
    machine = MACHINES["sm_90"]
    for timing in TIMES:
        mine = [
            c
            for c in counts
            if (c.contestant, c.launch) == (timing.contestant, timing.launch)
            and c.kind in timing.kinds
        ]
        if mine:
            logits = timing.N * timing.V
            lanes = machine.sms * machine.issue * machine.boost
            issue = sum(c.instructions for c in mine) * logits / lanes
            memory = sum(c.bytes for c in mine) * logits / H100_COPY_RATE
            yield timing, 1e3 * issue, 1e3 * memory
