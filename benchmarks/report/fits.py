"""Level fit in reports and docs/benchmarks.md: what fits in a given memory, and who fits more."""

from __future__ import annotations

from operator import attrgetter

from benchmarks.report.records import OURS, Contest, Record, Result, head, positions
from benchmarks.report.wording import MIB, NONE, number, plural, table

INTRODUCTION = """\
Counted are the inputs of one loss step (hidden states, lm_head, ids, mask, advantages), the
gradients of the first two, and what a contestant allocates above them; every position is unmasked
and active. The rest of the model, its activations and the optimizer are not counted: they are the
same for all, so that all fit less next to a real model.

- A context is *run* where 95 % of it (or what is named) was run within the memory. It is
  *extrapolated* where that would have taken too long: it then stands on the line through the
  measured steps and is the most that can fit, since another moment of a step may need more at
  larger N.
- A model is *run* where a step with its head was run; *by its law* where its memory stands on the
  line through two smaller heads of the same vocabulary, which is the least that it needs.
- Contestants are ranked by what fits, not by time. What beats {OURS} is **bold**.""".replace(
    "{OURS}", OURS
)


def is_context(contest: Contest) -> bool:
    """Whether positions are asked for; else models."""
    return contest.direction == "longest context"


def _estimated(record: Record) -> bool:
    """Whether the answer was computed and not run."""
    return record.info.get("verified") is False or record.info.get("how") == "law"


def _plain(record: Record) -> str:
    """What fits, without a word on how it is known."""
    fits, smallest = record.info["fits"], record.info.get("run_positions")
    if "verified" not in record.info:
        return record.info["model"] or "none"
    return f"{fits:,}" if fits else f"fewer than {smallest:,}" if smallest else "none"


def _beats(contest: Contest, record: Record) -> bool:
    return contest.ours is not None and record.cost < contest.ours.cost


def answer(contest: Contest, record: Record) -> str:
    """What fits for a contestant; **bold** where that beats us, with * where it was not run."""
    text = _plain(record) + ("\\*" if record.info["fits"] and _estimated(record) else "")
    return f"**{text}**" if _beats(contest, record) else text


def _over(contest: Contest, record: Record) -> str:
    """A contestant's positions over ours."""
    if contest.ours is None or not contest.ours.info["fits"]:
        return NONE
    text = f"{record.info['fits'] / contest.ours.info['fits']:.2f}x"
    return f"**{text}**" if _beats(contest, record) else text


def verdict(contest: Contest) -> str:
    """Whether ours fits most, and by how much."""
    ours, rivals = contest.ours, contest.rivals
    if ours is None:
        return f"{OURS} was not measured here."
    if not rivals:
        return f"No other contestant was measured; {OURS} has nobody to beat."
    best = min(rivals, key=attrgetter("cost"))
    if not contest.won and not contest.lost:
        level = [r.peer for r in rivals if r.cost == ours.cost]
        what = "all the same" if ours.info["fits"] else "nothing"
        return f"Level: {_plain(ours) if ours.info['fits'] else what}, as {', '.join(level)}."
    computed = _estimated(ours) or _estimated(best)
    end = " (computed, not run)." if computed else "."
    if not is_context(contest):
        won = f"Won: {_plain(ours)}; the next, {best.peer}, fits {_plain(best)}{end}"
        return f"**Lost**: {best.peer} fits {_plain(best)}{end}" if contest.lost else won
    if not min(ours.info["fits"], best.info["fits"]):
        fuller, other = (best, ours) if contest.lost else (ours, best)
        what = f"{fuller.peer} fits {_plain(fuller)} positions, {other.peer} {_plain(other)}{end}"
        return f"**Lost**: {what}" if contest.lost else f"Won: {what}"
    if contest.lost:
        return f"**Lost**: {best.peer} fits {ours.cost / best.cost:.2f}x as many positions{end}"
    return f"Won: {best.cost / ours.cost:.2f}x the positions of the next, {best.peer}{end}"


def question(contest: Contest) -> str:
    """Longest context in 1 GiB, H 576, V 49152, float32."""
    case = contest.case
    reserve = case.get("reserve_bytes")
    less = f" less {number(reserve / 1e9).removesuffix('.00')} GB" if reserve else ""
    context = "" if is_context(contest) else f", a context of {positions(case)}"
    return f"{contest.direction} in {case['budget']}{less}{context}, {head(case)}"


def _how(record: Record) -> str:
    info = record.info
    if "verified" not in info:
        return "by its law" if info["how"] == "law" else "run"
    if not info["verified"]:
        return f"extrapolated from {info['points'][-1][0]:,} positions"
    ran = f"{info['run_positions']:,} run with {number(info['run_bytes'] / MIB)} MiB"
    return ran if info["fits"] else f"{ran}, which is too much"


def _rows(contest: Contest) -> list[str]:
    """The table of one question."""
    if not is_context(contest):
        header = ("contestant", "largest model", "parameters", "needs MiB", "how")
        rows = [
            (
                r.peer,
                answer(contest, r),
                f"{r.info['fits'] / 1e9:.3g} billion" if r.info["fits"] else NONE,
                number(r.info["need_bytes"] and r.info["need_bytes"] / MIB),
                _how(r),
            )
            for r in contest.records
        ]
        return table(header, rows)
    header = ("contestant", "positions", f"over {OURS}", "fixed MiB", "bytes per position", "how")
    rows = [
        (
            r.peer,
            answer(contest, r),
            _over(contest, r),
            number(r.info["fixed_bytes"] / MIB),
            f"{r.info['bytes_per_position']:,.0f}",
            _how(r),
        )
        for r in contest.records
    ]
    return table(header, rows)


def sections(result: Result) -> list[str]:
    """The part of the report on this level; nothing where it was not measured."""
    if not result.fits:
        return []
    lines = ["## fit: what fits in a given memory", "", INTRODUCTION, ""]
    for contest in result.fits:
        title = f"### {contest.case['name']}, {contest.direction}"
        asked = question(contest)
        lines += [title, "", f"{asked[0].upper()}{asked[1:]}. {verdict(contest)}", ""]
        lines += [*_rows(contest), ""]
    return lines


def summary(result: Result) -> list[str]:
    """In how many questions ours fits most, and all of those in which it does not."""
    asked = [c for c in result.fits if c.ours is not None]
    if not asked:
        return []
    won, lost = sum(c.won for c in asked), sum(c.lost for c in asked)
    lines = [
        "",
        f"Of {plural(len(asked), 'question')} of what fits in a given memory, {OURS} fits more than"
        f" every other contestant in {won} and less than another in {lost}.",
    ]
    if others := [c for c in asked if not c.won]:
        rows = [(question(c), verdict(c)) for c in others]
        lines += ["", *table(("question", "answer"), rows)]
    return lines


def page_lines(result: Result, usual: tuple[str, ...]) -> list[str]:
    """The table of docs/benchmarks.md; `usual` contestants have columns of their own."""
    asked = [c for c in result.fits if c.ours is not None]
    if not asked:
        return []
    rows = []
    for contest in asked:
        best = min(contest.rivals, key=attrgetter("cost"), default=None)
        peers = {record.peer: record for record in contest.records}
        rows.append(
            (
                question(contest),
                answer(contest, contest.ours),
                f"{best.peer} {answer(contest, best)}" if best else NONE,
                *(answer(contest, peers[p]) if p in peers else NONE for p in usual),
            )
        )
    note = (
        "What fits in a given memory, counting one loss step alone: inputs, gradients and what is"
        " allocated above them, without the rest of the model. \\* computed from smaller runs: the"
        " most that can fit."
    )
    return [note, "", *table(("question", OURS, "best other", *usual), rows), ""]
