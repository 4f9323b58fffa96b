"""The pictures of README.md: `python -m benchmarks.report.pictures` writes docs/images/*.svg.

Their numbers come from the planner and from the log of a run of the demo, docs/images/demo.jsonl.
SVG by hand, so that the same input gives the same bytes and a test can compare them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from benchmarks.report.wording import ROOT
from grpo_fast import cli

IMAGES = ROOT / "docs" / "images"
DEMO = IMAGES / "demo.jsonl"
# the head of Qwen3-8B, under 8 completions of 4,096 tokens
MODEL, TOKENS, HIDDEN, VOCAB = "Qwen3-8B", 32768, 4096, 151936
INK, SOFT, LINE, PAPER = "#1f2328", "#59636e", "#c4ccd4", "#ffffff"
OURS, FAINT, THEIRS, GRADIENT = "#0f766e", "#d5ebe8", "#c2410c", "#5eada5"


def _text(x: float, y: float, words: str, size: int = 15, **given: str) -> str:
    style = {"fill": INK, **{key.replace("_", "-"): value for key, value in given.items()}}
    more = "".join(f' {key}="{value}"' for key, value in style.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{more}>{escape(words)}</text>'


def _box(x: float, y: float, w: float, h: float, fill: str, stroke: str = "none") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{fill}"'
        f' stroke="{stroke}"/>'
    )


def _arrow(x: float, y: float, to: float) -> str:
    head = f"M{to - 7:g} {y - 5:g}L{to:g} {y:g}L{to - 7:g} {y + 5:g}"
    return f'<path d="M{x:g} {y:g}H{to:g}{head}" fill="none" stroke="{SOFT}" stroke-width="2"/>'


def _page(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A picture on paper of its own, so that it reads on a dark page too."""
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img"'
            ' font-family="Helvetica, Arial, sans-serif">',
            f"<title>{escape(title)}</title>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"'
            f' fill="{PAPER}" stroke="{LINE}"/>',
            *parts,
            "</svg>\n",
        )
    )


class Plan(NamedTuple):
    """What `grpo-fast plan` prints of the shape in the picture; memory in GiB."""

    chunks: int
    rows: int
    workspace: float
    gradients: float


def plan() -> Plan:
    """The plan of the shape in the picture."""
    shape = ["--tokens", str(TOKENS), "--hidden", str(HIDDEN), "--vocab", str(VOCAB)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main(["plan", *shape])
    numbers = [
        re.search(pattern, printed.getvalue()).group(1)
        for pattern in (
            r"chunks +(\d+)",
            r"of at most (\d+) rows",
            r"workspace +([\d.]+) MiB",
            r"gradients +([\d.]+) MiB in fp32",
        )
    ]
    return Plan(*map(int, numbers[:2]), *(float(number) / 1024 for number in numbers[2:]))


def whole() -> float:
    """GiB of the logits (N, V) and their gradient, in fp32."""
    return 2 * 4 * TOKENS * VOCAB / 2**30


def _pipeline(of: Plan) -> list[str]:
    """hidden x lm_head -> chunk -> log-prob -> objective -> gradient in place -> gradients."""
    middle = {"text_anchor": "middle"}
    stripes = of.chunks
    parts = [
        _box(32, 72 + k * 112 / stripes, 62, 112 / stripes - 1.5, OURS if k == 2 else FAINT)
        for k in range(stripes)
    ]
    parts += [
        _text(32, 206, f"hidden (N, H): {stripes} chunks", 14),
        _text(115, 134, "×", 22, **middle),
        _box(134, 72, 80, 112, FAINT, OURS),
        _text(174, 124, "lm_head", 14, **middle),
        _text(174, 143, "(V, H)", 14, **middle),
        _arrow(222, 128, 252),
        _box(260, 98, 200, 60, OURS),
        _text(360, 123, "logits of one chunk", 15, fill=PAPER, font_weight="bold", **middle),
        _text(360, 144, f"{of.rows:,} rows x V, fp32", 14, fill=PAPER, **middle),
        _arrow(470, 128, 500),
        _box(510, 98, 86, 60, PAPER, OURS),
        _text(553, 123, "log-prob,", 14, **middle),
        _text(553, 142, "entropy", 14, **middle),
        _arrow(606, 128, 636),
        _box(646, 98, 86, 60, PAPER, OURS),
        _text(689, 123, "objective,", 14, **middle),
        _text(689, 142, "slope", 14, **middle),
        _arrow(742, 128, 772),
        _box(782, 88, 146, 80, FAINT, OURS),
        _text(855, 114, "gradients of", 14, **middle),
        _text(855, 133, "hidden and", 14, **middle),
        _text(855, 152, "lm_head, fp32", 14, **middle),
        f'<path d="M689 158V194H360V164M354 172L360 163L366 172" fill="none" stroke="{OURS}"'
        ' stroke-width="2"/>',
        _text(525, 212, "the gradient overwrites the logits, in place", 14, fill=OURS, **middle),
    ]
    return parts


def how() -> str:
    """The picture of the computation, with the memory of both ways."""
    one = plan()
    theirs, chunk, gradients = whole(), one.workspace, one.gradients
    scale = 670 / theirs
    parts = [
        _text(32, 40, "One pass over the vocabulary, a chunk of tokens at a time", 18).replace(
            "<text", '<text font-weight="bold"'
        ),
        *_pipeline(one),
        f'<path d="M32 240H928" stroke="{LINE}"/>',
        _text(
            32,
            272,
            f"Memory of one loss step: {MODEL}'s head (H = {HIDDEN:,}, V = {VOCAB:,}),"
            f" {TOKENS:,} tokens, bf16",
            15,
            font_weight="bold",
        ),
        _text(32, 304, "all logits at once"),
        _box(170, 289, theirs * scale, 22, THEIRS),
        _text(182, 305, "logits (N, V) and their gradient, fp32", 14, fill=PAPER),
        _text(180 + theirs * scale, 305, f"{theirs:.1f} GiB", font_weight="bold"),
        _text(32, 338, "grpo_fast"),
        _box(170, 323, chunk * scale, 22, OURS),
        _box(170 + chunk * scale, 323, gradients * scale, 22, GRADIENT),
        _text(
            182 + (chunk + gradients) * scale,
            339,
            f"{chunk + gradients:.1f} GiB",
            font_weight="bold",
        ),
        _text(
            258 + (chunk + gradients) * scale,
            339,
            f"= one chunk {chunk:.1f} + gradients of hidden and lm_head in fp32 {gradients:.1f}",
            14,
        ),
        _text(
            32,
            373,
            "Computed, not measured: grpo-fast plan, and 8 N V bytes. Above hidden states and"
            " weights; the upper bar leaves its gradients of these out.",
            13,
            fill=SOFT,
        ),
    ]
    return _page(960, 392, "How grpo_fast computes a loss, and what it holds in memory", parts)


def demo_log() -> list[tuple[int, float]]:
    """Optimizer step and mean reward of each log of the committed run of the demo."""
    lines = map(json.loads, DEMO.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["reward"]) for line in lines if "reward" in line]


def demo() -> str:
    """The demo's reward by optimizer step."""
    points = demo_log()
    last = points[-1][0]
    left, right, top, bottom = 62, 930, 58, 224

    def place(step: float, reward: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * reward / 0.8

    parts = [
        _text(
            24, 34, f"make demo: mean reward of the sampled answers, {last} steps on two CPU cores"
        ).replace("<text", '<text font-weight="bold"'),
    ]
    for reward in (0.0, 0.2, 0.4, 0.6, 0.8):
        y = place(0, reward)[1]
        parts += [
            f'<path d="M{left} {y:g}H{right}" stroke="{LINE}"/>',
            _text(left - 8, y + 5, f"{reward:.1f}", 14, text_anchor="end", fill=SOFT),
        ]
    for step in range(0, last + 1, 10):
        x = place(step, 0)[0]
        parts.append(_text(x, bottom + 22, f"{step}", 14, text_anchor="middle", fill=SOFT))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{OURS}" stroke-width="2.5"/>')
    for point in points:
        x, y = place(*point)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{OURS}"/>')
    for point in (points[0], points[-1]):
        x, y = place(*point)
        parts.append(_text(x, y - 12, f"{point[1]:.2f}", 15, text_anchor="middle"))
    parts.append(
        _text(
            (left + right) / 2, bottom + 44, "optimizer step", 14, fill=SOFT, text_anchor="middle"
        )
    )
    return _page(960, 284, "The reward of the demo by optimizer step", parts)


PICTURES = {"how.svg": how, "demo.svg": demo}


def main() -> None:
    """Write every picture."""
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")
        print(f"docs/images/{name}")


if __name__ == "__main__":
    main()
