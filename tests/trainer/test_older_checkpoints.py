"""A checkpoint in the format of 25e483c (window, reference and counters by name) goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_trainer import dataset, model, trainer

from grpo_fast.trainer import checkpoint

SETTINGS = {
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "beta": 0.04,
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
    "mask_truncated_completions": True,
    "log_completions": True,
    "num_completions_to_print": 1,
    "logging_steps": 2,
    "max_steps": 6,
}


def build(folder, **overrides):
    settings = {"policy": model(attention_dropout=0.2), "train_dataset": dataset(4), **SETTINGS}
    return trainer(folder, **{**settings, **overrides})


def as_25e483c(folder, rank=0):
    """Write a rank's files again as that commit did, and its marker."""
    parts = checkpoint._read_rank(folder, rank)
    window = parts["window"]["micro_batches"]
    tensors = {
        f"{index}.{name}": value
        for index, micro in enumerate(window)
        for name, value in micro.items()
        if value is not None and name not in ("rollout_logp", "values", "returns")
    }
    known = ("mask", "old_logp", "ref_logp")
    absent = [[name for name in known if micro[name] is None] for micro in window]
    state = {
        "micro_step": parts["window"]["served"],
        "tokens_seen": parts["counters"]["tokens_seen"],
        "metrics": parts["metrics"],
        "completions": parts["completions"],
        "loss_since_log": parts["counters"]["loss_since_log"],
        "last_logged": parts["counters"]["last_logged"],
    }
    save_file(tensors, folder / checkpoint.rank_file(rank, "safetensors"))
    file = folder / checkpoint.rank_file(rank, "json")
    checkpoint.write_json(file, {"absent": absent, "state": state})
    marker = json.loads((folder / checkpoint.MARKER).read_text())
    sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
    checkpoint.write_json(
        folder / checkpoint.MARKER,
        {"format": 1, "files": sizes, "fingerprint": marker["fingerprint"]},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = build(tmp_path_factory.mktemp("whole"), save_strategy="steps", save_steps=1)
    run.train()
    return run


@pytest.mark.parametrize("step", [1, 3, 4])
def test_the_format_of_25e483c_resumes_bit_identically(finished, step, tmp_path):
    folder = tmp_path / f"checkpoint-{step}"
    shutil.copytree(Path(finished.args.output_dir) / f"checkpoint-{step}", folder)
    as_25e483c(folder)
    held = load_file(folder / checkpoint.rank_file(0, "safetensors"))
    # a window serves four steps
    assert ("0.input_ids" in held and "3.old_logp" in held) == (step != 4)
    run = build(tmp_path / "out", policy=model(seed=9, attention_dropout=0.2))
    torch.manual_seed(77)
    run.train(str(folder))
    for a, b in zip(run.model.parameters(), finished.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, expected in finished.reference.state_dict().items():
        assert torch.equal(run.reference.state_dict()[name], expected), name
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    for one, other in zip(run.state.log_history, finished.state.log_history, strict=True):
        kept = one.keys() - {*timed, "train_loss"}
        assert {k: one[k] for k in kept} == {k: other[k] for k in kept}


def test_a_format_of_the_future_is_refused(finished, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(Path(finished.args.output_dir) / "checkpoint-1", folder)
    marker = json.loads((folder / checkpoint.MARKER).read_text())
    checkpoint.write_json(folder / checkpoint.MARKER, {**marker, "format": 3})
    with pytest.raises(ValueError, match="has format 3, expected 1 or 2"):
        build(tmp_path / "out").train(str(folder))
