"""The benchmark driver end to end on toy shapes, in a process of its own as `make bench` has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[2]


def run(*options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks/test_linear.py", "-q", "-p"]
    return subprocess.run(
        [*command, "no:cacheprovider", "--cases", "tiny", "--seconds-per-case", "0.01", *options],
        cwd=ROOT,
        env={**os.environ, "GRPO_FAST_BACKEND": "torch", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = run(f"--benchmark-json={folder / 'new' / 'r.json'}", f"--partial={folder / 'p.jsonl'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "new" / "r.json").read_text())


def test_every_contestant_is_a_result_or_a_reason(result):
    from benchmarks.cases import CASES
    from benchmarks.measure.contest import passes
    from benchmarks.peers import PEERS

    _, data = result
    ran = {
        (b["extra_info"]["case"]["name"], b["extra_info"]["peer"], b["extra_info"]["pass"])
        for b in data["benchmarks"]
    }
    left_out = {(s["case"]["name"], s["peer"]) for s in data["skipped"] if s["reason"]}
    for case in CASES["tiny"]["linear"]:
        for peer in PEERS:
            for name in passes("linear", case):
                one = (case.name, peer.name, name) in ran
                assert one != ((case.name, peer.name) in left_out)


def test_ours_is_exact_and_every_number_is_there(result):
    _, data = result
    ours = [b for b in data["benchmarks"] if b["extra_info"]["peer"] == "grpo_fast"]
    assert len(ours) == 6
    for entry in ours:
        info = entry["extra_info"]
        assert info["exact"] and max(info["error"].values()) < 2e-5
        assert 0 < entry["stats"]["median"] < 60 and entry["stats"]["rounds"] >= 3
        assert info["peak_bytes"] > 0 and info["floor_flops"] > 0
    frozen = {b["extra_info"]["pass"]: b["extra_info"] for b in ours if not case_of(b)["trainable"]}
    assert "dweight" not in frozen["forward+backward"]["error"]
    assert frozen["forward+backward"]["floor_flops"] == 2 * frozen["forward"]["floor_flops"]
    machine = data["machine_info"]
    assert "node" not in machine and machine["gemm_flops"]["float32"] > 1e8


def case_of(entry: dict) -> dict:
    return entry["extra_info"]["case"]


def test_a_stopped_run_goes_on_and_changed_sources_do_not(result):
    folder, first = result
    lines = (folder / "p.jsonl").read_text().strip().split("\n")
    machine, *lines = lines
    assert len(lines) == 3 and '"machine"' in machine
    # killed while it wrote its last line; and a line of other sources
    other = lines[1].replace(first["sources"], "0" * 12)
    assert other != lines[1]
    (folder / "p.jsonl").write_text(f"{machine}\n{lines[0]}\n{other}\n{lines[2][:50]}")
    done = run(f"--benchmark-json={folder / 's.json'}", f"--partial={folder / 'p.jsonl'}")
    assert done.returncode == 0, done.stdout + done.stderr
    second = json.loads((folder / "s.json").read_text())

    def times(data: dict, name: str) -> list[float]:
        return [b["stats"]["median"] for b in data["benchmarks"] if case_of(b)["name"] == name]

    assert times(first, "tiny") == times(second, "tiny")
    assert first["machine_info"]["gemm_flops"] == second["machine_info"]["gemm_flops"]
    for name in ("tiny-old-kl", "tiny-frozen"):
        assert times(first, name) != times(second, name) and len(times(second, name)) > 1


def test_the_time_limit_lists_what_it_left_out(tmp_path):
    done = run(
        f"--benchmark-json={tmp_path / 'r.json'}",
        f"--partial={tmp_path / 'p.jsonl'}",
        "--time-limit=1e-9",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the time limit of 0 s was reached" in done.stdout and " passed" not in done.stdout


def test_a_gpu_set_without_a_gpu_is_refused_in_a_sentence():
    done = run("--cases=gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "--cases gpu needs an NVIDIA GPU, and torch sees none" in done.stdout + done.stderr


def test_floors_are_printed_for_every_gpu_case():
    command = [sys.executable, "-m", "benchmarks.measure.floors"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # 6 x 8192 x 4096 x 151936 FLOP at 788 TFLOP/s
    assert "| qwen3-8b-8k | forward+backward | 8192 | 4096 | 151936 | 8192 | 8192 | 30.59 |" in out
    assert "| 38.82 |" in out and len(out.splitlines()) > 40
