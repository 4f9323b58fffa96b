"""floors.json -> floors.md."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from . import reported
from .launches import OURS, WIDE
from .linear_page import linear_lines
from .machines import H100_COPY_RATE, MACHINES
from .model import BESIDE, READ, REWRITE, WRITE, room
from .records import Count, from_json, launch_ms, rows_in_flight, whole
from .tables import percent, table

HOW_TO_READ = """\
- Nothing here was timed. The kernels are compiled for GPUs that are not at hand, disassembled, and
  their innermost loops counted; the time is a model over the counts, with its assumptions below.
- Instructions are those of a thread per logit: the loop's, over the logits that a thread handles
  in one trip. `odd tiles`: those of a second loop, masked, for the tile of the target and the last
  one. `row`: of a whole row, with two odd tiles and, once for each program, everything that is in
  no loop (statistics of the row, the loss), all branches counted, those that a row does not take
  too: an upper bound. In a launch of two passes that is counted in both.
- MUFU: exponentials and conversions at 16 lanes a clock. LSU: loads and stores, shared memory too.
- Barriers are per 1,024 logits of a program; loads are what a trip reads from global memory.
- Share: of the rate at which this GPU copies memory, as the busiest of issue, FMA, ALU and MUFU
  allows; 100 % means bound by memory. A real streaming kernel then still loses 5 to 12 % to DRAM
  and to the end of the launch.
- `write` is the row of zeros of a token without a gradient; it takes the place of the other
  pass. `beside the products`: row work of a kernel that makes the logits itself, all branches
  counted. `merge of parts`: a second kernel that joins what several programs found in a row."""
_COUNT = (
    "launch,target,kernel,pass,instructions,FMA,ALU,MUFU,LSU,shuffle,other,barriers,odd tiles,"
    "row,B,loads,warps,registers,spill B,occupancy,waves,row at 80 % issue,80 % issue,100 %,"
    "100 % at boost"
)
_MACHINE = (
    "target,GPU,SMs,clock GHz,boost GHz,copy TB/s,L2 MiB,issue,FMA,ALU,MUFU,room bf16 read,"
    "room fp32 read"
)
_LAUNCH = (
    "launch,B,80 % issue,100 %,100 % at boost,rows in flight MiB,second read in L2,"
    "ms of 8192 rows at 80 %,with the second read in L2"
)
_REPORTED = "source,GPU,what,size,reported ms,counted ms,memory ms,note"


def _pipe(count: Count, *names: str) -> str:
    return f"{sum(count.pipes.get(name, 0.0) for name in names):.2f}"


def count_rows(counts: Iterable[Count]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the full table."""
    rows = []
    for c in counts:
        loads = ", ".join(f"{n} x {size} B" for size, n in c.loads.items())
        rows.append(
            [
                c.launch if c.contestant == OURS else f"{c.contestant} {c.launch}",
                c.target,
                c.kernel,
                c.kind,
                f"**{c.instructions:.2f}**",
                *(_pipe(c, name) for name in ("fma", "alu", "mufu", "lsu", "shuffle")),
                _pipe(c, "uniform", "control", "tensor", "barrier"),
                f"{c.barriers:.2f}",
                f"{c.odd:.2f}" if c.odd else "-",
                f"{c.row:.2f}",
                f"{c.bytes:.0f}",
                loads or "-",
                str(c.num_warps),
                str(c.registers),
                str(c.spill),
                percent(c.resident * c.num_warps / MACHINES[c.target].warps),
                f"{c.waves:.2f}",
                percent(c.share_row),
                percent(c.share_80),
                percent(c.share_100),
                percent(c.share_boost),
            ]
        )
    return _COUNT.split(","), rows


def _head(data: dict[str, Any]) -> list[str]:
    changed = ", with changes not committed" if data["dirty"] else ""
    return [
        "# Floors: the row kernels' machine code, counted",
        "",
        *table(
            ("", ""),
            (
                ("versions", ", ".join(f"{k} {v}" for k, v in data["versions"].items())),
                ("also with", ", ".join(f"triton {v}" for v in list(data["ours"])[1:]) or "-"),
                ("commit", f"{data['commit']}{changed}"),
                ("date", data["date"]),
                ("data", "[floors.json](floors.json)"),
            ),
        ),
        "",
        "## How to read the tables",
        "",
        HOW_TO_READ,
        "",
    ]


def _assumptions() -> list[str]:
    rows = [
        [
            m.target,
            m.name,
            m.sms,
            f"{m.clock / 1e9:g}",
            f"{m.boost / 1e9:g}",
            f"{m.copy_rate / 1e12:g}",
            m.l2_bytes >> 20,
            m.issue,
            m.fma,
            m.alu,
            m.mufu,
            f"{room(2, m):.1f}",
            f"{room(4, m):.1f}",
        ]
        for m in MACHINES.values()
    ]
    return [
        "## Assumptions",
        "",
        "Lanes a clock and SM (compute unit). Room: instructions per logit that fit while a logit "
        "moves at the copy rate, every slot filled. On gfx942 issue counts vector instructions "
        "alone: the others start beside them.",
        "",
        *table(_MACHINE.split(","), rows),
        "",
    ]


# What to compare: a pass of ours, and those of other contestants that give the same.
_CONTESTS = (
    ("forward bf16", READ, "logprob_fwd bf16 V=151936", " bf16"),
    ("forward fp32", READ, "logprob_fwd fp32 V=151936", " fp32"),
    ("backward bf16", REWRITE, "logprob_bwd bf16 V=151936", " bf16"),
    ("backward fp32", REWRITE, "logprob_bwd fp32 V=151936", " fp32"),
)


def _contests(ours: list[Count], peers: list[Count]) -> list[str]:
    names = sorted({_name(c) for c in peers if c.kind != BESIDE})
    rows = []
    for title, kind, launch, dtype in _CONTESTS:
        mine = [
            c
            for c in ours
            if c.target == "sm_90"
            and c.kind == kind
            and c.launch.replace(" no entropy", "").replace(" dentropy", "") == launch
        ]
        theirs = [c for c in peers if c.kind == kind and dtype in c.launch]
        least = min((c.instructions for c in theirs), default=None)
        line = [title, _values(mine), f"{least:.2f}" if least else "-"]
        rows.append([*line, *(_values([c for c in theirs if _name(c) == name]) for name in names)])
    return [
        "## Beside other libraries, sm_90",
        "",
        "Instructions per logit. With (e): the entropy is made, or its gradient taken, too.",
        "",
        *table(("pass", OURS, "least of the others", *names), rows),
        "",
    ]


def _name(count: Count) -> str:
    return f"{count.contestant} {count.launch.split()[0]}"


def _has_entropy(count: Count) -> bool:
    """Whether the pass makes the entropy, or takes its gradient."""
    if count.kind == REWRITE:
        return "dentropy" in count.launch
    if count.contestant == OURS:
        return "no entropy" not in count.launch
    # one of TRL's makes it always
    return "dentropy" in count.launch or count.launch.startswith("logprob_entropy")


def _values(counts: list[Count]) -> str:
    """12.1 / 15.0 (e), each once."""
    values = {f"{c.instructions:.2f}{' (e)' * _has_entropy(c)}" for c in counts}
    return " / ".join(sorted(values)) or "-"


def _launches(ours: list[Count]) -> list[str]:
    """Launches that visit a row twice: both passes together, and whether L2 serves the second."""
    rows = []
    for (launch, target), group in groupby(ours, key=lambda c: (c.launch, c.target)):
        both = list(group)
        if target != "sm_90" or f"V={WIDE}" not in launch or whole(both, 0.8) is None:
            continue
        reads = next(c for c in both if c.kind == READ)
        flight = rows_in_flight(reads, round(reads.bytes), WIDE)
        l2 = MACHINES[target].l2_bytes
        rows.append(
            [
                launch,
                f"{sum(c.bytes for c in both if c.kind != WRITE):.0f}",
                percent(whole(both, 0.8)),
                percent(whole(both, 1.0)),
                percent(whole(both, 1.0, boost=True)),
                f"{flight / 2**20:.0f} of {l2 >> 20}",
                "yes" if flight <= l2 else "no",
                f"{launch_ms(both, second_read_in_l2=False):.2f}",
                f"{launch_ms(both, second_read_in_l2=True):.2f}",
            ]
        )
    return [
        "## Launches of two passes, sm_90",
        "",
        "Log-prob, loss and gradient in one launch: the rows are read, then read and written. "
        "Where the rows in flight fit L2 the second read need not come from memory.",
        "",
        *table(_LAUNCH.split(","), rows),
        "",
    ]


def _few(ours: list[Count]) -> list[str]:
    """Launches of fewer rows than there are SMs."""
    machine = MACHINES["sm_90"]
    rows = [
        (
            c.launch,
            c.kind,
            f"{c.programs:.0f}",
            f"{min(c.programs, machine.sms):.0f}",
            f"{c.waves:.2f}",
        )
        for c in ours
        if c.target == "sm_90" and "rows=" in c.launch and c.kind != WRITE
    ]
    return [
        "## Few rows, sm_90",
        "",
        f"How many of the {machine.sms} SMs have work.",
        "",
        *table(("launch", "pass", "programs", "SMs at work", "waves"), rows),
        "",
    ]


def _targets(runs: dict[str, list[Count]]) -> list[str]:
    """Instructions, registers and spills of every launch, a column for each target and Triton."""
    columns = [(version, target) for version in runs for target in MACHINES]
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for version, counts in runs.items():
        for c in counts:
            spill = f", spill {c.spill}" if c.spill else ""
            text = f"{c.instructions:.1f}, {c.registers}{spill}"
            cells.setdefault((c.launch, c.kind), {})[version, c.target] = text
    rows = [[*key, *(found.get(column, "-") for column in columns)] for key, found in cells.items()]
    header = ["launch", "pass", *(f"{target}, {version}" for version, target in columns)]
    return [
        "## Every target and both Tritons",
        "",
        "Instructions per logit, registers of a thread, and bytes spilled where there are any.",
        "",
        *table(header, rows),
        "",
    ]


def _reported(peers: list[Count]) -> list[str]:
    rows = [
        (
            timing.source,
            timing.gpu,
            timing.what,
            f"{timing.N} x {timing.V}",
            f"{timing.milliseconds:g}",
            f"{issue:.3f}",
            f"{memory:.3f}",
            timing.note,
        )
        for timing, issue, memory in reported.held(peers)
    ]
    return [
        "## Counted beside reported",
        "",
        "The longer of the two times is the model's: issue with every slot filled at boost clock, "
        f"and memory at {H100_COPY_RATE / 1e12:g} TB/s.",
        "",
        *table(_REPORTED.split(","), rows),
        "",
    ]


def page(data: dict[str, Any]) -> str:
    """The page of a result."""
    runs = {version: from_json(entries) for version, entries in data["ours"].items()}
    ours = next(iter(runs.values()))
    peers = from_json(data["peers"])
    lines = _head(data)
    lines += _contests(ours, peers)
    lines += _launches(ours)
    lines += _few(ours)
    lines += ["## Ours, sm_90", ""]
    lines += [*table(*count_rows(c for c in ours if c.target == "sm_90")), ""]
    lines += ["## Other libraries, sm_90", ""]
    lines += [*table(*count_rows(peers)), ""]
    if data["skipped"]:
        lines += ["Not counted:", ""]
        lines += [f"- {s['contestant']} {s['launch']}: {s['reason']}" for s in data["skipped"]]
        lines += [""]
    lines += _targets(runs)
    lines += _reported(peers)
    lines += linear_lines(data["linear"])
    lines += _assumptions()
    return "\n".join(lines).rstrip() + "\n"
