"""Counts of launches, without a GPU.

`python -m benchmarks.counts [--kernel logprob_fwd] [--target sm_90] [--V 151936]` prints those of
ours whose name holds the text; `--peers` the other libraries'. `--rows FILE` keeps ours for another
Triton; `--write FILE --with ROWS` writes the committed result and the page beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import triton

from . import contestants, launches
from .compile import TARGETS
from .launches import Case
from .page import count_rows, page
from .records import Count, as_json, counts
from .result import result, text
from .tables import table


def collect(
    cases: Iterable[Case], targets: Iterable[str], progress: bool
) -> tuple[list[Count], list[dict[str, str]]]:
    """The counts of cases, and those that could not be counted with the reason."""
    found: list[Count] = []
    skipped: list[dict[str, str]] = []
    targets = list(targets)
    for case in cases:
        for target in targets:
            if progress:
                print(f"{target} {case.contestant} {case.name}", file=sys.stderr, flush=True)
            try:
                found += counts(case, target)
            # Boundary: what another library raises on a CPU is its own; ours has to compile.
            except Exception as error:
                if case.contestant == launches.OURS:
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                skipped.append(
                    {"contestant": case.contestant, "launch": case.name, "reason": reason}
                )
    return found, skipped


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", default="", help="text that the name of the launch holds")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--V", type=int, help="this vocabulary alone")
    parser.add_argument("--peers", action="store_true", help="the other libraries'")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="write ours, all targets")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the result and its page")
    parser.add_argument("--with", dest="others", type=Path, action="append", default=[])
    given = parser.parse_args()
    whole = given.rows or given.write
    targets = given.target or (list(TARGETS) if whole else ["sm_90"])
    if given.rows:
        ours, _ = collect(launches.cases(), targets, True)
        given.rows.write_text(json.dumps({triton.__version__: as_json(ours)}), encoding="utf-8")
    elif given.write:
        ours, _ = collect(launches.cases(), targets, True)
        theirs, skipped = collect(contestants.cases(), ["sm_90"], True)
        data = result(ours, theirs, skipped, given.others)
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(text(data), encoding="utf-8")
        given.write.with_suffix(".md").write_text(page(data), encoding="utf-8")
    else:
        cases = contestants.cases() if given.peers else launches.cases()
        wanted = [c for c in cases if given.kernel in c.name and given.V in (None, c.V)]
        found, skipped = collect(wanted, targets, False)
        print("\n".join(table(*count_rows(found))))
        print("\n".join(f"not counted: {' '.join(entry.values())}" for entry in skipped))


if __name__ == "__main__":
    main()
