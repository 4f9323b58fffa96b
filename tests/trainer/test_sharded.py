"""FSDP2 on two processes against one: weights, sampling, checkpoints. The worker asserts in every
step that the parameters are DTensors whose shards are smaller than they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sharded_worker import policy_of, train, write_models
from torchrun import COMPARED, final, furthest, launch, rows, trained
from transformers import AutoModelForCausalLM

from grpo_fast.trainer import checkpoint

pytestmark = pytest.mark.slow
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1}
# canned rollouts: what one process trains
CANNED = {
    "full": {},
    "tied": {"tied": True},
    "lora": {"lora": True},
    "checkpointed": {"fsdp": {"activation_checkpointing": True}, **MOVING},
    "moving": MOVING,
    "named": {"named": True},
    "kept": {"fsdp": {"reshard_after_forward": False}},
    "empty": {"kind": "empty"},
    "head_empty": {"kind": "empty", "head_sharding": "vocabulary"},
    "head": {"head_sharding": "vocabulary", **MOVING},
    "head_frozen": {"head_sharding": "vocabulary", "lora": True, "loss_type": "gspo"},
}
SAMPLED = {"sampled": True, "optim": "adamw_torch", "learning_rate": 1e-2, "save_steps": 1}
SAMPLED |= {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2, "size": 2}
BY_LAYER = {"ds3_gather_for_generation": False}
SHARDS = {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT", "activation_checkpointing": True}}
# sampled rollouts: what two ways of sampling, or a resumed run, train
RUNS = {
    "whole": SAMPLED,
    "layers": {**SAMPLED, **BY_LAYER},
    "lora_whole": {**SAMPLED, "lora": True},
    "lora_layers": {**SAMPLED, "lora": True, **BY_LAYER},
    "head_whole": {**SAMPLED, "head_sharding": "vocabulary"},
    "head_layers": {**SAMPLED, "head_sharding": "vocabulary", **BY_LAYER},
    "shards": {**SAMPLED, **SHARDS, **MOVING},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes trained."""
    place = tmp_path_factory.mktemp("sharded")
    write_models(place)
    canned = [{"folder": str(place / n), "size": 3, **keys} for n, keys in CANNED.items()]
    sampled = [{"folder": str(place / n), **keys} for n, keys in RUNS.items()]
    trained("fsdp", *canned, *sampled)
    return place


@pytest.mark.parametrize("name", CANNED)
def test_two_processes_train_what_one_does(folder, name):
    """A group of four lies on both ranks, which hold unequal numbers of tokens."""
    alone = {k: v for k, v in CANNED[name].items() if k not in ("fsdp", "head_sharding")}
    one = folder / f"one_{name}"
    run = train(one, 6, **alone)
    start = {n: p.detach() for n, p in policy_of(one, **_kind(alone)).named_parameters()}
    moved = {n: (p.detach() - start[n]).abs().max() for n, p in run.model.named_parameters()}
    assert max(moved.values()) > 1e-2
    assert furthest(final(folder / name), final(one)) < 5e-7
    mine, theirs = (rows(folder / n) for n in (one.name, name))
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in COMPARED & a.keys():
            assert b[key] == pytest.approx(a[key], rel=2e-5, abs=1e-6), key


def _kind(options: dict) -> dict:
    return {"tied": options.get("tied", False), "lora": options.get("lora", False)}


@pytest.mark.parametrize("kind", ("", "lora_", "head_"))
def test_sampling_with_all_weights_and_layer_by_layer_is_the_same(folder, kind):
    """Bit for bit. The ranks sample unequal lengths, and evaluate unequal numbers of prompts."""
    names = ("whole", "layers")
    one, other = (final(folder / f"{kind}{name}") for name in names)
    assert all(torch.equal(one[name], value) for name, value in other.items())
    first, second = (rows(folder / f"{kind}{name}") for name in names)
    lengths = [row["completions/mean_length"] for row in first if "reward" in row]
    assert lengths == [row["completions/mean_length"] for row in second if "reward" in row]
    assert len(set(lengths)) > 1


def test_a_split_head_samples_and_trains_what_a_gathered_one_does(folder):
    assert furthest(final(folder / "whole"), final(folder / "head_whole")) < 1e-5


@pytest.mark.parametrize("name", ("full", "tied", "whole", "shards", "head"))
def test_saved_weights_load_in_plain_transformers(folder, name):
    place = folder / name / "final"
    config = json.loads((place / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    saved = final(folder / name)
    assert ("lm_head.weight" in saved) == (name != "tied")
    for key, value in saved.items():
        assert torch.equal(model.state_dict()[key], value)


def test_a_checkpoint_of_shards_has_no_other_weights(folder):
    place = folder / "shards" / "checkpoint-4"
    assert (place / "pytorch_model_fsdp_0").is_dir() and not list(place.glob("model*.safetensors"))
    assert checkpoint.problem(place, hashed=True) is None


def test_resumed_at_every_step_and_killed(folder):
    """Bit for bit, with full and with sharded state dicts, AdamW and a moving reference; by
    processes that trained nothing before, one pair of which resumes what was killed."""
    runs = ("whole", "shards", "head_whole")
    resumed = [
        {
            "folder": str(folder / f"{name}_{step}"),
            **RUNS[name],
            "resume": str(folder / name / f"checkpoint-{step}"),
        }
        for name in runs
        for step in (1, 2, 3)
    ]
    killed = {"folder": str(folder / "killed"), **RUNS["shards"]}
    done = launch("sharded_worker.py", "fsdp", json.dumps([{**killed, "die": 3}]))
    assert [code for code, _ in done] == [9, 9]
    finished = {
        "folder": str(folder / "finished"),
        **RUNS["shards"],
        "resume": str(folder / "shards" / "checkpoint-4"),
        "kind": "finished",
    }
    trained("fsdp", *resumed, {**killed, "resume": True}, finished)
    for name in runs:
        want = final(folder / name)
        for step in (1, 2, 3):
            got = final(folder / f"{name}_{step}")
            assert all(torch.equal(got[key], value) for key, value in want.items()), (name, step)
    for name in ("killed", "finished"):
        got = final(folder / name)
        assert all(torch.equal(got[key], value) for key, value in final(folder / "shards").items())


def test_ddp_that_poses_as_fsdp_is_refused(folder):
    """What Accelerate makes of FSDP on the CPU, if nobody tells it otherwise."""
    run = {"folder": str(folder / "posing"), "size": 3}
    done = launch("sharded_worker.py", "posing", json.dumps([run]), timeout=200)
    assert [code for code, _ in done] == [1, 1]
    for _, said in done:
        assert (
            "fsdp: expected a device and processes that Accelerate shards for, got MULTI_" in said
        )


def test_a_reward_that_raises_on_one_rank_ends_all_of_them(folder):
    """Within seconds, with the cause on the rank that has it, and the checkpoints before it."""
    place = folder / "failed"
    run = {"folder": str(place), **RUNS["whole"], "kind": "failing", "eval_strategy": "no"}
    (first, said), (second, cause) = launch(
        "sharded_worker.py", "fsdp", json.dumps([run]), timeout=200
    )
    assert (first, second) == (1, 1)
    assert "a reward failed on rank 1, whose output has the error" in said
    assert "this reward cannot count" in cause
    newest, skipped = checkpoint.newest(str(place))
    assert newest.name == "checkpoint-2" and skipped == []


def test_shards_in_a_node_and_replicas_over_nodes(folder):
    """HSDP: four processes, of which two and two hold the parameters."""
    run = {"folder": str(folder / "hsdp"), "size": 3, "replicas": 2, **MOVING}
    trained("fsdp", run, world=4)
    train(folder / "one_hsdp", 12, **MOVING)
    assert furthest(final(folder / "hsdp"), final(folder / "one_hsdp")) < 5e-7
