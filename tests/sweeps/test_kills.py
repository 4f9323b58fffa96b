"""A small sample of the sweep `kills`, and a check that it notices a run that lost something."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from full import ROOT

SWEEP = ROOT / "tests" / "sweeps" / "full_kills.py"


def run(tmp_path, program, *arguments):
    paths = [str(ROOT), *(str(ROOT / "tests" / folder) for folder in ("support", "sweeps"))]
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    paths.append(os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)}
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, *program, *arguments, "--numbers", str(numbers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert numbers.is_file(), done.stderr[-3000:]
    return done.returncode, json.loads(numbers.read_text())


@pytest.mark.slow
def test_two_kills(tmp_path):
    """A SIGKILL in a step that is dropped, with either critic."""
    status, numbers = run(tmp_path, [str(SWEEP)], "--kills", "2", "--seed", "5")
    assert status == 0 and numbers["kills"] == numbers["identical"] == 2


@pytest.mark.slow
def test_a_lost_order_is_noticed(tmp_path):
    """With an order of the epochs that a resumed run does not repeat."""
    broken = (
        "import os, sys, full_kills\n"
        "from grpo_fast.trainer import epochs\n"
        "from random import Random\n"
        "epochs.Random = lambda text: Random(f'{text}:{os.getpid()}')\n"
        "sys.exit(full_kills.main(sys.argv[1:]))"
    )
    status, numbers = run(tmp_path, ["-c", broken], "--kills", "1")
    assert status == 1 and numbers["identical"] == 0
