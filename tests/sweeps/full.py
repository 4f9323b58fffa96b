"""The sweeps that are too long for `make test`: `python tests/sweeps/full.py [--only NAME]`.

Runs each sweep of `SWEEPS` in a process of its own and writes what it found to
tests/results/full.json, and a table of it to tests/results/full.md, after each one. A sweep is a
command that exits with 0 when it passed; where it names `{numbers}` it gets the path of a JSON file
to write a flat dict of its figures to. The exit status is 1 when any of the sweeps run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "results"


@dataclass(frozen=True)
class Sweep:
    """A row of the table."""

    claim: str
    """What passing shows, in a sentence."""
    command: tuple[str, ...]
    """Arguments of this Python, run at the root of the repository."""


SWEEPS: dict[str, Sweep] = {
    "mutants": Sweep(
        "Each of the errors of tests/sweeps/mutants.py, made on purpose in a copy of the source, "
        "is noticed by the tests of make test.",
        ("tests/sweeps/full_mutants.py", "--numbers", "{numbers}"),
    ),
    "properties": Sweep(
        "2,000 random calls give the same loss, gradients and metrics on the torch backend and on "
        "the kernels in Triton's interpreter.",
        ("tests/sweeps/full_properties.py", "--numbers", "{numbers}"),
    ),
    "kills": Sweep(
        "20 PPO runs killed at random moments, inside dropped steps, later epochs and saves too, "
        "are continued and end with the bits of a run that nothing stopped.",
        ("tests/sweeps/full_kills.py", "--numbers", "{numbers}"),
    ),
    "ppo": Sweep(
        "On a toy the reward of PPO with either critic, and of GRPO, rises from below 0.1 to above "
        "0.8 with three seeds, and every critic explains more than 0.3 of the variance of the "
        "returns while it learns.",
        ("tests/sweeps/full_ppo.py", "--numbers", "{numbers}"),
    ),
    "curves": Sweep(
        "300 steps of a toy model with bf16 weights stay inside the seed band of the fp32 "
        "reference, and in every setting a wrong loss leaves it.",
        ("tests/sweeps/full_curves.py", "--numbers", "{numbers}"),
    ),
}


def write_atomically(path: Path, text: str) -> None:
    """All of text or nothing of it: a stopped run leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _git(*arguments: str) -> str | None:
    """What git prints, None where there is no git or no repository."""
    try:
        out = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def provenance() -> dict[str, Any]:
    """Versions, commit (with + where files differ from it, results aside), date, and cores."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!tests/results")
    return {
        "versions": versions,
        "commit": commit and commit + ("+" if changed else ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
    }


def run(name: str, sweep: Sweep) -> dict[str, Any]:
    """Runs one sweep, its output passed on, and returns its entry."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "numbers.json"
        command = [part.replace("{numbers}", str(path)) for part in sweep.command]
        environment = dict(os.environ)
        # `python tests/sweeps/full_curves.py` has to find grpo_fast where it is not installed, too
        paths = [str(ROOT), str(ROOT / "tests" / "support"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        start = provenance()
        clock = time.perf_counter()
        status = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode
        seconds = round(time.perf_counter() - clock, 1)
        asked = command != list(sweep.command)
        written = path.is_file()
        numbers = json.loads(path.read_text(encoding="utf-8")) if written else {}
    return {
        "name": name,
        "claim": sweep.claim,
        # a sweep that promised figures and left none did not do what it says
        "passed": status == 0 and (written or not asked),
        "exit_status": status,
        "numbers": numbers,
        "seconds": seconds,
        "command": " ".join(sweep.command),
        **start,
    }


def table(entries: list[dict[str, Any]]) -> str:
    """The page for readers of the repository."""
    lines = [
        "# Last result of `make test-full`",
        "",
        "Written by `tests/sweeps/full.py`; do not edit. A commit with `+` had changes on top of "
        "it.",
        "",
    ]
    for entry in entries:
        verdict = "passed" if entry["passed"] else "FAILED"
        versions = ", ".join(f"{k} {v}" for k, v in entry["versions"].items() if v)
        lines += [
            f"## {entry['name']}: {verdict}",
            "",
            entry["claim"],
            "",
            f"{entry['date']}, {entry['seconds']:.0f} s on {entry['cores']} cores, "
            f"commit {entry['commit'] or 'unknown'}, {versions}.",
            "",
        ]
        if entry["numbers"]:
            lines += ["| figure | value |", "|---|---|"]
            lines += [f"| {key} | {value} |" for key, value in entry["numbers"].items()]
            lines.append("")
    return "\n".join(lines)


def load(results: Path) -> dict[str, dict[str, Any]]:
    """Entries of an earlier run by name, of the sweeps that still exist."""
    path = results / "full.json"
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["sweeps"]
    return {entry["name"]: entry for entry in entries if entry["name"] in SWEEPS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this sweep; repeatable")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of full.json")
    args = parser.parse_args(argv)
    unknown = [name for name in args.only or () if name not in SWEEPS]
    if unknown:
        parser.error(f"no sweep is called {unknown[0]!r}. Known: {', '.join(SWEEPS)}.")
    chosen = [name for name in SWEEPS if not args.only or name in args.only]
    entries, failed = load(args.results), []
    for number, name in enumerate(chosen, 1):
        head = f"== [{number}/{len(chosen)}] {name}"
        print(f"{head}: {SWEEPS[name].claim}", flush=True)
        entry = run(name, SWEEPS[name])
        entries[name] = entry
        failed += [] if entry["passed"] else [name]
        verdict = "passed" if entry["passed"] else f"FAILED, exit status {entry['exit_status']}"
        print(f"{head}: {verdict}, {entry['seconds']:.0f} s", flush=True)
        ordered = [entries[known] for known in SWEEPS if known in entries]
        write_atomically(
            args.results / "full.json", json.dumps({"sweeps": ordered}, indent=1) + "\n"
        )
        write_atomically(args.results / "full.md", table(ordered))
    print(f"test-full: {len(chosen) - len(failed)} of {len(chosen)} sweeps passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
