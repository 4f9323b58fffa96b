"""What a run may not touch: its weights by watching it, another run by sharing its folder."""

from __future__ import annotations

import torch
from tiny_trainer import dataset, spread_reward, trainer

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
