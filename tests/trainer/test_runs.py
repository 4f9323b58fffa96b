"""What a run may not touch: its weights by watching it, another run by sharing its folder."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_trainer import dataset, spread_reward, trainer
from transformers import TrainerCallback

from grpo_fast.trainer import checkpoint
from grpo_fast.trainer.folder import run_folder

SAVING = {"save_strategy": "steps", "save_steps": 1}


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_evaluation_changes_no_weight(tmp_path):
    plain = trainer(tmp_path / "plain", reward=spread_reward, max_steps=3)
    plain.train()
    watching = {"eval_dataset": dataset(3), "eval_strategy": "steps", "eval_steps": 1}
    watched = trainer(
        tmp_path / "watched", reward=spread_reward, max_steps=3, eval_on_start=True, **watching
    )
    watched.train()
    assert any("eval_reward" in row for row in watched.state.log_history)
    assert torch.equal(weights(plain), weights(watched))


def test_the_best_checkpoint_is_that_of_the_highest_reward(tmp_path):
    def falls(completions, trainer_state=None, **_):
        base = 4 - max(trainer_state.global_step, 1)
        return [base + 0.1 * (i % 2) for i in range(len(completions))]

    watching = {"eval_dataset": dataset(2), "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(
        tmp_path, reward=falls, max_steps=3, load_best_model_at_end=True, **SAVING, **watching
    )
    run.train()
    assert run.args.metric_for_best_model == "reward" and run.args.greater_is_better
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    lowest = {"load_best_model_at_end": True, "metric_for_best_model": "loss", **watching}
    assert not trainer(tmp_path, **lowest, **SAVING).args.greater_is_better


class Stop(TrainerCallback):
    """End the run after two steps, as a kill would."""

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= 2


WINDOWS = {"steps_per_generation": 2, "num_iterations": 2, **SAVING, "reward": spread_reward}


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_finished_run_resumed_does_nothing(length, tmp_path):
    first = trainer(tmp_path, **WINDOWS, **length, logging_steps=2)
    want = first.train()
    lines = (tmp_path / "metrics.jsonl").read_text()
    second = trainer(tmp_path, **WINDOWS, **length, logging_steps=2)
    got = second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(first), weights(second))
    assert second.state.global_step == first.state.global_step == got.global_step
    assert got.training_loss == pytest.approx(want.training_loss, rel=1e-6)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_train_loss_is_that_of_all_steps(logging_steps, tmp_path):
    settings = {**WINDOWS, "max_steps": 4, "logging_steps": logging_steps}
    whole = trainer(tmp_path / "whole", **settings)
    want = whole.train()
    trainer(tmp_path / "cut", callbacks=[Stop()], **settings).train()
    # named by the arguments, as a launcher does
    rest = trainer(tmp_path / "cut", **settings, resume_from_checkpoint="True")
    got = rest.train()
    assert torch.equal(weights(whole), weights(rest))
    assert got.training_loss == want.training_loss == got.metrics["train_loss"]
    assert rest.state.log_history[-1]["train_loss"] == want.training_loss


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-3}, {"weight_decay": 0.1}, {"optim": "sgd"}]
)
def test_what_the_optimizer_has_saved_cannot_be_changed(change, tmp_path):
    trainer(tmp_path, max_steps=1, **SAVING).train()
    run = trainer(tmp_path, max_steps=2, **SAVING, **change)
    (name,) = change
    with pytest.raises(ValueError, match=f"of another one: {name} was"):
        run.train(resume_from_checkpoint=True)


def test_what_a_resumed_run_follows_is_said(tmp_path, caplog):
    trainer(tmp_path, max_steps=1, **SAVING).train()
    run = trainer(tmp_path, max_steps=2, max_grad_norm=0.5, lr_scheduler_type="cosine", **SAVING)
    run.train(resume_from_checkpoint=True)
    said = [r.getMessage() for r in caplog.records if "follows" in r.getMessage()]
    for line in ("max_steps was 1, is 2", "max_grad_norm was 1.0, is 0.5", "lr_scheduler_type was"):
        assert any(line in message for message in said), line


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "grpo_fast_rank0.safetensors",
        "grpo_fast_rank0.json",
    ],
)
def test_a_flipped_bit_is_noticed_and_an_older_checkpoint_used(name, tmp_path, caplog):
    """Same size, another content: in each file of the newest checkpoint."""
    trainer(tmp_path, max_steps=2, **SAVING).train()
    path = tmp_path / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run = trainer(tmp_path, max_steps=3, **SAVING)
    with pytest.raises(ValueError, match=f"checkpoint-2: its file {name} is damaged"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    folder, skipped = checkpoint.newest(str(tmp_path))
    assert folder.name == "checkpoint-1" and f"{name} is damaged" in skipped[0]


def test_a_fresh_run_sets_the_one_before_aside(tmp_path):
    """Its checkpoints are neither resumed nor deleted by save_total_limit; nothing is mixed."""
    trainer(tmp_path, max_steps=3, log_completions=True, **SAVING).train()
    second = trainer(tmp_path, max_steps=1, seed=4, save_total_limit=1, **SAVING)
    second.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    old = tmp_path / "previous-1"
    assert len(list(old.glob("checkpoint-*"))) == 3
    assert len(list((old / "completions").iterdir())) == 3
    assert not (tmp_path / "completions").exists()
    trainer(tmp_path, max_steps=1, **SAVING).train()
    assert (tmp_path / "previous-2" / "checkpoint-1").is_dir()


def test_two_runs_cannot_share_a_folder(tmp_path):
    """The lock goes with its holder: a run that fails leaves none."""
    run = trainer(tmp_path, max_steps=1)
    with (
        run_folder(str(tmp_path), True),
        pytest.raises(ValueError, match=f"no other run .* held by process {os.getpid()}"),
    ):
        run.train()
    with pytest.raises(ZeroDivisionError), run_folder(str(tmp_path), True):
        raise ZeroDivisionError
    run.train()
