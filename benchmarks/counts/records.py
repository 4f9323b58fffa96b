"""One count = one visit of one kernel of one launch to its rows, as it stands in floors.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

from .assembly import PIPES
from .compile import Kernel, compiled
from .contestants import NO_LOGITS
from .launches import OURS, ROWS, Case
from .machines import MACHINES, Machine
from .model import BESIDE, EFFICIENCY, MERGE, READ, REWRITE, Pass, merge, passes, share, waves


@dataclass(frozen=True)
class Count:
    """What a page says of one pass; instructions and bytes are per logit."""

    contestant: str
    launch: str
    target: str
    kernel: str
    kind: str
    """A kind of `model`."""
    instructions: float
    pipes: dict[str, float]
    bytes: float
    loads: dict[str, int]
    """Bytes of a load -> loads in a trip."""
    barriers: float
    """Per 1,024 logits."""
    odd: float
    """Instructions of the longest other loop of the kind (target's tile, last tile)."""
    trip: float
    """Logits of a thread in one trip of the loop; in its program where there is none."""
    row: float
    """Instructions of a whole row per logit: two odd tiles, the loop for the others, and for each
    of its programs what is outside the loops, all branches counted."""
    num_warps: int
    registers: int
    spill: int
    """Bytes of a thread."""
    shared: int
    """Bytes of a program."""
    resident: int
    """Programs beside each other on an SM."""
    programs: float
    """Of the launch, at `ROWS` rows for other contestants."""
    waves: float
    share_row: float | None
    """Predicted share of the copy rate at 80 % issue by the instructions of `row`."""
    share_80: float | None
    """Predicted share of the copy rate at 80 % issue; None where no logits move."""
    share_100: float | None
    share_boost: float | None
    """At 100 % issue and the boost clock."""
    issue_ms: float
    """Milliseconds of issue alone for 8,192 rows of 151,936, every slot filled, at boost clock."""

    @property
    def wide(self) -> bool:
        """Whether every load of the loop is of 16 bytes or more."""
        return bool(self.loads) and min(int(size) for size in self.loads) >= 16


# The size of the public timings, and what issue_ms is for.
TIMED_LOGITS = 8192 * 151936


def counts(case: Case, target: str) -> Iterator[Count]:
    """The passes of a launch on a target of `compile.TARGETS`."""
    machine = MACHINES[target]
    out = case.dtype if case.out is None else case.out
    seen = set()
    for kernel in compiled(case.launch, target):
        if kernel.name in NO_LOGITS:
            continue
        sizes = case.dtype.itemsize, out.itemsize
        logits = case.rows * case.V
        visits = passes(kernel, *sizes, logits, machine.warp)
        # a launch reads its rows once: a second kernel that reads joins what the first one left
        if READ in seen and [v.kind for v in visits] == [READ]:
            visits = [merge(kernel, logits, machine.warp)]
        seen |= {v.kind for v in visits}
        for visit in visits:
            yield _count(case, kernel, visit, machine)


def _count(case: Case, kernel: Kernel, visit: Pass, machine: Machine) -> Count:
    each = case.rows * case.V / kernel.programs / visit.threads
    # their functions run on a few rows, a row of the page is for as many as ours
    programs = kernel.programs * (1 if case.contestant == OURS else ROWS / case.rows)
    moves = visit.kind not in (BESIDE, MERGE)
    row = _row(kernel, visit, each, case.V)
    longer = replace(visit, **_scaled(visit, row / visit.per_logit))
    return Count(
        contestant=case.contestant,
        launch=case.name,
        target=kernel.target,
        kernel=kernel.name,
        kind=visit.kind,
        instructions=visit.per_logit,
        pipes={p: visit.pipe(p) for p in PIPES if visit.pipe(p)},
        bytes=visit.bytes_per_logit,
        loads={str(size): n for size, n in visit.loads.items()},
        barriers=visit.barriers_per_1024,
        odd=visit.odd,
        trip=visit.logits,
        row=row,
        num_warps=kernel.num_warps,
        registers=kernel.registers,
        spill=kernel.spill,
        shared=kernel.shared,
        resident=machine.resident(kernel.registers, kernel.num_warps, kernel.shared),
        programs=programs,
        waves=waves(kernel, machine, programs),
        share_row=share([longer], machine) if moves else None,
        share_80=share([visit], machine) if moves else None,
        share_100=share([visit], machine, 1.0) if moves else None,
        share_boost=share([visit], machine, 1.0, boost=True) if moves else None,
        issue_ms=1e3 * TIMED_LOGITS * visit.seconds(machine, 1.0, machine.boost),
    )


def _row(kernel: Kernel, visit: Pass, each: float, V: int) -> float:
    """each: logits of a thread in its program, whose share of the row may be a part of it."""
    if not visit.looped:
        return visit.per_logit
    tile = visit.logits * visit.threads
    odd = 2 * (visit.odd - visit.per_logit) * tile / V if visit.odd else 0.0
    return visit.per_logit + odd + len(kernel.code.outside) / each


def _scaled(visit: Pass, factor: float) -> dict[str, object]:
    """Fields of a pass that has so many times the instructions, of the same mix."""
    pipes = {name: n * factor for name, n in visit.pipes.items()}
    return {"instructions": visit.instructions * factor, "pipes": pipes}


def whole(counts: Iterable[Count], efficiency: float, boost: bool = False) -> float | None:
    """Share of the copy rate of a launch that reads its rows, and reads and writes them: the bytes
    of both at the copy rate over the time of both. None unless it has both."""
    visits = {c.kind: c for c in counts if c.kind in (READ, REWRITE)}
    if len(visits) < 2:
        return None
    field = "share_boost" if boost else ("share_100" if efficiency == 1.0 else "share_80")
    moved = sum(c.bytes for c in visits.values())
    return moved / sum(c.bytes / getattr(c, field) for c in visits.values())


def launch_ms(counts: Iterable[Count], second_read_in_l2: bool) -> float:
    """Milliseconds of `TIMED_LOGITS` through a launch of two passes, at 80 % issue."""
    visits = {c.kind: c for c in counts if c.kind in (READ, REWRITE)}
    total = 0.0
    for kind, count in visits.items():
        machine = MACHINES[count.target]
        issue = count.issue_ms * machine.boost / machine.clock / EFFICIENCY
        from_l2 = visits[READ].bytes if second_read_in_l2 and kind == REWRITE else 0.0
        moved = (count.bytes - from_l2) * TIMED_LOGITS
        total += max(issue, 1e3 * moved / machine.copy_rate)
    return total


def rows_in_flight(count: Count, itemsize: int, V: int) -> float:
    """Bytes of the rows that programs beside each other are working on, one program a row."""
    machine = MACHINES[count.target]
    return min(count.resident * machine.sms, count.programs) * V * itemsize


def as_json(counts: Iterable[Count]) -> dict[str, list[object]]:
    """For a file: the names of the fields and a row for each count, numbers to three digits behind
    the point, those of the pipes to two."""

    def short(value: object) -> object:
        if isinstance(value, float):
            return round(value, 3)
        return {k: round(v, 2) for k, v in value.items()} if isinstance(value, dict) else value

    names = [field.name for field in fields(Count)]
    return {"fields": names, "rows": [[short(getattr(c, n)) for n in names] for c in counts]}


def from_json(data: dict[str, list]) -> list[Count]:
    """Counts of a file.

    Raises:
        ValueError: the file has other fields than a count of this version.
    """
    names = [field.name for field in fields(Count)]
    if data["fields"] != names:
        different = ", ".join(sorted(set(names) ^ set(data["fields"])))
        raise ValueError(f"counts: expected the fields of this version, got others: {different}")
    return [Count(**dict(zip(names, row, strict=True))) for row in data["rows"]]
