"""How numbers, tables and verdicts of the benchmark reports are worded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.report.records import OURS, STEP, Contest, Record

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
NONE = "-"
LEVELS = {
    "linear": "the loss from hidden states and the lm_head",
    "logits": "the loss from logits",
    "logprob": "log-probs from hidden states and the lm_head",
    STEP: "a whole optimizer step",
}


def plural(count: int, noun: str) -> str:
    """1 case, 2 cases."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number(value: float | None) -> str:
    """Three significant digits, never in exponents: 0.0123, 1.23, 12.3, 1,234."""
    if value is None:
        return NONE
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    text = f"{value:#.3g}"
    return f"{value:.8f}".rstrip("0") if "e" in text else text.rstrip(".")


def cell(text: object) -> str:
    """On one line, and no column mark."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell(text) for text in line)} |" for line in lines]


def where(path: Path) -> str:
    """A path as the reader of the repository sees it, never one of this machine."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def name_of(contest: Contest) -> str:
    """Level, pass and case."""
    return " ".join(
        part for part in (contest.level, contest.direction, contest.case["name"]) if part
    )


def versus(contest: Contest, record: Record) -> str:
    """1.00 for ours; 2.00x slower; **2.00x faster** where the other beats us."""
    ratio = contest.ratio(record)
    if ratio is None:
        return NONE
    if record.peer == OURS:
        return "1.00" if record.exact else "1.00 (inexact)"
    if ratio >= 1:
        text = f"{ratio:.2f}x slower"
        return text if record.exact else f"{text} (inexact)"
    text = f"{1 / ratio:.2f}x faster"
    return f"**{text}**" if record.exact else f"{text} (inexact, not ranked)"


def verdict(contest: Contest) -> str:
    """Won or lost in time, against whom, and whether that is more than the spread."""
    ours, rivals = contest.ours, contest.rivals
    if ours is None:
        return f"{OURS} was not measured here."
    if contest.level == STEP and not ours.exact:
        return "**Not ranked**: the contestants' steps differ by more than the gate."
    if not ours.exact:
        return f"**Lost**: {OURS} is inexact here, so that its time does not count."
    if not rivals:
        return f"No other contestant with a right result was measured; {OURS} has nobody to beat."
    best = min(rivals, key=lambda r: r.cost)
    # the middle halves of the rounds overlap
    near = abs(best.median - ours.median) <= (best.iqr + ours.iqr) / 2
    end = " (within the spread)." if near else "."
    if contest.lost:
        return f"**Lost**: {best.peer} is {ours.cost / best.cost:.2f}x faster{end}"
    return f"Won: the next, {best.peer}, is {best.cost / ours.cost:.2f}x slower{end}"


def memory_verdict(contest: Contest) -> str:
    """Who needs the least memory, where that is not ours; else nothing."""
    least = contest.smaller
    if least is None:
        return ""
    need, ours = number(least.peak / MIB), number(contest.ours.peak / MIB)
    return f"**Lost on memory**: {least.peer} needs {need} MiB, {OURS} {ours} MiB."
