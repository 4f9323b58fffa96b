"""The arithmetic of the linear path -> its part of floors.md.

`python -m benchmarks.counts.linear_page --no-one-product --N 16384` prints it for another shape,
machine or design.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from typing import Any

from . import linear
from .tables import percent, table


def linear_data(
    shape: linear.Shape, designs: Iterable[linear.Design], rates: linear.Rates
) -> dict[str, Any]:
    """What floors.json holds of the linear path; seconds and bytes."""
    entries = []
    for design in designs:
        best, worst = linear.shares(shape, design, rates)
        entries.append(
            {
                **asdict(design),
                "chunks": linear.chunks(shape, design),
                "terms": [asdict(term) for term in linear.terms(shape, design, rates)],
                "share_hidden": best,
                "share_none_hidden": worst,
                "peak_bytes": linear.peak_bytes(shape, design),
            }
        )
    return {
        "shape": asdict(shape),
        "rates": asdict(rates),
        "floor": linear.floor(shape, rates),
        "designs": entries,
        "from_logits": {
            f"factor {factor} B, rows {row} B": linear.from_logits(shape, rates, factor, row)
            for factor in (20, 4, 0)
            for row in (6, 4)
        },
    }


def linear_lines(data: dict[str, Any]) -> list[str]:
    """The linear path and the loss from logits, as lines of Markdown."""
    shape, rates = data["shape"], data["rates"]
    lines = [
        "## The linear path",
        "",
        f"N = {shape['N']}, H = {shape['H']}, V = {shape['V']}, trainable head, bf16 operands, one "
        f"pass, at {rates['flops'] / 1e12:g} TFLOP/s and {rates['copy'] / 1e12:g} TB/s. The floor, "
        f"6NHV, is {1e3 * data['floor']:.1f} ms. Two times for each term: traffic that a product "
        "may hide behind its arithmetic, hidden, and not.",
        "",
    ]
    rows = []
    for design in data["designs"]:
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
    for design in data["designs"]:
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
            ((name, f"{1e3 * t:.2f}") for name, t in data["from_logits"].items()),
        ),
        "",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(linear.Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--tflops", type=float, default=788.0, help="rate of matrix products")
    parser.add_argument("--terabytes", type=float, default=4.3, help="memory traffic, TB/s")
    parser.add_argument("--chunk-rows", type=int)
    switches = ("equal_chunks", "one_product", "scale_and_cast", "one_visit")
    for name in switches:
        action = argparse.BooleanOptionalAction
        default = getattr(linear.TODAY, name)
        parser.add_argument(f"--{name.replace('_', '-')}", action=action, default=default)
    given = parser.parse_args()
    chosen = {name: getattr(given, name) for name in (*switches, "chunk_rows")}
    designs, asked = [linear.TODAY], linear.Design("as asked", **chosen)
    if asked != replace(linear.TODAY, name=asked.name):
        designs.append(asked)
    rates = linear.Rates(flops=given.tflops * 1e12, copy=given.terabytes * 1e12)
    shape = linear.Shape(given.N, given.H, given.V)
    print("\n".join(linear_lines(linear_data(shape, designs, rates))))


if __name__ == "__main__":
    main()
