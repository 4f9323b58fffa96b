"""Two processes against one: the same weights, metrics and resume."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import train
from safetensors.torch import load_file
from tiny_trainer import model

from grpo_fast.trainer import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
pytestmark = pytest.mark.slow


def on_two_ranks(*runs: dict) -> None:
    """Trains each of the runs, one after the other, on the same two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")])
    alone = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(SUPPORT / "ddp_worker.py"), json.dumps(runs)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **alone, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(text[-3000:] for text in printed)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What two processes trained: the runs `two` and `whole`."""
    folder = tmp_path_factory.mktemp("ranks")
    two = {"folder": str(folder / "two"), "size": 3}
    on_two_ranks(two, {**two, "folder": str(folder / "whole"), "sampled": True})
    return folder


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key: value for row in rows[:2] for key, value in row.items()}


def test_two_ranks_train_what_one_does(trained, tmp_path):
    """A group of four lies on both ranks, and the ranks hold unequal numbers of tokens."""
    train(tmp_path, 6)
    one, two = weights(tmp_path), weights(trained / "two")
    moved = [(one[n] - p).abs().max() for n, p in model().state_dict().items() if n in one]
    assert max(moved) > 1e-2
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    first, second = lines(tmp_path), lines(trained / "two")
    assert first.keys() == second.keys() and first["seen"] == 12 and second["seen"] == 6
    # a group that lies on both ranks has its prompt on both
    varying = ("seen", "step_time", "time", "runtime", "per_second", "active_rows", "forward_share")
    local = ("clip_ratio/low_min", "clip_ratio/high_max", "eval_")
    for key, value in first.items():
        if not any(key.endswith(v) for v in varying) and not key.startswith(local):
            assert second[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    table = sorted((trained / "two" / "completions").iterdir())
    assert [p.name for p in table] == ["completions_00004.parquet", "eval_00004.parquet"]


def test_ranks_sample_apart_and_resume_together(trained, tmp_path):
    """All prompts are the same one: only the random state of the ranks can tell them apart. The run
    that was resumed has processes of its own, the whole one had trained something else before."""
    whole = weights(trained / "whole")
    folder = trained / "whole" / "checkpoint-1"
    assert checkpoint.problem(folder) is None
    windows = [load_file(folder / checkpoint.rank_file(r, "safetensors")) for r in (0, 1)]
    first, second = ({k.split(".")[-1]: v for k, v in w.items() if ".0." in k} for w in windows)
    assert torch.equal(first["input_ids"][:, 0], second["input_ids"][:, 0])
    assert not torch.equal(first["ids"], second["ids"])
    on_two_ranks({"folder": str(tmp_path), "size": 3, "sampled": True, "resume": str(folder)})
    resumed = weights(tmp_path)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_rank_whose_groups_are_flat_takes_part(tmp_path):
    """Rank 0 has no gradient: the weights are those of one process all the same."""
    options = {"beta": 0.0, "flat": True}
    on_two_ranks({"folder": str(tmp_path / "two"), "size": 4, "options": options})
    train(tmp_path / "one", 8, options=options)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = [(one[n] - p).abs().max() for n, p in model().state_dict().items() if n in one]
    assert max(moved) > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
