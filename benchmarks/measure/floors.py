"""The least time each case of a set can take: `python -m benchmarks.measure.floors`.

Needs no GPU. The floor is the arithmetic (or, from logits, the traffic) that the result cannot do
without, at the rates that are given (bf16 by default); nothing is measured here.
"""

from __future__ import annotations

import argparse

from benchmarks.cases import CASES, tokens
from benchmarks.measure.contest import passes
from benchmarks.measure.timing import floor_bytes, floor_flops


def table(name: str, tflops: float, terabytes: float) -> str:
    """Markdown: a row for each case and pass of a set."""
    lines = [
        "| level | case | pass | N | H | V | tokens | active | TFLOP | GB | floor ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for level, cases in CASES[name].items():
        for case in cases:
            every, active = tokens(case)
            for direction in passes(level, case):
                flops = floor_flops(case, level, direction != "forward") / 1e12
                traffic = floor_bytes(case, level) / 1e12
                floor = 1e3 * max(flops / tflops, traffic / terabytes)
                lines.append(
                    f"| {level} | {case.name} | {direction} | {case.B * case.T} | {case.H} | "
                    f"{case.V} | {every} | {active} | {flops:.2f} | {1e3 * traffic:.2f} | "
                    f"{floor:.2f} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=sorted(CASES), default="gpu")
    parser.add_argument(
        "--tflops", type=float, default=788.0, help="rate of matrix products (default: H200, bf16)"
    )
    parser.add_argument(
        "--terabytes", type=float, default=4.3, help="memory traffic, TB/s (default: H200)"
    )
    given = parser.parse_args()
    print(f"at {given.tflops:g} TFLOP/s and {given.terabytes:g} TB/s\n")
    print(table(given.cases, given.tflops, given.terabytes))


if __name__ == "__main__":
    main()
