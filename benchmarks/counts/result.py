"""What floors.json holds, and reading it back."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from . import linear
from .compile import CUOBJDUMP
from .linear_page import linear_data
from .machines import MACHINES
from .records import Count, as_json

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("grpo_fast", "kernels", "benchmarks", ":!benchmarks/results")
PACKAGES = ("liger-kernel", "trl", "flash-attn", "cut-cross-entropy")


def result(
    ours: Iterable[Count],
    theirs: Iterable[Count],
    skipped: list[dict[str, str]],
    others: Iterable[Path],
) -> dict[str, Any]:
    """Everything of a run. others: files of `--rows`, ours with another Triton."""
    runs = {triton.__version__: as_json(ours)}
    for path in others:
        runs |= json.loads(path.read_text(encoding="utf-8"))
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", *SOURCES)),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "versions": _versions(),
        "machines": {target: asdict(machine) for target, machine in MACHINES.items()},
        "ours": runs,
        "peers": as_json(theirs),
        "skipped": skipped,
        "linear": linear_data(linear.Shape(), linear.DESIGNS, linear.Rates()),
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return "" if done.returncode else done.stdout.strip()


def _versions() -> dict[str, str]:
    text = subprocess.run(
        [str(CUOBJDUMP.with_name("ptxas")), "--version"], capture_output=True, text=True
    ).stdout
    ptxas = re.search(r"V([\d.]+)", text)
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": ptxas[1] if ptxas else "unknown",
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def text(data: dict[str, Any]) -> str:
    """The file: JSON with a line for each count, so that a change of a kernel reads as one."""
    lines = json.dumps(data, separators=(",", ":"))
    return re.sub(r'(?<=[\[\]},])(?=\["|"\w+":[{\[])', "\n", lines) + "\n"
