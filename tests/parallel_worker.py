"""One rank of `test_parallel.py`: `python parallel_worker.py folder rank world` runs every check in
one process group and writes what each said to folder/rank.json.

The ranks hold shards of the same head; each compares its own rows with what one process computes
from the whole of it.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta

import gather_checks
import torch
import torch.distributed as dist
import vocabulary_checks

CHECKS = (*vocabulary_checks.CHECKS, *gather_checks.CHECKS)


def main(folder: str, rank: str, world: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=40),
    )
    said = {}
    for function in CHECKS:
        try:
            function()
            said[function.__name__] = ""
        except Exception:  # noqa: BLE001 (the boundary: pytest shows it)
            said[function.__name__] = traceback.format_exc()
            break
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(said, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
