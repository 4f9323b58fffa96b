"""Checks that need a process group: a test starts one worker for each rank, which runs them all
and writes what each said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def ask(worker: str, folder: Path, world: int, timeout: float = 150) -> list[dict[str, str]]:
    """What each rank of `python worker folder rank world` said to each check: its traceback, or
    nothing."""
    path = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    alone = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / worker), str(folder), str(rank), str(world)],
            env={**os.environ, **alone},
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
    files = [folder / f"{rank}.json" for rank in range(world)]
    assert all(file.exists() for file in files), "\n".join(printed)[-4000:]
    return [json.loads(file.read_text()) for file in files]


def judge(said: list[dict[str, str]], name: str) -> None:
    """Fails with the traceback of the first rank for which a check did not pass."""
    for rank, answers in enumerate(said):
        # a rank stops at its first failure, which would leave the others waiting
        answer = answers.get(name, "not reached: an earlier check failed")
        assert answer == "", f"rank {rank}: {answer}"


def answer(checks: Sequence[Callable], folder: str, rank: str, world: str) -> None:
    """One rank: every check in one gloo process group, then folder/rank.json."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=40),
    )
    said = {}
    for function in checks:
        try:
            function()
            said[function.__name__] = ""
        except Exception:  # noqa: BLE001 (the boundary: pytest shows it)
            said[function.__name__] = traceback.format_exc()
            break
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(said, file)
    dist.destroy_process_group()
