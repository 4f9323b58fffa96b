"""The benchmark block of README.md, from the committed result files."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from benchmarks.report import fits
from benchmarks.report.records import OURS, STEP, Contest, Record, Result, head, positions
from benchmarks.report.wording import MIB, NONE, ROOT, number, plural, table, where

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MARKS = (
    "<!-- benchmarks: written by benchmarks/report.py from committed results; do not edit -->",
    "<!-- end of benchmarks -->",
)
# What people use today; they have columns of their own.
USUAL = ("torch", "TRL", "Liger")
COST, PEAK = attrgetter("cost"), attrgetter("peak")


def committed() -> list[Path]:
    """Result files that git knows; where there is no git, all that are there."""
    files = sorted(RESULTS.glob("*.json"))
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", "benchmarks/results"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return files
    known = {ROOT / name for name in answer.stdout.split("\0") if name}
    return files if answer.returncode else [path for path in files if path in known]


def _over(contest: Contest, record: Record, value: Callable[[Record], float | None]) -> str:
    """2.10x; **0.90x** where it beats us, in which a wrong result of ours counts as beaten."""
    theirs, ours = value(record), value(contest.ours)
    if not ours or theirs is None:
        return NONE
    text = f"{theirs / ours:.2f}x"
    if not record.exact:
        return f"*{text} (inexact)*"
    return f"**{text}**" if theirs < ours or not contest.ours.exact else text


def _first(contest: Contest, value: Callable[[Record], float | None]) -> str:
    """The rival with the least time or memory."""
    known = [r for r in contest.rivals if value(r) is not None]
    if not known:
        return NONE
    least = min(known, key=value)
    return f"{least.peer} {_over(contest, least, value)}"


def _row(contest: Contest) -> list[str]:
    ours = contest.ours
    speed = f"{number(ours.median * 1e3)} ms"
    if contest.level == STEP:
        speed = f"{number(ours.tokens / ours.median)} tokens/s"
    if ours.peak is not None:
        speed += f", {number(ours.peak / MIB)} MiB"
    n = positions(contest.case)
    shape = ([] if n is None else [f"N {n}"]) + [head(contest.case)]
    forward = " (forward only)" if contest.direction == "forward" else ""
    row = [
        f"{contest.level} {contest.case['name']}{forward}",
        ", ".join(part for part in shape if part),
        speed if ours.exact else f"{speed} (inexact)",
        _first(contest, COST),
        _first(contest, PEAK),
    ]
    peers = {record.peer: record for record in contest.records}
    for name in USUAL:
        record = peers.get(name)
        cells = [] if record is None else [_over(contest, record, f) for f in (COST, PEAK)]
        row.append(", ".join(cells) or NONE)
    return row


def _block(result: Result) -> list[str]:
    """One result file: where it comes from and its table."""
    shown = [c for c in result.contests if c.ours is not None]
    # forward passes alone are left to the report, but for those that we lose
    rows = [c for c in shown if c.direction != "forward" or c.lost or c.smaller is not None]
    source, report = where(result.path), where(result.path.with_suffix(".md"))
    threads = plural(result.machine["threads"], "thread")
    versions = result.machine["versions"]
    state = " with uncommitted changes" if result.dirty else ""
    header = ("case", "shape", OURS, "fastest other", "smallest other", *USUAL)
    lines = [
        f"**{result.machine['device_name']}**, {threads}, torch {versions.get('torch', NONE)},"
        f" {result.date[:10]}, commit {result.commit[:10]}{state}. Every number of this table is"
        f" from [`{source}`]({source}); all contestants, errors, spreads, charts and who could not"
        f" run are in its [report]({report}).",
        "",
        *table(header, map(_row, rows)),
        "",
        *fits.readme_lines(result, USUAL),
    ]
    if left := len(shown) - len(rows):
        lines += [f"Also in the report, none lost: {plural(left, 'case')} of a forward pass.", ""]
    return lines


def readme_block(results: list[Result]) -> str:
    """What stands between the two marks of README.md."""
    if not results:
        return (
            "No result file is committed: this repository claims no speed and no memory figure,"
            " **on a GPU or elsewhere.**"
        )
    lines = [line for result in results for line in _block(result)]
    lines += [
        "The others are given as their time over ours and their peak memory (above inputs and"
        " gradients) over ours: below 1, in **bold**, they beat us. Fastest and smallest are chosen"
        " among the contestants whose result is right."
    ]
    if all(result.machine["device"] == "cpu" for result in results):
        lines += ["", "No result file of a GPU is committed: **no GPU figure exists yet.**"]
    return "\n".join(lines)


def replaced(text: str, block: str) -> str:
    """The text of a README with this block between the marks.

    Raises:
        ValueError: there are not exactly two marks, in their order.
    """
    if [text.count(mark) for mark in MARKS] != [1, 1] or text.index(MARKS[0]) > text.index(
        MARKS[1]
    ):
        raise ValueError(f"README.md: expected the two lines {MARKS[0]} and {MARKS[1]}, once each")
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{block}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"
