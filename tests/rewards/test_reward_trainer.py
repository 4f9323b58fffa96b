"""Rewards inside a run of GRPOTrainer: nothing they do reaches what is sampled or trained on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_trainer import checkpoint, count_w3, dataset, spread_reward, trainer

from grpo_fast import GRPOConfig
from grpo_fast.advantages import decoupled_advantages


def test_what_is_trained_on_is_what_was_sampled(tmp_path):
    sampled = []

    def edits(completions, completion_ids, **_):
        sampled.extend(list(ids) for ids in completion_ids)
        for ids in completion_ids:
            ids[:] = [7] * len(ids)
        return [float(i) for i in range(len(completions))]

    run = trainer(tmp_path, reward=edits, max_steps=1)
    run.train()
    trained = run.window.micro_batches[0].packed.ids.tolist()
    assert trained == [token for ids in sampled for token in ids]


def test_a_reward_that_seeds_does_not_repeat_the_samples(tmp_path):
    seen = []

    def seeds(completions, **_):
        seen.append(tuple(completions))
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        return [float(i) for i in range(len(completions))]

    run = trainer(
        tmp_path, reward=seeds, max_steps=3, learning_rate=1e-12, train_dataset=dataset(1)
    )
    run.train()
    assert len(set(seen)) == 3 and torch.is_grad_enabled()


def test_a_run_is_the_same_with_and_without_rewards_that_draw(tmp_path):
    """Bit for bit: a second reward of weight 0 that draws from every generator changes nothing."""

    def draws(completions, **_):
        return torch.rand(len(completions)).tolist()

    weights = []
    for index, rewards in enumerate([[spread_reward], [spread_reward, draws]]):
        options = {"reward_weights": [1.0, 0.0][: len(rewards)]}
        run = trainer(tmp_path / str(index), reward=rewards, max_steps=2, **options)
        run.train()
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert torch.equal(*weights)


def test_metrics_and_extras_of_a_run(tmp_path, caplog):
    def logs(completions, log_extra, log_metric, **_):
        log_metric("reward", 1000.0)
        log_metric("share", 0.5)
        log_extra("parsed", [1, "a", None, 2.5])
        log_extra("completion", ["taken"] * 4)
        return [float(i) for i in range(len(completions))]

    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, reward=logs, max_steps=1, log_completions=True)
        run.train()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["reward"] == 1.5 and row["logs/reward"] == 1000.0 and row["share"] == 0.5
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(next((tmp_path / "completions").glob("*.parquet")))
    assert table["parsed"].to_pylist() == ["1", "a", None, "2.5"]
    assert "taken" not in table["completion"].to_pylist()
    assert table["logs/completion"].to_pylist() == ["taken"] * 4


def test_routed_rows(tmp_path):
    seen = {"first": set(), "second": set()}

    def first(prompts, **_):
        seen["first"].update(prompts)
        return [float(i) for i in range(len(prompts))]

    def second(prompts, **_):
        seen["second"].update(prompts)
        return [float(i) for i in range(len(prompts))]

    rows = [
        {**row, "rewards": ["first"] if i % 2 else ["second"]} for i, row in enumerate(dataset(4))
    ]
    trainer(tmp_path, reward=[first, second], max_steps=4, train_dataset=rows).train()
    assert seen["first"] == {row["prompt"] for row in rows if row["rewards"] == ["first"]}
    assert seen["second"] == {row["prompt"] for row in rows if row["rewards"] == ["second"]}
    rows[2]["rewards"] = ["frist"]
    with pytest.raises(ValueError, match="row 2: no reward function is called 'frist'; did you"):
        trainer(tmp_path, reward=[first, second], train_dataset=rows)


def test_each_reward_is_normalised_within_its_group(tmp_path):
    run = trainer(
        tmp_path,
        reward=[count_w3, spread_reward],
        reward_weights=[1.0, 0.5],
        multi_objective_aggregation="normalize_then_sum",
    )
    rewards = torch.tensor([[1.0, 9.0], [0.0, 3.0], [0.0, 1.0], [1.0, 1.0]])
    advantages, total = run.advantages(rewards, 4)
    expected = decoupled_advantages(rewards, torch.tensor([1.0, 0.5]), 4)
    assert torch.equal(advantages, expected)
    assert total.tolist() == [[5.5, 1.5, 0.5, 1.5]]
    run.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_timeout": 0}, "reward_timeout: expected seconds > 0 or None, got 0"),
        (
            {"multi_objective_aggregation": "normalize_than_sum"},
            "did you mean 'normalize_then_sum'",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "loss_type": "rloo"},
            "multi_objective_aggregation: expected 'sum_then_normalize'",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "multi_objective_aggregation: expected|scale_rewards",
        ),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_an_exit_ends_the_command_line_with_a_sentence(tmp_path):
    checkpoint(tmp_path / "model")
    source = "import sys\ndef score(completions, **_):\n    sys.exit(0)\n"
    (tmp_path / "leaves.py").write_text(source)
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1 w2"}\n' * 4)
    (tmp_path / "run.yaml").write_text(
        "model: model\ndataset: data.jsonl\noutput_dir: out\nmax_steps: 1\nnum_generations: 4\n"
        "per_device_train_batch_size: 4\nmax_completion_length: 4\nreport_to: none\n"
        "use_cpu: true\nreward: ['rule:overlong?cache=2', 'leaves:score']\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "grpo_fast.cli", "train", "--config", "run.yaml"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "reward function 'score' called sys.exit(0) (leaves.py, line 3)" in done.stderr


def environment():
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])}
