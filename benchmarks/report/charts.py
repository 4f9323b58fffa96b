"""PNG charts of a result file: time by N, peak memory by N, share of the ceiling, error by time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.report.records import OURS, STEP, Contest, Record, Result, head, positions

# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that white
# swallows; the marker says the same a second time.
OURS_COLOUR = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#E69F00")
MARKERS = "s^Dv<>Xph*P"
DASHES = ("-", "--", ":")
# An error of exactly 0 has no place on a log axis; it is drawn here.
NO_ERROR = 1e-10
# Shares above this (TF32 products against an fp32 ceiling, say) are drawn here with their number.
LARGEST_SHARE = 130
MIB = 2**20
Style = dict[str, Any]


def draw(result: Result, source: str, folder: Path, slug: str) -> dict[str, Path]:
    """Draw what the data has, as folder/slug-*.png; returns the files by what they show.

    Args:
        source: the result file as the caption names it.
    """
    charts: tuple[tuple[str, str, Callable[[Result, dict[str, Style]], Figure | None]], ...] = (
        ("Time by N", "time", _time),
        ("Peak memory by N", "memory", _memory),
        ("Share of the machine's ceiling", "ceiling", _ceiling),
        ("Error against time", "error", _error),
    )
    styles = _styles(result.peers)
    out = {}
    for title, name, chart in charts:
        figure = chart(result, styles)
        if figure is None:
            continue
        machine = result.machine["device_name"]
        figure.suptitle(f"{title}\n{machine}, {result.date[:10]}", fontsize=11)
        figure.supxlabel(f"source: {source}, commit {result.commit[:10]}", fontsize=7)
        out[title] = folder / f"{slug}-{name}.png"
        figure.savefig(out[title], dpi=130)
    return out


def _styles(peers: list[str]) -> dict[str, Style]:
    styles = {}
    for k, peer in enumerate(name for name in peers if name != OURS):
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        dash = DASHES[k // len(COLOURS) % len(DASHES)]
        styles[peer] = {"color": colour, "marker": marker, "linestyle": dash}
        styles[peer] |= {"linewidth": 1.2, "markersize": 6}
    ours = {"color": OURS_COLOUR, "marker": "o", "linewidth": 2.4, "markersize": 7, "zorder": 5}
    return {OURS: ours} | styles if OURS in peers else styles


def _point(axes: Axes, x: float, y: float, record: Record, style: Style) -> None:
    """A marker; hollow where the result is inexact."""
    fill = style["color"] if record.exact else "none"
    axes.plot(x, y, **{**style, "linestyle": "none"}, markerfacecolor=fill)


def _legend(figure: Figure, styles: dict[str, Style], shown: list[Record], note: str = "") -> None:
    names = {record.peer for record in shown}
    entries = {name: style for name, style in styles.items() if name in names}
    if not all(record.exact for record in shown):
        hollow = {"color": "#555555", "marker": "o", "markerfacecolor": "none", "linestyle": "none"}
        entries["hollow: inexact"] = hollow
    entries |= {note: {"linestyle": "none"}} if note else {}
    lines = [Line2D([], [], label=name, **style) for name, style in entries.items()]
    figure.legend(handles=lines, loc="outside right upper", fontsize=8, frameon=False)


def _short(number: float) -> str:
    return f"{number / 1024:g}k" if number >= 1024 and number % 1024 == 0 else f"{number:g}"


def _log(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 where there are few decades, else at the decades."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    if decades < 4:
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 5 else f"{value:g}")
        )
    axis.set_minor_formatter(NullFormatter())


def _series(result: Result) -> dict[str, dict[int, Contest]]:
    """Heads that were measured at two values of N or more, by their description."""
    found: dict[str, dict[int, Contest]] = {}
    for contest in result.contests:
        n = positions(contest.case)
        if n is not None:
            title = f"{contest.level} {contest.direction}\n{head(contest.case)}"
            found.setdefault(title, {})[n] = contest
    return {title: dict(sorted(by_n.items())) for title, by_n in found.items() if len(by_n) > 1}


def _by_n(
    result: Result, styles: dict[str, Style], label: str, value: Callable[[Record], float | None]
) -> Figure | None:
    series = _series(result)
    if not series:
        return None
    columns = min(3, len(series))
    rows = math.ceil(len(series) / columns)
    figure = Figure(
        figsize=(max(6.4, 4.4 * columns + 1.4), max(3.5 * rows + 1.0, 4.6)), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(series) :]:
        axes.set_visible(False)
    shown = []
    for axes, (title, by_n) in zip(grid.flat, series.items(), strict=False):
        for peer, style in styles.items():
            given = [(n, r) for n, c in by_n.items() for r in c.records if r.peer == peer]
            points = [(n, value(r), r) for n, r in given if value(r)]
            axes.plot(
                [n for n, _, _ in points], [y for _, y, _ in points], **style | {"marker": ""}
            )
            for n, y, record in points:
                _point(axes, n, y, record, style)
            shown += [r for _, _, r in points]
        axes.set(xscale="log", yscale="log", xlabel="completion positions N = B x T", ylabel=label)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(list(by_n), [_short(n) for n in by_n])
        axes.margins(0.07)
        axes.xaxis.set_minor_locator(NullLocator())
        _log(axes.yaxis)
        axes.grid(alpha=0.3)
    _legend(figure, styles, shown)
    return figure if shown else None


def _time(result: Result, styles: dict[str, Style]) -> Figure | None:
    return _by_n(result, styles, "median time (ms)", lambda r: r.median * 1e3)


def _memory(result: Result, styles: dict[str, Style]) -> Figure | None:
    label = "peak memory above inputs\nand gradients (MiB)"
    return _by_n(result, styles, label, lambda r: r.peak and r.peak / MIB)


def _sections(contests: list[Contest]) -> dict[str, list[Contest]]:
    """By level and pass; a forward pass is left to the tables where there is a backward too."""
    whole = {c.level for c in contests if c.direction == "forward+backward"}
    sections: dict[str, list[Contest]] = {}
    for contest in contests:
        if contest.direction != "forward" or contest.level not in whole:
            title = f"{contest.level} {contest.direction}".strip()
            sections.setdefault(title, []).append(contest)
    return sections


def _share_row(
    axes: Axes, y: int, shares: list[tuple[Record, float]], styles: dict[str, Style]
) -> None:
    """A bar for ours with its number at the right edge, a marker for each of the others."""
    for record, share in shares:
        x = min(share, LARGEST_SHARE)
        if record.peer == OURS:
            bar = {"color": OURS_COLOUR} if record.exact else {"fill": False, "hatch": "//"}
            axes.barh(y, x, 0.62, alpha=0.6, **bar)
            side = {"transform": axes.get_yaxis_transform(), "va": "center", "weight": "bold"}
            axes.text(1.01, y, f"{share:.0f} %", fontsize=8, color=OURS_COLOUR, **side)
            continue
        _point(axes, x, y, record, styles[record.peer] | {"zorder": 4})
        if share > LARGEST_SHARE:
            axes.text(x, y - 0.3, f"{share:.0f} %", fontsize=7, ha="center")


def _ceiling(result: Result, styles: dict[str, Style]) -> Figure | None:
    """One row per case: how near each contestant comes to what the machine can do."""
    known = [c for c in result.contests if any(result.share(r) for r in c.records)]
    if not known:
        return None
    sections = _sections(known)
    sizes = [len(contests) + 1.2 for contests in sections.values()]
    figure = Figure(figsize=(10, max(0.36 * sum(sizes) + 1.6, 4.2)), layout="constrained")
    grid = figure.subplots(len(sections), 1, squeeze=False, sharex=True, height_ratios=sizes)
    shown, largest = [], 100.0
    for axes, (title, contests) in zip(grid.flat, sections.items(), strict=True):
        for y, contest in enumerate(contests):
            pairs = [(r, result.share(r)) for r in contest.records]
            shares = [(r, 100 * share) for r, share in pairs if share is not None]
            _share_row(axes, y, shares, styles)
            shown += [r for r, _ in shares]
            largest = max([largest, *(share for _, share in shares)])
        axes.set_yticks(range(len(contests)), [c.case["name"] for c in contests], fontsize=8)
        axes.set_ylim(len(contests) - 0.4, -0.6)
        ceiling = "copy" if contests[0].level == "logits" else "matrix product"
        axes.set_title(f"{title}: share of the measured {ceiling}", fontsize=9, loc="left")
        axes.axvline(100, color="#555555", linewidth=1, linestyle="--")
        axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("floor / time / measured ceiling (%); the dashed line is the ceiling")
    axes.set_xlim(0, min(largest, LARGEST_SHARE) + 4)
    points = {name: style | {"linestyle": "none"} for name, style in styles.items()}
    if OURS in points:
        points[OURS] = {"color": OURS_COLOUR, "linewidth": 8, "alpha": 0.6}
    _legend(figure, points, shown)
    return figure


def _error(result: Result, styles: dict[str, Style]) -> Figure | None:
    """Every quantity that was compared with float64, over time in units of ours."""
    known = [c for c in result.contests if c.ours and c.level != STEP]
    known = [c for c in known if any(r.error for r in c.records)]
    if not known:
        return None
    sections = _sections(known)
    names = {
        title: list(dict.fromkeys(k for c in contests for r in c.records for k in r.error))
        for title, contests in sections.items()
    }
    columns = max(len(keys) for keys in names.values())
    size = (max(6.4, 3.7 * columns + 1.3), max(2.9 * len(sections) + 1.1, 4.6))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(sections), columns, squeeze=False, sharey="row")
    shown = []
    for row, (title, contests) in zip(grid, sections.items(), strict=True):
        for axes in row[len(names[title]) :]:
            axes.set_visible(False)
        for axes, name in zip(row, names[title], strict=False):
            for contest in contests:
                for record in contest.records:
                    error = record.error.get(name)
                    if error is None or not math.isfinite(error):
                        continue
                    y = error or NO_ERROR
                    _point(axes, contest.ratio(record), y, record, styles[record.peer])
                    shown.append(record)
            axes.set(xscale="log", yscale="log", xlabel=f"time / time of {OURS}")
            axes.set_ylabel(f"relative L2 error of {name}", fontsize=9)
            axes.set_title(title, fontsize=9)
            axes.axvline(1, color="#555555", linewidth=1, linestyle="--")
            axes.margins(0.08)
            _log(axes.xaxis)
            axes.grid(alpha=0.3)
        low, high = row[0].get_ylim()
        row[0].set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    points = {name: style | {"linestyle": "none"} for name, style in styles.items()}
    none = any(error == 0 for record in shown for error in record.error.values())
    _legend(figure, points, shown, f"at {NO_ERROR:g}: exactly 0" if none else "")
    return figure if shown else None
