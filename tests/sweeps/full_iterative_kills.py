"""The loop killed at random points, in every stage, ends as the uninterrupted one, bit for bit.

Each attempt is a process of its own that is sent SIGKILL after a random time; it is started again
until it ends. 20 kills of the loop, and 20 of a run with replay:

    PYTHONPATH=.:tests/support python tests/sweeps/full_iterative_kills.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS = 20


def work(kind: str, folder: str, source: str) -> None:
    """One attempt, in this process."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trainer"))
    if kind == "loop":
        from test_iterative import loop

        loop(folder, source).train()
        return
    from test_mixture import replayed

    going_on = any(Path(folder).glob("checkpoint-*/grpo_fast_complete.json"))
    trainer = replayed(folder)
    trainer.train(resume_from_checkpoint=going_on)
    trainer.save_model(str(Path(folder) / "model"))
    (Path(folder) / "ended").touch()


def attempt(kind: str, folder: Path, source: str, limit: float | None) -> bool:
    """Whether an attempt ended; it is killed after `limit` seconds."""
    command = [sys.executable, __file__, "--work", kind, str(folder), source]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, error = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(error.decode()[-2000:])
    return True


def digest(folder: Path) -> dict[str, str]:
    """Hashes of all weights and reports."""
    files = sorted([*folder.rglob("model/model.safetensors"), *folder.glob("report/reports.json")])
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if "previous" not in str(p)
    }


def sweep(kind: str, source: str, kills: int, root: Path) -> tuple[int, bool, float]:
    """(kills made, whether the end is the same, seconds)."""
    began = time.perf_counter()
    attempt(kind, root / "whole", source, None)
    whole = time.perf_counter() - began
    wanted = digest(root / "whole")
    rng, made, same, run = random.Random(0), 0, True, 0
    while made < kills:
        run += 1
        folder = root / f"cut{run}"
        while made < kills and not attempt(kind, folder, source, rng.uniform(0.3, 1.0) * whole):
            made += 1
        attempt(kind, folder, source, None)
        same = same and digest(folder) == wanted
    return made, same and bool(wanted), time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=3)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--numbers", type=Path)
    parser.add_argument("--only", choices=["loop", "replay"])
    given = parser.parse_args()
    if given.work:
        work(*given.work)
        return 0
    import tiny_trainer

    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[1:])
    out, good = {}, True
    with tempfile.TemporaryDirectory() as folder:
        source = tiny_trainer.checkpoint(Path(folder) / "source")
        for kind in [given.only] if given.only else ["loop", "replay"]:
            made, same, seconds = sweep(kind, source, given.kills, Path(folder) / kind)
            out |= {f"{kind} kills": made, f"{kind} identical": int(same)}
            out[f"{kind} seconds"] = round(seconds, 1)
            good = good and same
    print(json.dumps(out, indent=1))
    if given.numbers:
        given.numbers.write_text(json.dumps(out))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
