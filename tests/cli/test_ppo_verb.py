"""`grpo-fast ppo`: its options, its help, a run from files, and its demo on a toy model."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import tiny_trainer
import torch
from transformers import AutoModelForCausalLM

from grpo_fast import PPOConfig
from grpo_fast.cli import demo
from grpo_fast.cli.main import main
from grpo_fast.cli.options import ScriptArguments, TrainParser, parse

SMALL = ["--per-device-train-batch-size", "4", "--use-cpu", "--max-completion-length", "4"]
SMALL += ["--max-steps", "4", "--logging-steps", "1", "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_trainer.model().save_pretrained(folder)
    tiny_trainer.tokenizer().save_pretrained(folder)
    return str(folder)


def test_every_field_is_an_option_and_a_key(tmp_path):
    options = TrainParser("ppo")._option_string_actions
    own = [f for f in dataclasses.fields(PPOConfig) if f.init]
    assert len(own) > 150
    for field in own:
        assert f"--{field.name.replace('_', '-')}" in options
    path = tmp_path / "run.yaml"
    path.write_text("critic: separate\nvalue_learning_rate: 1e-5\ncliprange_value: null\n")
    argv = ["--config", str(path), "--no-reshuffle", "--no-whiten-advantages", "--lam", "1"]
    assert parse(argv, "ppo")[1] == {
        "critic": "separate",
        "value_learning_rate": 1e-5,
        "cliprange_value": None,
        "reshuffle": False,
        "whiten_advantages": False,
        "lam": 1.0,
    }
    with pytest.raises(ValueError, match="unknown key 'critics'"):
        path.write_text("critics: shared\n")
        parse(["--config", str(path)], "ppo")


def test_help(capsys):
    assert parse(["--help"], "ppo") is None
    shown = capsys.readouterr().out
    assert "usage: grpo-fast ppo" in shown and "grpo-fast ppo --demo" in shown
    for option in ("--critic VALUE", "--kl-coef VALUE", "--reshuffle", "--gamma", "--loss-type"):
        assert option in shown
    assert "--torch-compile-backend" not in shown and "--seed" in shown
    assert parse(["--help"]) is None
    assert "--critic" not in capsys.readouterr().out


def test_the_demo_has_its_own_model():
    assert ScriptArguments(demo=True).demo and ScriptArguments().demo
    with pytest.raises(ValueError, match="^model: expected no value in the demo"):
        ScriptArguments(demo=True, model="m", dataset="d", reward=["a:b"])


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_run_from_files(tiny_model, tmp_path, monkeypatch, capsys, critic):
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in tiny_trainer.dataset())
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "ppo_rewards.py").write_text(
        "def length(completions, **_):\n    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.delitem(sys.modules, "ppo_rewards", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    argv = ["ppo", "--model", tiny_model, "--dataset", "rows.jsonl", "--critic", critic]
    argv += ["--reward", "ppo_rewards:length", "--output-dir", "out", *SMALL]
    if critic == "separate":
        argv += ["--critic-model", tiny_model]
    assert main([*argv, "--save-strategy", "no"]) == 0, capsys.readouterr().err
    assert str(tmp_path / "out") in capsys.readouterr().out
    logs = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert {"reward", "value_loss", "explained_variance", "kl_coef"} <= logs[0].keys()
    assert (tmp_path / "out" / "critic" / "critic.safetensors").is_file()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(trained.model.norm.weight, torch.ones(32))


def test_errors_are_one_sentence(capsys):
    argv = ["ppo", "--model", "m", "--dataset", "d", "--reward", "a:b", "--scale-rewards", "none"]
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("grpo-fast: error: scale_rewards: expected")


@pytest.mark.parametrize("further", [[], ["--critic", "separate"]])
def test_demo(tiny_model, tmp_path, monkeypatch, capsys, further):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(demo, "weights", lambda: (tiny_model, None))
    argv = ["ppo", "--demo", *SMALL, "--output-dir", str(tmp_path), *further]
    assert main(argv) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("held-out questions right (greedy)") == 3
    assert "explained variance of the returns: " in out and "mean reward of the first" in out
    for name in ("metrics.jsonl", "curves.png", "completions"):
        assert (tmp_path / name).exists()
