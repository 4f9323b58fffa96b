"""The pictures of README.md: `python -m benchmarks.report.pictures` writes docs/images/*.svg.

Their numbers come from the planner and from tests/results/curves.json, the result of a sweep.
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
CURVES = ROOT / "tests" / "results" / "curves.json"
# of the sweep `curves`
STEPS = 300
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
            "Computed, not measured: by grpo-fast plan; the upper bar is 8 N V bytes and leaves"
            " out its gradients of hidden and lm_head.",
            13,
            fill=SOFT,
        ),
    ]
    return _page(960, 392, "How grpo_fast computes a loss, and what it holds in memory", parts)


class Arm(NamedTuple):
    """The reward of one loss in the sweep: mean and spread between seeds, by parts of the run."""

    mean: list[float]
    std: list[float]


def rewards(name: str) -> Arm:
    """An arm of the setting `dapo` of the committed sweep."""
    curves = json.loads(CURVES.read_text(encoding="utf-8"))["curves"]["dapo"]
    return Arm(**curves[name]["reward"])


def training() -> str:
    """Reward by optimizer step: the fp32 reference, our loss with bf16 weights, and a wrong one."""
    reference, ours, wrong = map(rewards, ("reference", "bf16", "wrong sign for every 4th token"))
    parts_of_run = len(reference.mean)
    left, right, top, bottom = 62, 640, 58, 252

    def place(part: float, reward: float) -> tuple[float, float]:
        return left + (right - left) * part / parts_of_run, bottom - (bottom - top) * reward

    def points(values: Sequence[float], backwards: bool = False) -> str:
        found = [place(k + 0.5, value) for k, value in enumerate(values)]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (found[::-1] if backwards else found))

    # a reward is at most 1
    edges = [
        [min(1.0, m + sign * 2 * s) for m, s in zip(reference.mean, reference.std, strict=True)]
        for sign in (1, -1)
    ]
    parts = [
        _text(
            24, 34, "Our loss with bf16 weights learns what the fp32 reference learns", 16
        ).replace("<text", '<text font-weight="bold"'),
    ]
    for reward in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = place(0, reward)[1]
        parts += [
            f'<path d="M{left} {y:g}H{right}" stroke="{LINE}"/>',
            _text(left - 8, y + 5, f"{reward:g}", 14, text_anchor="end", fill=SOFT),
        ]
    for step in range(0, STEPS + 1, 50):
        x = place(step * parts_of_run / STEPS, 0)[0]
        parts.append(_text(x, bottom + 21, f"{step}", 14, text_anchor="middle", fill=SOFT))
    legend = (
        (86, FAINT, "reference, fp32, autograd", "mean and 2 std of 8 seeds"),
        (146, OURS, "grpo_fast, bf16 weights", "mean of 4 other seeds"),
        (206, THEIRS, "wrong on purpose", "sign of every 4th token"),
    )
    parts += [
        f'<polygon points="{points(edges[0])} {points(edges[1], True)}" fill="{FAINT}"/>',
        f'<polyline points="{points(reference.mean)}" fill="none" stroke="{GRADIENT}"'
        ' stroke-width="2"/>',
        f'<polyline points="{points(ours.mean)}" fill="none" stroke="{OURS}" stroke-width="3"/>',
        f'<polyline points="{points(wrong.mean)}" fill="none" stroke="{THEIRS}" stroke-width="2"'
        ' stroke-dasharray="6 4"/>',
        _text(
            (left + right) / 2,
            bottom + 42,
            "optimizer step of a toy model, reward",
            14,
            fill=SOFT,
            text_anchor="middle",
        ),
    ]
    for y, colour, what, how_many in legend:
        parts += [
            _box(668, y - 12, 18, 14, colour),
            _text(696, y, what, 15),
            _text(696, y + 20, how_many, 14, fill=SOFT),
        ]
    return _page(960, 308, "Reward of a toy model under three losses", parts)


PICTURES = {"how.svg": how, "training.svg": training}


def main() -> None:
    """Write every picture."""
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")
        print(f"docs/images/{name}")


if __name__ == "__main__":
    main()
