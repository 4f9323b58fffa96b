"""The script for the first minutes on a GPU, rehearsed in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.counts import launches

ROOT = Path(__file__).resolve().parents[2]
# as `time_rows` names them at full size
TIMED = {
    "logprob_fwd bf16 V=151936",
    "logprob_fwd bf16 V=151936 no entropy",
    "logprob_bwd bf16 V=151936",
    "logprob_bwd bf16 V=151936 dentropy",
    "logprob_fwd fp32 V=151936",
    "logprob_bwd fp32 -> bf16 V=151936",
    "policy bf16 V=151936",
}


def rehearse(tmp_path, *more):
    out = tmp_path / "results" / "first.json"
    command = [sys.executable, "-m", "benchmarks.first_minute", "--rehearse", "--out", out, *more]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    return done, json.loads(out.read_text(encoding="utf-8"))


def test_every_part_runs_and_is_written(tmp_path):
    done, result = rehearse(tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(result) == ["machine", "ceilings", "right", "rows", "linear", "sweep"]
    assert len(result["right"]) == 4 and not any(row["wrong"] for row in result["right"])
    assert {row["arm"] for row in result["linear"]} == {"rows wait", "fp32 dweight"}
    assert result["sweep"][0]["table"] == "as shipped" and len(result["sweep"]) >= 8
    assert "every kernel agrees with float64" in done.stderr


def test_what_is_cut_short_is_said(tmp_path):
    done, result = rehearse(tmp_path, "--minutes", "0")
    assert result["cut short at"] == "right" and "the time ended in: right" in done.stderr


def test_every_timed_launch_has_a_count():
    assert {case.name for case in launches.cases()} >= TIMED


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.first_minute", "--out", tmp_path / "x.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--rehearse" in done.stderr
    assert not (tmp_path / "x.json").exists()
