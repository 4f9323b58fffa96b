"""What a run says at its beginning and its end, and its curves."""

import types

import pytest
from tiny_trainer import count_w3, dataset, trainer

from grpo_fast.trainer.banner import _duration
from grpo_fast.trainer.curves import CURVES, Curves, series, trend

SETTINGS = {"reward": count_w3, "train_dataset": dataset(8), "max_steps": 4}


def said(capsys):
    return capsys.readouterr().out


def test_a_run_opens_and_closes_in_80_columns(tmp_path, capsys):
    run = trainer(
        tmp_path,
        **SETTINGS,
        disable_tqdm=False,
        beta=0.1,
        eval_dataset=dataset(2),
        eval_strategy="steps",
        eval_steps=2,
        curves=True,
    )
    run.train()
    out = said(capsys)
    total = sum(p.numel() for p in run.model.parameters())
    assert f"LlamaForCausalLM, {total / 1e3:.3g}k parameters, 100 % trained; float32" in out
    flat = " ".join(out.split())
    assert "8 prompts; a step takes 1 prompts x 4 completions of at most 8 tokens; 4 steps" in flat
    assert "dapo, KL k3 x 0.1; route one_pass, at most 6.00 NHV" in " ".join(out.split())
    assert "done     4 steps in" in out and "held out reward" in out
    assert "metrics.jsonl, curves.png" in out
    names = ("model", "data", "loss", "folder", "versions", "done", "reward", "held out", "   ")
    lines = [line for line in out.splitlines() if line.startswith(names) and "|" not in line]
    assert max(map(len, lines)) <= 80
    logs = [row["reward"] for row in run.state.log_history if "reward" in row]
    assert f"reward   {logs[0]:.3f} -> {logs[-1]:.3f}" in out


def test_a_quiet_run_says_nothing(tmp_path, capsys):
    trainer(tmp_path, **SETTINGS).train()
    assert "parameters" not in said(capsys)


def test_a_resumed_run_says_where_it_goes_on(tmp_path, capsys):
    more = {**SETTINGS, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **more).train()
    run = trainer(tmp_path, **more, disable_tqdm=False)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "resume   after step 2 of 4" in said(capsys)


def state(*logs):
    rows = [{"step": i + 1, **log} for i, log in enumerate(logs)]
    return types.SimpleNamespace(log_history=rows, is_world_process_zero=True)


def test_panels_without_a_number_are_left_out(tmp_path):
    run = state({"reward": 0.5, "kl": float("nan")}, {"reward": 0.6}, {"eval_reward": 0.7})
    found = [title for row, title in CURVES if series(row, run)]
    assert found == [CURVES[0][1]]
    assert series("reward", run) == {"reward": [(1, 0.5), (2, 0.6)], "eval_reward": [(3, 0.7)]}
    # one reward alone is the panel of the reward
    one = state({"rewards/a/mean": 1.0})
    assert series("rewards/*/mean", one) == {}
    two = state({"rewards/a/mean": 1.0, "rewards/b/mean": 0.0})
    assert set(series("rewards/*/mean", two)) == {"rewards/a/mean", "rewards/b/mean"}
    curves = Curves(str(tmp_path))
    curves._draw(state())
    assert not (tmp_path / "curves.png").exists()
    logs = [
        {"reward": i / 9, "reward_std": 0.1, "rewards/a/mean": 0, "rewards/b/mean": 1}
        for i in range(9)
    ]
    curves._draw(state(*logs))
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_trend_is_a_mean_of_what_came_before():
    assert trend([0.0, 3.0, 3.0, 3.0]) == [0.0, 1.5, 2.0, 3.0]


def test_durations():
    assert [_duration(s) for s in (2.34, 61, 7260)] == ["2.34 s", "1 min 1 s", "2 h 1 min"]


def test_a_logger_that_is_not_installed_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.is_wandb_available", lambda: False)
    with pytest.raises(
        ValueError, match="report_to: expected loggers that are installed, got 'wandb'"
    ):
        trainer(tmp_path, **SETTINGS, report_to=["wandb"])
