"""SIGTERM and Ctrl-C end a run after its step, with a checkpoint that goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_trainer import count_w3, dataset, model, tokenizer, trainer
from transformers import TrainerCallback

from grpo_fast.cli.main import _again

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"reward": count_w3, "train_dataset": dataset(8), "max_steps": 4}
SETTINGS |= {"steps_per_generation": 2, "gradient_accumulation_steps": 1}


class Sends(TrainerCallback):
    """Signals to this process at the beginning of a step."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def same(a, b):
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_signal_ends_the_step_and_saves_it(number, step, tmp_path, caplog):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    whole = trainer(tmp_path / "whole", **SETTINGS)
    whole.train()
    cut = trainer(tmp_path / "cut", **SETTINGS, callbacks=[Sends(step, number)])
    cut.train()
    assert cut.state.global_step == step and cut.stopping.stopped == number
    assert f"stopped after step {step} of 4, saved as" in caplog.text
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    again = trainer(tmp_path / "cut", **SETTINGS)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and again.stopping.stopped is None and same(whole, again)


def test_a_second_signal_ends_at_once_and_the_handlers_go_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    for numbers, error in (
        ((signal.SIGTERM, signal.SIGTERM), SystemExit),
        ((signal.SIGTERM, signal.SIGINT), KeyboardInterrupt),
    ):
        run = trainer(tmp_path, **SETTINGS, callbacks=[Sends(2, *numbers)])
        with pytest.raises(error):
            run.train()
        assert run.state.global_step == 1 and signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, caplog):
    run = trainer(tmp_path, **SETTINGS, callbacks=[Sends(4, signal.SIGTERM)])
    run.train()
    assert run.stopping.stopped is None and "stopped after" not in caplog.text


def test_another_thread_trains_without_handlers(tmp_path):
    run = trainer(tmp_path, **SETTINGS)
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert run.state.global_step == 4


def test_one_rank_that_hears_stops_all(tmp_path, monkeypatch):
    run = trainer(tmp_path, **SETTINGS)
    accelerator = run.accelerator
    monkeypatch.setattr(type(accelerator), "num_processes", 2, raising=False)
    monkeypatch.setattr(
        accelerator, "gather", lambda mine: torch.cat([mine, torch.tensor([signal.SIGTERM])])
    )
    assert run.stopping._agreed() == signal.SIGTERM and run.stopping.heard is None


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--seed", "3"], "grpo-fast ppo --seed 3 --resume-from-checkpoint true"),
        (
            ["--resume-from-checkpoint", "x", "--reward", "a b"],
            "grpo-fast ppo --reward 'a b' --resume-from-checkpoint true",
        ),
        (["--resume_from_checkpoint=x"], "grpo-fast ppo --resume-from-checkpoint true"),
    ],
)
def test_the_command_that_goes_on(argv, expected):
    assert _again("ppo", argv) == expected


@pytest.mark.slow
def test_the_command_line_stops_and_goes_on(tmp_path):
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = "\n".join(json.dumps(row) for row in dataset(8))
    (tmp_path / "rows.jsonl").write_text(rows + "\n")
    # a slow reward leaves time to be stopped in
    reward = "import time\ndef judge(completions, **_):\n    time.sleep(0.3)\n"
    reward += "    return [c.count('w3') / 9 for c in completions]\n"
    (tmp_path / "judge.py").write_text(reward)
    options = "--model model --dataset rows.jsonl --reward judge:judge --num-generations 4"
    options += " --per-device-train-batch-size 4 --max-completion-length 6 --max-steps 12"
    options += " --logging-steps 1 --save-strategy no --use-cpu --output-dir out --report-to none"
    command = [sys.executable, "-m", "grpo_fast.cli", "train", *options.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    metrics, until = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 143, said
    assert "go on with: grpo-fast train --model model" in said and "stopped after step" in said
    assert not (tmp_path / "out" / "model.safetensors").exists()
    again = said.split("go on with: grpo-fast ")[1].splitlines()[0].split()
    command = [sys.executable, "-m", "grpo_fast.cli", *again]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in lines if "loss" in row] == list(range(1, 13))
