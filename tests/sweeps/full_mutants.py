"""The tests on every error of `mutants.py`: `python tests/sweeps/full_mutants.py [--only TEXT]`.

Each error is made in a copy of the tree, and the tests that it names have to fail there; before,
they have to pass on the copy as it is. The exit status is 1 when an error survives.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from kernel_mutants import Mutant
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("grpo_fast", "kernels", "tests", "pyproject.toml")
# a suite takes under a minute alone; a mutant that hangs is noticed as well
LIMIT_S = 400


class Suite(NamedTuple):
    """Arguments of pytest, and the backend of the run."""

    arguments: tuple[str, ...]
    backend: str = "torch"


SUITES = {
    "rows": Suite(("tests/engine/test_logprob.py", "tests/engine/test_rows.py")),
    "loss": Suite(("tests/loss/test_loss.py",)),
    "mathematics": Suite(("tests/objective/test_mathematics.py",)),
    "corrections": Suite(("tests/objective/test_corrections.py",)),
    "options": Suite(("tests/loss/test_loss_options.py", "-k", "test_lora")),
    "gradcheck": Suite(("tests/engine/test_gradcheck.py", "-k", "test_linear_logprob")),
    "kernels": Suite(
        (
            "tests/engine/test_logprob.py",
            "tests/engine/test_rows.py",
            "tests/kernels/test_triton_ops.py",
            "-m",
            "kernels",
        ),
        "interpret",
    ),
    "kernel_rows": Suite(("tests/kernels/test_triton_rows.py",), "interpret"),
    "calls": Suite(("tests/kernels/test_triton_properties.py",), "interpret"),
}


def misplaced() -> list[str]:
    """Mutants whose text does not occur exactly once in their file, or changes nothing."""
    found = []
    for mutant in MUTANTS:
        times = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if times != 1 or mutant.old == mutant.new:
            found.append(f"{mutant.file}: {mutant.old!r} occurs {times} times, expected once")
    return found


def copy_tree(folder: Path) -> Path:
    """The files that the tests of the loss need, in a folder of their own."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def passes(tree: Path, name: str) -> bool:
    """True when the suite passes in this tree; False when it fails or does not end."""
    suite = SUITES[name]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        # a file changed twice in one second must not be taken for its cached bytes
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    backend = [] if suite.backend == "torch" else ["--backend", suite.backend]
    try:
        status = subprocess.run(
            [*command, *backend, *suite.arguments],
            cwd=tree,
            env=environment,
            timeout=LIMIT_S,
            capture_output=True,
        ).returncode
    except subprocess.TimeoutExpired:
        return False
    # 1: tests failed; 2 and 3: the mutant does not even import; all else is a mistake of ours
    assert status in (0, 1, 2, 3), f"pytest ended with {status} for {name}"
    return status == 0


def killed(tree: Path, mutant: Mutant) -> bool:
    """Makes the error, runs its tests, and takes it back."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return not passes(tree, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")


def run(mutants: list[Mutant], workers: int) -> tuple[list[str], list[Mutant]]:
    """Suites that fail without an error in the source, and the mutants that survived."""
    survivors, done = [], 0
    with tempfile.TemporaryDirectory() as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(workers):
            (Path(folder) / str(number)).mkdir()
            trees.put(copy_tree(Path(folder) / str(number)))

        def in_a_tree(work, *args):
            tree = trees.get()
            clock = time.monotonic()
            try:
                return work(tree, *args), time.monotonic() - clock
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(workers) as pool:
            names = sorted({mutant.tests for mutant in mutants})
            results = pool.map(lambda name: in_a_tree(passes, name), names)
            broken = [name for name, (good, _) in zip(names, results, strict=True) if not good]
            if broken:
                return broken, []
            results = pool.map(lambda mutant: in_a_tree(killed, mutant), mutants)
            for mutant, (dead, seconds) in zip(mutants, results, strict=True):
                done += 1
                verdict = "killed" if dead else "SURVIVED"
                head = f"[{done}/{len(mutants)}] {verdict} by {mutant.tests} in {seconds:.0f} s"
                print(f"{head}: {mutant.file}: {mutant.breaks}", flush=True)
                survivors += [] if dead else [mutant]
    return [], survivors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants with this in their file or description")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--numbers", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(argv)
    problems = misplaced()
    if problems:
        print("\n".join(problems))
        return 1
    chosen = [m for m in MUTANTS if args.only in f"{m.file}: {m.breaks}"]
    broken, survivors = run(chosen, args.workers)
    for name in broken:
        print(f"the suite {name!r} fails without any mutant: {' '.join(SUITES[name].arguments)}")
    for mutant in survivors:
        print(f"survived: {mutant.file}: {mutant.breaks}\n- {mutant.old}\n+ {mutant.new}")
    figures = {"mutants": len(chosen), "killed": 0 if broken else len(chosen) - len(survivors)}
    if args.numbers:
        args.numbers.write_text(json.dumps(figures), encoding="utf-8")
    print(json.dumps(figures))
    return 1 if broken or survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
