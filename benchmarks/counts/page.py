"""floors.json -> floors.md."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from . import reported
from .launches import OURS, WIDE
from .machines import MACHINES
from .model import READ, REWRITE, WRITE, room
from .records import Count, rows_in_flight, whole
from .result import read

HOW_TO_READ = """\
- Nothing here was timed. The kernels are compiled for GPUs that are not at hand, disassembled, and
  their innermost loops counted; the time is a model over the counts, with its assumptions below.
- Instructions are those of a thread per logit: the loop's, over the logits that a thread handles in
  one trip. `outside` is everything that is in no loop (target, tail tile, statistics of the row),
  all branches counted, over the logits of a thread in its whole row.
- MUFU: exponentials and conversions at 16 lanes a clock. LSU: loads and stores, shared memory too.
- Barriers are per 1,024 logits of a program; loads are what a trip reads from global memory.
- Share: of the rate at which this GPU copies memory, as the busiest of issue, FMA, ALU and MUFU
  allows; 100 % means bound by memory. A real streaming kernel then still loses 5 to 12 % to DRAM
  and to the end of the launch.
- `write` is the row of zeros of a token without a gradient; it takes the place of the other pass."""


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    ]


def percent(value: float | None) -> str:
    """87 %, or a dash."""
    return "-" if value is None else f"{100 * value:.0f} %"


def _pipe(count: Count, *names: str) -> str:
    return f"{sum(count.pipes.get(name, 0.0) for name in names):.2f}"


def count_rows(counts: Iterable[Count]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the full table."""
    header = (
        "launch,target,kernel,pass,instructions,FMA,ALU,MUFU,LSU,shuffle,other,barriers,outside,"
        "B,loads,warps,registers,spill B,waves,80 % issue,100 %,100 % at boost"
    ).split(",")
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
                f"{c.outside:.2f}",
                f"{c.bytes:.0f}",
                loads or "-",
                str(c.num_warps),
                str(c.registers),
                str(c.spill),
                f"{c.waves:.2f}",
                percent(c.share_80),
                percent(c.share_100),
                percent(c.share_boost),
            ]
        )
    return header, rows


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
    header = (
        "target,GPU,SMs,clock GHz,boost GHz,copy TB/s,L2 MiB,issue,FMA,ALU,MUFU,"
        "room bf16 read,room fp32 read"
    ).split(",")
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
        *table(header, rows),
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
    names = sorted({f"{c.contestant} {c.launch.split()[0]}" for c in peers})
    rows = []
    for title, kind, launch, dtype in _CONTESTS:
        mine = [
            c.instructions
            for c in ours
            if c.target == "sm_90" and c.kind == kind and c.launch.split(" entropy")[0] == launch
        ]
        line = [title, " / ".join(f"**{value:.2f}**" for value in mine) or "-"]
        for name in names:
            found = {
                f"{c.instructions:.2f}" + (" (entropy)" if "dentropy" in c.launch else "")
                for c in peers
                if f"{c.contestant} {c.launch.split()[0]}" == name
                and c.kind == kind
                and dtype in c.launch
            }
            line.append(" / ".join(sorted(found)) or "-")
        rows.append(line)
    return [
        "## Beside other libraries, sm_90",
        "",
        "Instructions per logit. An entry with (entropy) also makes or takes the entropy's gradient.",
        "",
        *table(("pass", OURS, *names), rows),
        "",
    ]


def _launches(ours: list[Count]) -> list[str]:
    """Launches that visit a row twice: both passes together, and whether L2 serves the second."""
    rows = []
    for (launch, target), group in groupby(ours, key=lambda c: (c.launch, c.target)):
        both = list(group)
        if target != "sm_90" or f"V={WIDE}" not in launch:
            continue
        if whole(both, 0.8) is None:
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
            ]
        )
    header = "launch,B,80 % issue,100 %,100 % at boost,rows in flight MiB,second read in L2"
    return [
        "## Launches of two passes, sm_90",
        "",
        "Log-prob, loss and gradient in one launch: the rows are read, then read and written. Where "
        "the rows in flight fit L2 the second read need not come from memory.",
        "",
        *table(header.split(","), rows),
        "",
    ]


def _targets(runs: dict[str, list[Count]]) -> list[str]:
    """Instructions, registers and spills of every launch, a column for each target and Triton."""
    columns = [(version, target) for version in runs for target in MACHINES]
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for version, counts in runs.items():
        for c in counts:
            text = f"{c.instructions:.1f}, {c.registers}" + (
                f", spill {c.spill}" if c.spill else ""
            )
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


def _linear(data: dict[str, Any]) -> list[str]:
    linear = data["linear"]
    shape, rates = linear["shape"], linear["rates"]
    lines = [
        "## The linear path",
        "",
        f"N = {shape['N']}, H = {shape['H']}, V = {shape['V']}, trainable head, bf16 operands, one "
        f"pass, at {rates['flops'] / 1e12:g} TFLOP/s and {rates['copy'] / 1e12:g} TB/s. The floor, "
        f"6NHV, is {1e3 * linear['floor']:.1f} ms. Two times for each term: traffic that a product "
        "may hide behind its arithmetic, hidden, and not.",
        "",
    ]
    rows = []
    for design in linear["designs"]:
        least = sum(term["least"] for term in design["terms"])
        most = sum(term["most"] for term in design["terms"])
        rows.append(
            [
                design["name"],
                " + ".join(map(str, design["chunks"])),
                f"{1e3 * least:.1f} to {1e3 * most:.1f}",
                f"**{percent(design['share_hidden'])} to {percent(design['share_none_hidden'])}**",
                f"{sum(design['peak_bytes'].values()) / 1e9:.2f}",
            ]
        )
    lines += [*table(("design", "chunks", "ms", "share of the floor", "peak GB"), rows), ""]
    for design in linear["designs"]:
        lines += [f"### {design['name']}", ""]
        terms = [
            (t["what"], t["formula"], f"{1e3 * t['least']:.2f}", f"{1e3 * t['most']:.2f}")
            for t in design["terms"]
        ]
        lines += [*table(("term", "bytes or FLOPs", "ms, hidden", "ms, not hidden"), terms), ""]
        held = ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in design["peak_bytes"].items())
        lines += [f"Held when dW is finished: {held}.", ""]
    lines += [
        "## From logits",
        "",
        f"bf16, N = {shape['N']}, V = {shape['V']}: the row kernel and the upstream factor. 20 B "
        "per logit: through fp32 in blocks; 4: in one pass; 0: it is 1. Rows of 4 B: the second "
        "read hits L2.",
        "",
        *table(
            ("bytes per logit", "ms"),
            ((name, f"{1e3 * t:.2f}") for name, t in linear["from_logits"].items()),
        ),
        "",
    ]
    return lines


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
    header = "source,GPU,what,size,reported ms,counted ms of issue at boost,ms of memory at 3.0 TB/s,note"
    return [
        "## Counted beside reported",
        "",
        "The longer of the two counted times is the model's; every slot filled.",
        "",
        *table(header.split(","), rows),
        "",
    ]


def page(data: dict[str, Any]) -> str:
    """The page of a result."""
    runs = {version: read(entries) for version, entries in data["ours"].items()}
    ours = next(iter(runs.values()))
    peers = read(data["peers"])
    lines = _head(data)
    lines += _contests(ours, peers)
    lines += _launches(ours)
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
    lines += _linear(data)
    lines += _assumptions()
    return "\n".join(lines).rstrip() + "\n"
