"""Checkpoints: resume at any optimizer step is bit-identical; bad checkpoints are refused by
name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_trainer import dataset, model, trainer

from grpo_fast.trainer import checkpoint

STEPS = 8
SAVING = {"save_strategy": "steps", "save_steps": 1}
# 2 of 8 micro-steps of a window for each optimizer step, epochs of 4 steps, a moving reference,
# dropout
SETTINGS = {
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "beta": 0.04,
    "sync_ref_model": True,
    "ref_model_sync_steps": 3,
    "max_steps": STEPS,
    "logging_steps": 3,
    "log_completions": True,
    "num_completions_to_print": 1,
    "mask_truncated_completions": True,
    "lr_scheduler_type": "cosine",
}


def build(folder, **overrides):
    settings = {"policy": model(attention_dropout=0.2), "train_dataset": dataset(4), **SETTINGS}
    return trainer(folder, **{**settings, **overrides})


def parameters(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def history(run):
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in run.state.log_history]
    return [row for row in rows if "train_loss" not in row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run without interruption that saved every step."""
    run = build(tmp_path_factory.mktemp("whole"), **SAVING)
    run.train()
    return run


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resume_at_every_step_is_bit_identical(finished, step, tmp_path):
    # a policy of other weights: everything must come out of the checkpoint
    resumed = build(tmp_path, policy=model(seed=9, attention_dropout=0.2))
    torch.manual_seed(77)
    resumed.train(str(Path(finished.args.output_dir) / f"checkpoint-{step}"))
    assert resumed.state.global_step == STEPS
    for name, expected in parameters(finished).items():
        assert torch.equal(dict(resumed.model.named_parameters())[name], expected), name
    for name, expected in finished.reference.state_dict().items():
        assert torch.equal(resumed.reference.state_dict()[name], expected), name
    assert history(resumed) == history(finished)


def test_the_interrupted_runs_differ_without_their_window(finished, tmp_path):
    """The test above would be empty if a fresh window gave the same result."""
    folder = Path(finished.args.output_dir) / "checkpoint-2"
    resumed = build(tmp_path)
    load = resumed._load_run_state

    def forget(path):
        load(path)
        resumed.window.served = 0

    resumed._load_run_state = forget
    resumed.train(str(folder))
    pairs = zip(resumed.model.parameters(), finished.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_true_takes_the_newest_complete_checkpoint_and_names_the_others(finished, tmp_path, caplog):
    output = tmp_path / "run"
    for step in (2, 3, 5):
        name = f"checkpoint-{step}"
        shutil.copytree(Path(finished.args.output_dir) / name, output / name)
    (output / "checkpoint-5" / checkpoint.MARKER).unlink()
    (output / "checkpoint-3" / "optimizer.pt").write_bytes(b"half")
    resumed = build(output)
    with caplog.at_level("WARNING", logger="grpo_fast.trainer.resume"):
        resumed.train(True)
    text = caplog.text
    assert "checkpoint-5: it is incomplete" in text
    assert "checkpoint-3: its file optimizer.pt has 4 bytes" in text
    for a, b in zip(resumed.model.parameters(), finished.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / checkpoint.MARKER).unlink(), "it is incomplete"),
        (lambda f: (f / checkpoint.MARKER).write_text("{"), "is damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda f: (f / "grpo_fast_rank0.json").write_text("{}"),
            "grpo_fast_rank0.json has 2 bytes",
        ),
        (lambda f: shutil.rmtree(f), "there is no such folder"),
    ],
)
def test_a_half_written_checkpoint_is_refused_before_any_work(finished, damage, reason, tmp_path):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(Path(finished.args.output_dir) / "checkpoint-3", folder)
    damage(folder)
    run = build(tmp_path / "out")
    before = parameters(run)
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected a complete") as error:
        run.train(str(folder))
    assert reason in str(error.value) and str(folder) in str(error.value)
    assert all(torch.equal(before[n], p) for n, p in run.model.named_parameters())


def test_no_complete_checkpoint_is_refused(tmp_path):
    run = build(tmp_path)
    with pytest.raises(ValueError, match="it holds no checkpoint-<step> folder"):
        run.train(True)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match="checkpoint-4: it is incomplete"):
        run.train(True)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"loss.beta": {"beta": 0.1}}, ["loss.beta was 0.04, is 0.1"]),
        ({"seed": {"seed": 4}}, ["seed was 3, is 4"]),
        (
            {"advantages": {"scale_rewards": False}},
            ["advantages was ['group', {'scale': 'group'}], is ['centered', {}]"],
        ),
        ({"data": {"train_dataset": dataset(6)}}, ["train_dataset was [4, "]),
        ({"words": {"train_dataset": dataset(8)[4:]}}, ["train_dataset was [4, "]),
        ({"model": {"policy": model(head_dim=4)}}, ["model was "]),
        (
            {"two": {"num_iterations": 1, "epsilon": 0.1}},
            ["num_iterations was 2, is 1", "loss.epsilon was 0.2, is 0.1"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_configuration_is_refused(finished, change, keys, tmp_path):
    (overrides,) = change.values()
    run = build(tmp_path, **overrides)
    with pytest.raises(ValueError, match="a checkpoint of this configuration, got") as error:
        run.train(str(Path(finished.args.output_dir) / "checkpoint-3"))
    for key in keys:
        assert key in str(error.value)


def rewrite(folder, change):
    """Edit the stored fingerprint of a checkpoint, as another version would have written it."""
    marker = json.loads((folder / checkpoint.MARKER).read_text())
    change(marker["fingerprint"])
    checkpoint.write_json(folder / checkpoint.MARKER, marker)


def test_a_checkpoint_older_than_an_option_had_its_default(finished, tmp_path):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(Path(finished.args.output_dir) / "checkpoint-3", folder)

    def older(stored):
        assert "loss.text" not in stored
        stored["loss.text"] = "what 0.1.0 wrote beside the fields"
        del stored["loss.top_entropy_quantile"], stored["min_p"]

    rewrite(folder, older)
    run = build(tmp_path / "run")
    run.train(str(folder))
    assert run.state.global_step == finished.state.global_step
    # what is not the default is another configuration
    with pytest.raises(ValueError, match=r"min_p was None, is 0.5") as error:
        build(tmp_path / "other", min_p=0.5).train(str(folder))
    assert "quantile" not in str(error.value)


def test_learning_rate_and_length_of_the_run_may_change(finished, tmp_path):
    run = build(tmp_path, max_steps=5, logging_steps=1)
    run.train(str(Path(finished.args.output_dir) / "checkpoint-3"))
    assert run.state.global_step == 5


def test_a_save_that_is_interrupted_leaves_no_marker_and_older_ones_stay(tmp_path, monkeypatch):
    # an older run left a complete checkpoint under the name of the one that will be interrupted
    build(tmp_path, max_steps=2, **SAVING).train()
    assert checkpoint.problem(tmp_path / "checkpoint-2") is None
    run = build(tmp_path, save_total_limit=1, max_steps=3, **SAVING)
    real = checkpoint.seal

    def seal(folder, *rest):
        if folder.name == "checkpoint-2":
            raise KeyboardInterrupt
        real(folder, *rest)

    monkeypatch.setattr(checkpoint, "seal", seal)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    monkeypatch.setattr(checkpoint, "seal", real)
    assert checkpoint.problem(tmp_path / "checkpoint-1") is None
    assert "incomplete" in checkpoint.problem(tmp_path / "checkpoint-2")
    again = build(tmp_path, save_total_limit=1, max_steps=3, **SAVING)
    again.train(True)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3"]
    assert checkpoint.problem(tmp_path / "checkpoint-3") is None


def test_old_checkpoints_go_but_never_the_new_or_the_best_one(tmp_path):
    for age, step in enumerate((9, 1, 2, 3, 4)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if step != 3:
            checkpoint.seal(folder, {})
        os.utime(folder, (age, age))
    (tmp_path / "checkpoint-x").mkdir()

    def left():
        return sorted(p.name[11:] for p in tmp_path.iterdir())

    current, best = tmp_path / "checkpoint-4", str(tmp_path / "checkpoint-1")
    checkpoint.rotate(current, None, best)
    assert left() == ["1", "2", "3", "4", "9", "x"]
    checkpoint.rotate(current, 4, best)
    assert left() == ["1", "2", "4", "9", "x"]
    checkpoint.rotate(current, 3, best)
    assert left() == ["1", "2", "4", "x"]
    checkpoint.rotate(current, 1, best)
    assert left() == ["1", "4", "x"]
    checkpoint.rotate(current, 1, None)
    assert left() == ["4", "x"]


def test_the_marker_lists_every_file_with_its_size(finished):
    folder = Path(finished.args.output_dir) / "checkpoint-4"
    marker = json.loads((folder / checkpoint.MARKER).read_text())
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(marker["files"]) == names - {checkpoint.MARKER}
    assert {"model.safetensors", "optimizer.pt", "grpo_fast_rank0.safetensors"} <= names


def test_a_lora_run_resumes_bit_identically(tmp_path):
    from peft import LoraConfig

    def lora(folder, **saving):
        torch.manual_seed(1)
        adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        off = {"sync_ref_model": False, "max_steps": 4}
        return build(folder, policy=model(), peft_config=adapter, **off, **saving)

    whole, resumed = lora(tmp_path / "whole", **SAVING), lora(tmp_path / "resumed")
    whole.train()
    resumed.train(str(tmp_path / "whole" / "checkpoint-1"))
    trained = [n for n, p in whole.model.named_parameters() if p.requires_grad]
    assert trained
    for name in trained:
        assert torch.equal(whole.model.get_parameter(name), resumed.model.get_parameter(name)), name
