"""`python -m benchmarks.counts [--kernel logprob_fwd] [--target sm_90] [--V 151936]`: print the
counts of launches, without a GPU; `--write` makes the committed page of all of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from .compile import TARGETS, compiled
from .launches import Case, cases
from .machines import MACHINES
from .model import passes, share, waves

HEADER = (
    "| launch | target | kernel | pass | instr | FMA | ALU | MUFU | LSU | shuffle | "
    "barriers/1024 | B/logit | loads | warps | regs | spill | waves | share 80 % |"
)


def lines(case: Case, target: str) -> Iterator[str]:
    """A row of Markdown for each pass of each kernel of a launch."""
    machine = MACHINES[target]
    for kernel in compiled(case.launch, target):
        out = case.dtype if case.out is None else case.out
        sizes = case.dtype.itemsize, out.itemsize
        visits = passes(kernel, *sizes, case.rows * case.V, machine.warp)
        for visit in visits:
            pipes = " | ".join(
                f"{visit.pipe(p):.2f}" for p in ("fma", "alu", "mufu", "lsu", "shuffle")
            )
            loads = ", ".join(f"{n} x {size}" for size, n in visit.loads.items())
            yield (
                f"| {case.name} | {target} | {kernel.name} | {visit.kind} | "
                f"**{visit.per_logit:.2f}** | {pipes} | {visit.barriers_per_1024:.2f} | "
                f"{visit.bytes_per_logit:.2f} | {loads} | {kernel.num_warps} | "
                f"{kernel.registers} | {kernel.spill} | "
                f"{waves(kernel, machine, kernel.programs):.2f} | "
                f"{100 * share([visit], machine):.0f} % |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="", help="text that the name of the launch contains")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--V", type=int)
    given = parser.parse_args()
    print(HEADER)
    print("|" + " --- |" * HEADER.count(" | ") + " --- |")
    for case in cases():
        if given.kernel in case.name and given.V in (None, case.V):
            for target in given.target or ["sm_90"]:
                for line in lines(case, target):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
