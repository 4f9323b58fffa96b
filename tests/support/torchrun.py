"""Workers of a training run on several processes, with the environment that torchrun gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]

# of what two processes and one log
COMPARED = {"loss", "kl", "grad_norm", "entropy", "reward", "ratio/max", "active_rows"}


def launch(
    worker: str, *arguments: str, world: int = 2, timeout: float = 500, **environment: str
) -> list[tuple[int, str]]:
    """Exit code and output of each rank of `python worker arguments`, all of which are killed when
    the time is over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")])
    alone = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    alone |= {"LOCAL_WORLD_SIZE": str(world), **environment}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / worker), *arguments],
            env={**os.environ, **alone, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(p.returncode, text) for p, text in zip(ranks, printed, strict=True)]


def trained(engine: str, *runs: dict, **options) -> None:
    """Train each of the runs, one after the other, on the same processes."""
    done = launch("sharded_worker.py", engine, json.dumps(runs), **options)
    assert [code for code, _ in done] == [0] * len(done), "\n".join(t[-3000:] for _, t in done)


def final(folder: Path) -> dict[str, torch.Tensor]:
    """Weights that `save_model` wrote."""
    (file,) = (folder / "final").glob("*model.safetensors")
    return load_file(file)


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "grad_norm" in row]
