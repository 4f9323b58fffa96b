"""Two checkouts compared bit for bit on the CPU: `python tests/sweeps/compare_checkouts.py compare
A B`.

A and B are folders of this repository's commits, for example two git worktrees. Everything runs
in processes of its own with PYTHONPATH set to one of them:

    calls    every option of the public functions: losses, metrics, terms, gradients, plans
    runs     three short training runs (whole model, LoRA, two gloo processes): curves, weights
    resume   the checkpoint in the middle of A's runs, resumed by B, against A's finished runs
    time     CPU time of calls of eight tokens, in turns

`record A --out FOLDER` keeps the answers of A; `compare --baseline FOLDER B` then needs no A (and
has no times). The exit status is 1 where a bit differs, or where B is slower than --limit says.
A checkout needs nothing but the public names of `grpo_fast`: this file and its neighbours come from
where they are started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

PARTS = ("calls", "runs", "resume", "time")
Values = dict[str, "Tensor | str"]


def environment(checkout: Path) -> dict[str, str]:
    """What a process of a checkout runs under: its code, one thread, no network, no GPU."""
    fixed = {
        "PYTHONPATH": str(checkout.resolve()),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **fixed}


def show(lines: list[str]) -> None:
    """Print lines, indented."""
    print("".join(f"  {line}\n" for line in lines), end="", flush=True)


def run(checkout: Path, *arguments: str) -> bool:
    """One subcommand in a checkout, its lines indented; True when it found nothing wrong."""
    begun = time.monotonic()
    command = [sys.executable, os.path.abspath(__file__), *arguments]
    # not in the checkout, whose folders would be found before those of PYTHONPATH
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, env=environment(checkout), cwd=folder, capture_output=True, text=True
        )
    print(f"{arguments[0]} in {checkout}: {time.monotonic() - begun:.0f} s")
    printed = done.stdout + (done.stderr[-3000:] if done.returncode else "")
    show(printed.splitlines())
    return done.returncode == 0


def load(part: str, folder: Path) -> dict[str, Values]:
    """The answers of a part, call by call or process by process."""
    if part == "calls":
        file = folder / "calls.pt"
        return torch.load(file, weights_only=True) if file.is_file() else {}
    files = sorted((folder / part).glob("*/rank*.pt"))
    return {f"{f.parent.name}/{f.stem}": torch.load(f, weights_only=True) for f in files}


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor, in which -0 is not 0 and one NaN is another's equal or not."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def difference(a: Tensor | str | None, b: Tensor | str | None) -> str | None:
    """In what two values differ, None where every bit is the same."""
    if a is None or b is None:
        return f"only in {'B' if a is None else 'A'}"
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        same = type(a) is type(b) and a == b
        return None if same else f"{str(a)[:150]!r} and {str(b)[:150]!r}"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    if raw(a) == raw(b):
        return None
    gap = (a.double() - b.double()).abs()
    unequal = int(((a != b) & ~(a.isnan() & b.isnan())).sum()) if a.is_floating_point() else "some"
    return f"{unequal} of {a.numel()} numbers, by at most {gap.nan_to_num().max().item():.3g}"


@dataclass
class Tally:
    """What was compared under the first part of a name."""

    answers: int = 0
    values: int = 0
    lines: list[str] = field(default_factory=list)
    """One for each value that differs."""


def differences(
    a: dict[str, Values], b: dict[str, Values], resumed: bool = False
) -> dict[str, Tally]:
    """What was compared and what differs, by the first part of an answer's name.

    Args:
        resumed: b has been resumed, and has no completions of the steps before.
    """
    tallies: dict[str, Tally] = {}
    for name in dict.fromkeys((*a, *b)):
        mine, other = a.get(name, {}), b.get(name, {})
        tally = tallies.setdefault(name.split("/")[0], Tally())
        tally.answers += 1
        for key in dict.fromkeys((*mine, *other)):
            if resumed and key.startswith("completions/") and key not in other:
                continue
            tally.values += 1
            text = difference(mine.get(key), other.get(key))
            if text:
                tally.lines.append(f"{name} {key}: {text}")
    return tallies


def record(checkout: Path, folder: Path, parts: tuple[str, ...], match: str = "") -> bool:
    """Keep the answers of a checkout; True when nothing was wrong with them."""
    folder.mkdir(parents=True, exist_ok=True)
    good = True
    if "calls" in parts:
        good &= run(checkout, "calls", "--out", str(folder / "calls.pt"), "--match", match)
    if "runs" in parts:
        good &= run(checkout, "runs", "--out", str(folder / "runs"))
    return good


def judge(part: str, a: dict[str, Values], b: dict[str, Values], everything: bool) -> bool:
    """Print what differs between the answers of two checkouts; True when nothing does.

    Args:
        everything: print every difference, not the first of each kind.
    """
    tallies = differences(a, b, resumed=part == "resume")
    answers = sum(tally.answers for tally in tallies.values())
    values = sum(tally.values for tally in tallies.values())
    unequal = sum(len(tally.lines) for tally in tallies.values())
    print(f"{part}: {answers} answers, {values} values, {unequal} differ")
    for name, tally in tallies.items():
        counts = f"{tally.answers:4} answers {tally.values:6} values {len(tally.lines):6} differ"
        show([f"{name:16}{counts}"])
        show([f"  {line}" for line in tally.lines[: None if everything else 1]])
    return values > 0 and not unequal


def times(a: Path, b: Path, limit: float, rounds: int, batches: int) -> bool:
    """Print the CPU times of both; True when no forward of B takes more than limit times A's."""
    import compare_time

    found = compare_time.compare(a, b, environment, rounds, batches)
    print("time: CPU ms of a call of eight tokens, median, and of B / A its 99.9 % interval")
    for name, row in found.items():
        ratio = f"B / A {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        show([f"{name:36} A {row['a_ms']:.3f}  B {row['b_ms']:.3f}  {ratio}  {row['events']}"])
    slow = [n for n, row in found.items() if n.endswith("forward") and row["low"] > limit]
    show([f"{name} is above {limit:g} beyond doubt" for name in slow])
    return not slow


def compare(options: argparse.Namespace, folder: Path) -> bool:
    """Every part that was asked for; True when all are equal."""
    b, parts, good = options.b, options.only, True
    a = options.baseline or folder / "a"
    if options.baseline is None:
        # to resume takes the checkpoints of A's runs
        wanted = [{"resume": "runs"}.get(part, part) for part in parts]
        good &= record(options.a, a, tuple(wanted), options.match)
    good &= record(b, folder / "b", parts, options.match)
    if "resume" in parts:
        arguments = ("--from", str(a / "runs"), "--out", str(folder / "b" / "resume"))
        good &= run(b, "resume", *arguments)
    for part in parts:
        if part != "time":
            kept = "runs" if part == "resume" else part
            answers = load(kept, a), load(part, folder / "b")
            if part == "calls":
                answers = tuple({n: v for n, v in x.items() if options.match in n} for x in answers)
            good &= judge(part, *answers, options.all)
        elif options.a is None:
            print("time: not compared, which takes two checkouts")
        else:
            good &= times(options.a, b, options.limit, options.rounds, options.batches)
    print("equal" if good else "NOT equal")
    return good


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("compare", help="two checkouts, or recorded answers and one")
    whole.add_argument("checkouts", type=Path, nargs="+", metavar="A B")
    whole.add_argument("--baseline", type=Path, help="what `record` kept of A")
    whole.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    whole.add_argument("--match", default="", help="only calls with this text in their name")
    whole.add_argument("--all", action="store_true", help="print every difference")
    whole.add_argument("--limit", type=float, default=1.0, help="of B / A in time")
    whole.add_argument("--rounds", type=int, default=3, help="pairs of processes for time")
    whole.add_argument("--batches", type=int, default=40, help="for each of them")
    kept = commands.add_parser("record", help="keep the answers of one checkout")
    kept.add_argument("checkout", type=Path)
    kept.add_argument("--out", type=Path, required=True)
    for name in ("calls", "runs", "resume"):
        one = commands.add_parser(name, help=f"{name} of the checkout in PYTHONPATH")
        one.add_argument("--out", type=Path, required=True)
        if name == "calls":
            one.add_argument("--match", default="")
        if name == "resume":
            one.add_argument("--from", type=Path, dest="source", required=True)
    commands.add_parser("time", help="CPU times of the checkout in PYTHONPATH, as JSON")
    commands.add_parser("serve", help="for `compare`: a batch of times for each line that comes")
    options = parser.parse_args()
    for name, value in vars(options).items():
        # the processes of a checkout run in a folder of their own
        if isinstance(value, Path):
            setattr(options, name, value.resolve())
    if options.command == "compare":
        expected = 1 if options.baseline else 2
        if len(options.checkouts) != expected:
            parser.error(f"compare: expected {expected} checkouts, got {len(options.checkouts)}")
        options.a, options.b = (None, *(path.resolve() for path in options.checkouts))[-2:]
    return options


def check_import() -> None:
    """The library of this process is the one in PYTHONPATH, not one that is installed."""
    import grpo_fast

    asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0]
    found = Path(grpo_fast.__file__).resolve().parent.parent
    if not asked or found != Path(asked).resolve():
        raise ValueError(f"PYTHONPATH: expected a checkout with grpo_fast, got {found}")


def main() -> int:
    options = parse()
    if options.command == "compare":
        with tempfile.TemporaryDirectory() as folder:
            return 0 if compare(options, Path(folder)) else 1
    if options.command == "record":
        return 0 if record(options.checkout, options.out, ("calls", "runs")) else 1
    check_import()
    if options.command == "calls":
        from compare_answers import record as answers

        return 1 if answers(options.out, options.match) else 0
    if options.command in ("runs", "resume"):
        from compare_runs import record as runs

        return 1 if runs(options.out, getattr(options, "source", None)) else 0
    import compare_time

    if options.command == "serve":
        compare_time.serve()
    else:
        print(json.dumps(compare_time.alone(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
