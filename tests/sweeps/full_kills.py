"""Kills of PPO runs at random moments: `python tests/sweeps/full_kills.py [--kills N]`.

A toy run of three windows, four micro-batches and three epochs each, has a checkpoint at every
step; its KL stop drops some of the steps, a controller moves the coefficient. Each kill is a
SIGKILL from a thread of the run, at a random moment of a random step or of the save behind it; the
run is then started again with `resume_from_checkpoint=True` and has to end with the bits of the run
that nothing stopped: policy, critic, log and counters. Half of the kills fall into steps that are
dropped. The processes are forked, so that a run costs no imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_ppo import trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from grpo_fast.trainer import checkpoint

STEPS = 30
SETTINGS = {
    "steps_per_generation": 4,
    "num_iterations": 3,
    "max_steps": STEPS,
    "learning_rate": 3e-3,
    "target_kl": 0.05,
    "kl_controller": "ziegler",
    "kl_target": 0.1,
    "kl_horizon": 50,
    "save_strategy": "steps",
    "save_steps": 1,
}
CRITICS = ("shared", "separate")
# longer than any step here: a kill in the save behind a step as well
LONGEST = 0.15


class Kill(TrainerCallback):
    """SIGKILL so many seconds after a step has begun."""

    def __init__(self, step: int, delay: float) -> None:
        self.step, self.delay = step, delay

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            kill = (os.getpid(), signal.SIGKILL)
            threading.Timer(self.delay, os.kill, kill).start()


def forked(call: Callable[[], None], log: Path) -> int:
    """Run it in a forked process, its output in a file; the exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        call()
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def train(folder: Path, critic: str, kill: Kill | None = None) -> None:
    """A run in this folder, continued where it has a complete checkpoint, and what it ends with."""
    run = trainer(folder, critic=critic, **SETTINGS)
    if kill is not None:
        run.add_callback(kill)
    run.train(resume_from_checkpoint=last(folder) > 0)
    run.save_model()
    plain, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["unexpected_keys"] and not found["missing_keys"]
    assert not any("critic" in name for name in plain.state_dict())
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    files = (folder / "model.safetensors", folder / "critic" / "critic.safetensors")
    end = {
        "weights": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "log": [{k: v for k, v in row.items() if k not in timed} for row in run.state.log_history],
        "state": [run.kl_stop.state_dict(), run.kl.state_dict(), run.counters.state_dict()],
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }
    (folder / "end.json").write_text(json.dumps(end, default=str), encoding="utf-8")


def last(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    steps = [int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")]
    whole = [s for s in steps if checkpoint.problem(folder / f"checkpoint-{s}") is None]
    return max(whole, default=0)


def ended(folder: Path) -> dict[str, Any]:
    """What `train` left."""
    return json.loads((folder / "end.json").read_text(encoding="utf-8"))


def dropped_steps(end: dict[str, Any]) -> list[int]:
    """Steps that the KL stop has dropped."""
    counts = [row["skipped_steps"] for row in end["log"] if "skipped_steps" in row]
    pairs = zip([0, *counts], counts, strict=False)
    return [step for step, (a, b) in enumerate(pairs, 1) if b > a]


def one_kill(folder: Path, critic: str, moment: Kill) -> tuple[int, bool]:
    """Kill a run and let it go on: the last complete step, and whether a save was torn."""
    log = folder.with_suffix(".log")
    status = forked(lambda: train(folder, critic, moment), log)
    assert status in (-signal.SIGKILL, 0), log.read_text()[-3000:]
    reached = last(folder)
    torn = any(checkpoint.problem(path) for path in folder.glob("checkpoint-*"))
    if status:
        assert forked(lambda: train(folder, critic), log) == 0, log.read_text()[-3000:]
    return reached, torn


def main(argv: list[str] | None = None) -> int:
    """0 when every run ended with the bits of its undisturbed twin."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--numbers", type=Path)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    chance = random.Random(asked.seed)
    counts = {"kills": 0, "identical": 0, "in dropped steps": 0, "in a later epoch": 0}
    counts |= {"in a save": 0, "before the first checkpoint": 0}
    with tempfile.TemporaryDirectory() as place:
        whole = {}
        for critic in CRITICS[: asked.kills]:
            folder = Path(place) / critic
            log = folder.with_suffix(".log")
            assert forked(lambda c=critic, f=folder: train(f, c), log) == 0, log.read_text()[-3000:]
            whole[critic] = ended(folder)
        for number in range(asked.kills):
            critic = CRITICS[number % len(CRITICS)]
            dropped = dropped_steps(whole[critic])
            assert 0 < len(dropped) < STEPS - 6, dropped
            step = chance.choice(dropped) if number % 4 < 2 else chance.randint(1, STEPS)
            folder = Path(place) / f"killed-{number}"
            # the save behind a step takes longer than the step
            moment = Kill(step, chance.uniform(0, LONGEST if number % 3 else LONGEST / 10))
            reached, torn = one_kill(folder, critic, moment)
            same = ended(folder) == whole[critic]
            counts["kills"] += 1
            counts["identical"] += same
            counts["in dropped steps"] += reached + 1 in dropped
            counts["in a later epoch"] += reached % 12 >= 4
            counts["in a save"] += torn
            counts["before the first checkpoint"] += reached == 0
            verdict = "identical" if same else "DIFFERENT"
            where = f"{moment.delay:.3f} s into step {step}, checkpoint of step {reached}"
            print(f"{number + 1} of {asked.kills}: {critic}, killed {where}: {verdict}", flush=True)
            shutil.rmtree(folder)
    print(counts)
    if asked.numbers:
        asked.numbers.write_text(json.dumps(counts), encoding="utf-8")
    return 0 if counts["identical"] == counts["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
