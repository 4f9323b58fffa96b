"""The arithmetic of the linear path -> its part of floors.md."""

from __future__ import annotations

from typing import Any

from .tables import percent, table


def linear_lines(linear: dict[str, Any]) -> list[str]:
    """The linear path and the loss from logits, as lines of Markdown."""
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
