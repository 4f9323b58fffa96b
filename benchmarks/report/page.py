"""Result files -> a Markdown page and charts for each, and the results of README.md and docs/.

`python -m benchmarks.report [FILES...] [--readme]`: without FILES every file of benchmarks/results;
page and charts stand beside their file. --readme also writes the rows of README.md and the tables
of docs/benchmarks.md, from the committed files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import fits
from benchmarks.report.readme import BLOCKS, RESULTS, committed, replaced
from benchmarks.report.records import (
    OURS,
    STEP,
    Contest,
    Record,
    Result,
    floor_of,
    head,
    positions,
    read,
)
from benchmarks.report.wording import (
    LEVELS,
    MIB,
    NONE,
    memory_verdict,
    name_of,
    number,
    plural,
    table,
    verdict,
    versus,
    where,
)

HOW_TO_READ = f"""\
- Median and interquartile range (IQR) of the rounds. The contestants of a case ran in turn, round
  by round, on the same tensors.
- `vs {OURS}`: by how much a contestant is slower or faster. What beats {OURS}, in time or in
  memory, is **bold**.
- Peak MiB: what a pass allocates at its worst moment, above inputs and gradients.
- Useful TFLOP/s and GB/s: the least work that gives this result, over the time; the same work for
  all, so what is computed twice or for nothing does not count. The share is of this machine's own
  measured ceiling.
- Errors are relative L2 distances from float64. *inexact*: above the gate of its dtype; not ranked,
  whatever its time. A whole step has no float64 truth: its contestants are compared with each other
  (largest difference of a step's loss and gradient norm, and of what the steps added to the
  weights)."""


def _columns(result: Result, contest: Contest) -> dict[str, Callable[[Record], str]]:
    """Column -> what it says of a contestant; columns that say nothing are left out later."""

    def peak(r: Record) -> str:
        if r.peak is None:
            return NONE
        beats = r in contest.rivals and contest.ours and (contest.ours.peak or 0) > r.peak
        return f"**{number(r.peak / MIB)}**" if beats else number(r.peak / MIB)

    def rate(r: Record) -> str:
        floor = floor_of(r)
        return NONE if floor is None else number(floor / r.median / unit)

    def share(r: Record) -> str:
        value = result.share(r)
        return NONE if value is None else f"{100 * value:.1f} %"

    logits = contest.level == "logits"
    unit, of = (1e9, "copy") if logits else (1e12, "GEMM")
    compared = "difference" if contest.level == STEP else "error"
    columns: dict[str, Callable[[Record], str]] = {
        "contestant": lambda r: r.peer,
        "median ms": lambda r: number(r.median * 1e3),
        "IQR ms": lambda r: number(r.iqr * 1e3),
        "rounds": lambda r: str(r.rounds),
        f"vs {OURS}": lambda r: versus(contest, r),
        "tokens/s": lambda r: number(r.tokens / r.median) if r.level == STEP else NONE,
        "peak MiB": peak,
        "GB/s" if logits else "useful TFLOP/s": rate,
        f"of {of} ceiling": share,
    }
    for key in dict.fromkeys(k for r in contest.records for k in r.error):
        columns[f"{compared} of {key}"] = lambda r, key=key: (
            f"{r.error[key]:.1e}" if r.error.get(key) is not None else NONE
        )
    columns["right"] = lambda r: (
        NONE if r.info.get("exact") is None else "yes" if r.exact else "*inexact*"
    )
    return columns


def _section(result: Result, contest: Contest) -> list[str]:
    """A case: its shape, its verdict, its table."""
    one = contest.records[0]
    tokens = f"{plural(one.tokens, 'token')} unmasked"
    if "active_tokens" in one.info:
        tokens += f", {one.info['active_tokens']} of them with a non-zero advantage"
    n = positions(contest.case)
    shape = f"N = {contest.case['B']} x {contest.case['T']} = {n}, " if n is not None else ""
    shape += f"{head(contest.case)}; " if head(contest.case) else ""
    rows = [[f(r) for f in _columns(result, contest).values()] for r in contest.records]
    header = list(_columns(result, contest))
    kept = [k for k in range(len(header)) if any(row[k] != NONE for row in rows)]
    title = f"{contest.case['name']}{f', {contest.direction}' if contest.direction else ''}"
    return [
        f"### {title}",
        "",
        f"{shape}{tokens}. {verdict(contest)} {memory_verdict(contest)}".rstrip(),
        "",
        *table([header[k] for k in kept], [[row[k] for k in kept] for row in rows]),
        "",
    ]


def _ceilings(result: Result) -> str:
    gemm = result.machine.get("gemm_flops") or {}
    parts = [f"matrix product {t} {number(v / 1e12)} TFLOP/s" for t, v in gemm.items()]
    copy = result.machine.get("copy_bytes_per_s")
    parts += [f"copy {number(copy / 1e9)} GB/s (read and written)"] if copy else []
    return "; ".join(parts) or "not measured"


def _header(result: Result) -> list[str]:
    machine = result.machine
    state = " **with uncommitted changes**" if result.dirty else ""
    digest = f", sources {result.sources}" if result.sources else ""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    rows = [
        ("device", f"{machine['device_name']} ({machine['device']})"),
        ("driver", machine["driver"] or "none"),
        ("threads", machine["threads"]),
        ("versions", versions),
        ("commit", f"{result.commit}{state}{digest}"),
        ("date", f"{result.date[:16].replace('T', ' ')} UTC"),
        ("measured ceilings", _ceilings(result)),
        ("data", f"[{result.path.name}]({result.path.name})"),
    ]
    return [
        f"# Benchmarks: {machine['device_name']}, {result.date[:10]}",
        "",
        *table(("", ""), rows),
    ]


def summary(result: Result) -> list[str]:
    """How many cases are won, and every one that is not."""
    contests = [c for c in result.contests if c.ours is not None]
    lost = [c for c in contests if c.lost]
    won = sum(c.won for c in contests)
    smaller = [c for c in contests if c.smaller is not None]
    lines = [
        f"In {won} of {plural(len(contests), 'case')} {OURS} is the fastest contestant with a right"
        f" result, in {len(lost)} it is not; in {len(smaller)} another needs less memory."
    ]
    others = [c for c in contests if not c.won or c.smaller is not None]
    if others:
        rows = [(name_of(c), verdict(c), memory_verdict(c) or NONE) for c in others]
        lines += ["", *table(("case", "time", "memory"), rows)]
    return lines + fits.summary(result)


def _not_run(result: Result) -> list[str]:
    if not result.skipped:
        return ["Nothing: every contestant ran every case."]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry in result.skipped:
        key = (entry["peer"], entry["level"], entry["reason"])
        groups.setdefault(key, []).append(entry["case"])
    rows = [
        (peer, f"{level}: {', '.join(dict.fromkeys(cases))}", reason)
        for (peer, level, reason), cases in sorted(groups.items())
    ]
    return table(("contestant", "level and cases", "reason"), rows)


def _contestants(result: Result) -> list[str]:
    """Who took part; what is called may differ from level to level."""
    rows: dict[tuple[str, str, str], None] = {}
    for peer in result.peers:
        for record in (
            r for c in result.contests + result.fits for r in c.records if r.peer == peer
        ):
            what = record.info.get("what") or NONE
            rows[peer, record.info.get("version") or NONE, what] = None
    return table(("contestant", "version", "what is called"), rows)


def page(result: Result, charts: dict[str, Path]) -> str:
    """The whole report of one result file as Markdown."""
    lines = [
        *_header(result),
        "",
        *summary(result),
        "",
        "## How to read the tables",
        "",
        HOW_TO_READ,
    ]
    lines += ["", "## Contestants", "", *_contestants(result), ""]
    if charts:
        lines += ["## Charts", ""]
        for title, path in charts.items():
            lines += [f"![{title}]({path.name})", ""]
        if "Time by N" not in charts:
            lines += ["Nothing is drawn by N: no head was measured at two values of N.", ""]
    level = None
    for contest in result.contests:
        if contest.level != level:
            level = contest.level
            lines += [f"## {level}: {LEVELS[level]}" if level in LEVELS else f"## {level}", ""]
        lines += _section(result, contest)
    lines += fits.sections(result)
    return "\n".join([*lines, "## Not run", "", *_not_run(result)]) + "\n"


def write(path: Path) -> list[Path]:
    """The report and the charts of a result file, beside it; returns what was written."""
    result = read(path)
    # only here: the tables of the pages need no matplotlib
    from benchmarks.report.charts import draw

    charts = draw(result, where(path), path.parent, path.stem)
    target = path.with_suffix(".md")
    target.write_text(page(result, charts), encoding="utf-8")
    return [target, *charts.values()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILES", help="result files")
    parser.add_argument(
        "--readme", action="store_true", help="also write README.md and docs/benchmarks.md"
    )
    given = parser.parse_args(arguments)
    files = given.files or sorted(RESULTS.glob("*.json"))
    if not files and not given.readme:
        sys.exit(f"error: no result file given and none in {where(RESULTS)}/")
    try:
        for path in files:
            print("\n".join(where(p) for p in write(path)))
        if given.readme:
            results = [read(path) for path in committed()]
            for block in BLOCKS:
                text = block.page.read_text(encoding="utf-8")
                block.page.write_text(replaced(text, block, results), encoding="utf-8")
                print(where(block.page))
    # Boundary: a file that cannot be used is the user's to mend, no traceback helps.
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}; the charts need matplotlib")


if __name__ == "__main__":
    main()
