"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes against one; `make test-deepspeed` runs this
file. Under ZeRO-3 the worker asserts in every step that each parameter is partitioned: it has a
`ds_id` and holds nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from sharded_worker import train, write_models
from torchrun import COMPARED, final, furthest, launch, rows, trained
from transformers import AutoModelForCausalLM

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed (make test-deepspeed)", allow_module_level=True)

pytestmark = pytest.mark.slow
ON_CPU = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "timeout": 500}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1}
CANNED = {
    "two": {"stage": 2},
    "three": {"stage": 3},
    "moving": {"stage": 3, **MOVING},
    "named": {"stage": 3, "named": True},
    "tied": {"stage": 3, "tied": True},
    "lora": {"stage": 3, "lora": True},
}
SAMPLED = {"stage": 3, "sampled": True, "optim": "adamw_torch", "learning_rate": 1e-2, "size": 2}
SAMPLED |= {"save_steps": 1, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2}
SAMPLED |= MOVING
RUNS = {"whole": SAMPLED, "layers": {**SAMPLED, "ds3_gather_for_generation": False}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes trained."""
    place = tmp_path_factory.mktemp("zero")
    write_models(place)
    canned = [{"folder": str(place / n), "size": 3, **keys} for n, keys in CANNED.items()]
    sampled = [{"folder": str(place / n), **keys} for n, keys in RUNS.items()]
    trained("deepspeed", *canned, *sampled, **ON_CPU)
    return place


@pytest.mark.parametrize("name", CANNED)
def test_two_processes_train_what_one_does(folder, name):
    alone = {k: v for k, v in CANNED[name].items() if k != "stage"}
    train(folder / f"one_{name}", 6, **alone)
    assert furthest(final(folder / name), final(folder / f"one_{name}")) < 5e-7
    pairs = zip(rows(folder / f"one_{name}"), rows(folder / name), strict=True)
    for a, b in pairs:
        for key in COMPARED & a.keys():
            assert b[key] == pytest.approx(a[key], rel=2e-5, abs=1e-6), key


def test_sampling_with_all_weights_and_layer_by_layer_is_the_same(folder):
    """Bit for bit. The ranks sample unequal lengths, and evaluate unequal numbers of prompts."""
    one, other = final(folder / "whole"), final(folder / "layers")
    assert all(torch.equal(one[name], value) for name, value in other.items())
    lengths = [r["completions/mean_length"] for r in rows(folder / "whole") if "reward" in r]
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("name", ("two", "three", "tied", "whole"))
def test_saved_weights_load_in_plain_transformers(folder, name):
    place = folder / name / "final"
    model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, value in final(folder / name).items():
        assert torch.equal(model.state_dict()[key], value)


def test_resumed_at_every_step_and_killed(folder):
    """Bit for bit, AdamW and a moving reference among it."""
    resumed = [
        {
            "folder": str(folder / f"whole_{step}"),
            **SAMPLED,
            "resume": str(folder / "whole" / f"checkpoint-{step}"),
        }
        for step in (1, 2, 3)
    ]
    killed = {"folder": str(folder / "killed"), **SAMPLED}
    done = launch("sharded_worker.py", "deepspeed", json.dumps([{**killed, "die": 3}]), **ON_CPU)
    assert [code for code, _ in done] == [9, 9]
    trained("deepspeed", *resumed, {**killed, "resume": True}, **ON_CPU)
    want = final(folder / "whole")
    for name in ("whole_1", "whole_2", "whole_3", "killed"):
        got = final(folder / name)
        assert all(torch.equal(got[key], value) for key, value in want.items()), name
