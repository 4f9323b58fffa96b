"""What README.md and docs/benchmarks.md say of the committed result files."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import fits
from benchmarks.report.records import OURS, STEP, Contest, Record, Result, head, positions
from benchmarks.report.wording import LEVELS, MIB, NONE, ROOT, number, plural, table, where

RESULTS = ROOT / "benchmarks" / "results"
# What people use today; they have columns of their own.
USUAL = ("torch", "TRL", "Liger")
COST, PEAK = attrgetter("cost"), attrgetter("peak")
# The rows of README.md: level and case. Kept whoever wins them.
FRONT = (
    (STEP, "smollm2-step-rollout"),
    ("linear", "qwen3-0.6b-rollout"),
    ("logits", "smollm2-logits"),
    ("logprob", "smollm2-logprob"),
)
# how result files name a pass forward and backward
BOTH = "forward+backward"
NO_GPU = "No result file of a GPU is committed: **no GPU figure exists yet.**"


class Block(NamedTuple):
    """A part of a page that is written from the result files."""

    page: Path
    marks: tuple[str, str]
    text: Callable[[list[Result]], str]


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


def _speed(contest: Contest) -> str:
    """Our time, or tokens per second, and our peak memory."""
    ours = contest.ours
    speed = f"{number(ours.median * 1e3)} ms"
    if contest.level == STEP:
        speed = f"{number(ours.tokens / ours.median)} tokens/s"
    if ours.peak is not None:
        speed += f", {number(ours.peak / MIB)} MiB"
    return speed if ours.exact else f"{speed} (inexact)"


def _shape(contest: Contest) -> str:
    n = positions(contest.case)
    shape = ([] if n is None else [f"N {n}"]) + [head(contest.case)]
    return ", ".join(part for part in shape if part)


def _row(contest: Contest) -> list[str]:
    forward = " (forward only)" if contest.direction == "forward" else ""
    row = [
        f"{contest.level} {contest.case['name']}{forward}",
        _shape(contest),
        _speed(contest),
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
        f" from [`{source}`](../{source}); all contestants, errors, spreads, charts and who could"
        f" not run are in its [report](../{report}).",
        "",
        *table(header, map(_row, rows)),
        "",
        *fits.page_lines(result, USUAL),
    ]
    if left := len(shown) - len(rows):
        lines += [f"Also in the report, none lost: {plural(left, 'case')} of a forward pass.", ""]
    return lines


def tables(results: list[Result]) -> str:
    """The tables of docs/benchmarks.md: every case."""
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
    if _no_gpu(results):
        lines += ["", NO_GPU]
    return "\n".join(lines)


def _no_gpu(results: list[Result]) -> bool:
    return all(result.machine["device"] == "cpu" for result in results)


def front(results: list[Result]) -> str:
    """The rows of README.md, and how many cases are won and lost in all."""
    timed = [(result, c) for result in results for c in result.contests if c.ours is not None]
    rows = [
        (
            LEVELS[c.level],
            _shape(c),
            _speed(c),
            _first(c, COST),
            _first(c, PEAK),
            f"[{result.machine['device_name']}, {result.date[:10]}]"
            f"({where(result.path.with_suffix('.md'))})",
        )
        for level, name in FRONT
        for result, c in timed
        if (c.level, c.case["name"], c.direction) in ((level, name, ""), (level, name, BOTH))
    ]
    if not rows:
        return "No result file is committed: no speed and no memory figure is claimed here."
    header = ("what", "shape", OURS, "fastest other", "smallest other", "measured on")
    won = sum(c.won for _, c in timed)
    lost = sum(c.lost for _, c in timed)
    smaller = sum(c.smaller is not None for _, c in timed)
    lines = [
        *table(header, rows),
        "",
        "Another library's time over ours, and its peak memory over ours: below 1, in **bold**, it"
        f" beats us. Of {plural(len(timed), 'timed case')} {OURS} is the fastest in {won} and"
        f" is beaten in {lost}; in {smaller} another needs less memory. Every case, every"
        " contestant and how to measure again: [docs/benchmarks.md](docs/benchmarks.md).",
    ]
    return "\n".join(lines + (["", NO_GPU] if _no_gpu(results) else []))


BLOCKS = (
    Block(
        ROOT / "README.md",
        (
            "<!-- results: written by `python -m benchmarks.report --readme`; do not edit -->",
            "<!-- end of results -->",
        ),
        front,
    ),
    Block(
        ROOT / "docs" / "benchmarks.md",
        (
            "<!-- benchmarks: written by `python -m benchmarks.report --readme`; do not edit -->",
            "<!-- end of benchmarks -->",
        ),
        tables,
    ),
)


def replaced(text: str, block: Block, results: list[Result]) -> str:
    """The text of a page with what the results say between the block's marks.

    Raises:
        ValueError: there are not exactly two marks, in their order.
    """
    start, end = block.marks
    if [text.count(mark) for mark in block.marks] != [1, 1] or text.index(start) > text.index(end):
        raise ValueError(
            f"{where(block.page)}: expected the two lines {start} and {end}, once each"
        )
    before, rest = text.split(start)
    return f"{before}{start}\n{block.text(results)}\n{end}{rest.split(end)[1]}"
