"""Metrics and their reduction, metrics.jsonl, the table, parquet files, curves."""

from __future__ import annotations

import json
import math

import pyarrow.parquet
import pytest
import torch
from tiny_trainer import dataset, trainer

from grpo_fast.trainer.completions import CompletionLog, plain, print_table, shortened
from grpo_fast.trainer.metrics import Metrics, add_rollouts, loss_metrics

NAN = math.nan
TRL_NAMES = {
    "num_tokens",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "rewards/count_w3/mean",
    "rewards/count_w3/std",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "step_time",
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
}


class Ranks:
    """Stands for an accelerator of several processes; `others`: metrics of the other ranks."""

    def __init__(self, others=()):
        self.others = others
        self.num_processes = 1 + len(others)
        self.is_main_process = True

    def gather(self, tensor):
        return torch.cat([tensor, *(m.device[None] for m in self.others)])


@pytest.fixture(autouse=True)
def gathered_objects(monkeypatch):
    """gather_object without processes: what the other ranks hold is appended by the test."""
    import accelerate.utils

    held = []
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda objects: [*objects, *held])
    return held


def tokens(count, **means):
    zero = torch.tensor(0.0)
    names = ("kl", "entropy", "clip_low", "clip_high", "clip_ratio", "ratio_mean")
    extra = {"ratio_min": zero + 1, "ratio_max": zero + 1, "tokens": torch.tensor(count)}
    counts = dict.fromkeys(("active_rows", "nonfinite_tokens", "clamped_ratios"), zero)
    return {
        **dict.fromkeys(names, zero),
        **extra,
        **counts,
        **{k: zero + v for k, v in means.items()},
    }


def test_means_are_over_tokens_and_extrema_over_micro_batches_and_ranks(gathered_objects):
    here, there = Metrics(torch.device("cpu")), Metrics(torch.device("cpu"))
    here.add_tokens(tokens(10, entropy=1.0, clip_low=0.5, clip_high=0.1, active_rows=4))
    here.add_tokens(tokens(30, entropy=2.0, clip_low=0.2, clip_high=0.0, ratio_min=0.3))
    here.add_tokens(tokens(0, entropy=NAN, clip_high=1.0, ratio_max=9.0))
    there.add_tokens(tokens(60, entropy=4.0, clip_low=0.4, clip_high=0.7, nonfinite_tokens=2))
    here.add("reward", 1.0)
    here.add("reward", NAN)
    here.add("completions/min_length", 4, "min")
    here.add("scored_by_one", 2.0)
    there.add("reward", 4.0)
    there.add("completions/min_length", 3, "min")
    gathered_objects.append(there.host)
    values = here.reduce(Ranks([there]))
    out = loss_metrics(values, "dapo", kl=False, ratios=True)
    assert out["entropy"] == pytest.approx((10 + 60 + 240) / 100)
    assert out["clip_ratio/low_mean"] == pytest.approx((5 + 6 + 24) / 100)
    assert out["clip_ratio/low_min"] == pytest.approx(0.2)
    assert out["clip_ratio/high_max"] == pytest.approx(0.7)
    assert out["active_rows"] == pytest.approx(0.04) and out["nonfinite_tokens"] == 2
    assert out["ratio/min"] == pytest.approx(0.3) and out["ratio/max"] == 1
    assert values["reward"] == 2.5 and values["completions/min_length"] == 3
    assert values["scored_by_one"] == 2.0 and "kl" not in out
    assert loss_metrics(values, "cispo", True, False).keys() >= {"cispo_clip_ratio", "kl"}


def test_metrics_survive_a_checkpoint_unchanged():
    first, second = Metrics(torch.device("cpu")), Metrics(torch.device("cpu"))
    first.add("reward", 1 / 3)
    first.add_tokens(tokens(7, entropy=0.1, kl=1e-9))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.reduce(Ranks()) == first.reduce(Ranks())
    second.reset()
    assert second.reduce(Ranks()) == {}


def test_rollout_metrics_leave_unscorable_rewards_out():
    metrics = Metrics(torch.device("cpu"))
    rewards = torch.tensor([[1.0, NAN], [3.0, NAN], [2.0, 5.0], [2.0, NAN]])
    total = torch.tensor([[1.0, 3.0], [7.0, 7.0]])
    lengths, cut = torch.tensor([4, 8, 6, 8]), torch.tensor([False, True, False, True])
    add_rollouts(metrics, ["a", "b"], rewards, total, lengths, cut)
    values = metrics.reduce(Ranks())
    assert values["rewards/a/mean"] == 2 and values["rewards/b/mean"] == 5
    assert values["rewards/a/std"] == pytest.approx(rewards[:, 0].std().item())
    assert math.isnan(values["rewards/b/std"])
    assert values["reward"] == 4.5 and values["reward_std"] == pytest.approx(math.sqrt(2) / 2)
    assert values["frac_reward_zero_std"] == 0.5 and values["completions/clipped_ratio"] == 0.5
    assert values["completions/mean_length"] == 6.5
    assert values["completions/mean_terminated_length"] == 5
    assert values["completions/max_terminated_length"] == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mred\x1b[0m b", "ared b"),
        ("\x1b]0;title\x07x\x1b]52;c;aGk=\x1b\\y", "xy"),
        ("\x9b2Jz\x1bPq#0\x1b\\k", "zk"),
        ("\x1b]unterminated", "unterminated"),
        ("over\rwritten\x08\x00\x7f", "overwritten"),
        ("line\n\ttab é 中", "line\n\ttab é 中"),
        ("\u202egnp.exe\u2066", "gnp.exe"),
        ("lone \ud800 half", "lone ? half"),
        ("\x1b\x1b[31m[31m", "[31m"),
    ],
)
def test_model_text_cannot_steer_the_terminal(text, expected, capsys):
    assert plain(text) == expected
    rows = [{"prompt": text, "completion": "[red]not markup[/red]", "r": 0.123456, "step": 1}]
    print_table(rows, 1)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\r" not in shown and "[red]not markup[/red]" in shown
    assert "0.123" in shown


def test_a_prompt_stands_once_above_its_group_and_long_text_is_shortened(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = "begin " + "x" * 500 + " end"
    rows = [
        {"step": 1, "prompt": f"question {i // 2}", "completion": long, "r": 0.5} for i in range(4)
    ]
    print_table(rows, 1)
    shown = capsys.readouterr().out
    assert shown.count("question 0") == shown.count("question 1") == 1
    assert "begin" in shown and "..." in shown and "end" in shown
    assert max(map(len, shown.splitlines())) <= 80 and shown.count("x") < 4 * 200
    assert shortened("short") == "short" and len(shortened(long, 50)) == 50


def test_the_table_is_cut_and_the_parquet_file_is_not(tmp_path, capsys):
    log = CompletionLog()
    log.rows = [{"step": 3, "prompt": "p", "completion": f"c{i}\ud800", "f": NAN} for i in range(5)]
    log.rows[2]["note"] = "extra"
    log.flush(Ranks(), tmp_path, 3, limit=2)
    assert "2 of 5" in capsys.readouterr().out and log.rows == []
    table = pyarrow.parquet.read_table(tmp_path / "completions_00003.parquet").to_pydict()
    assert table["completion"] == [f"c{i}?" for i in range(5)]
    assert table["note"] == [None, None, "extra", None, None]
    assert [p.name for p in tmp_path.iterdir()] == ["completions_00003.parquet"]


def test_a_run_reports_everything_under_trl_names(tmp_path, capsys):
    def count_w3(completions, log_extra, log_metric, **_):
        log_extra("length", [len(c.split()) for c in completions])
        log_metric("answers", len(completions))
        return [c.split().count("w3") / 8 for c in completions]

    run = trainer(
        tmp_path,
        reward=count_w3,
        curves=True,
        beta=0.1,
        max_steps=5,
        logging_steps=2,
        log_completions=True,
        eval_dataset=dataset(2),
        eval_strategy="steps",
        eval_steps=5,
    )
    run.train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert set(rows[0]) >= TRL_NAMES and rows[0]["answers"] == 4
    assert [row["step"] for row in rows] == [2, 4, 5, 5] and "eval_reward" in rows[2]
    # the last step falls between two logs: the closing line has its metrics
    assert "train_runtime" in rows[3] and "reward" in rows[3]
    files = sorted(p.name for p in (tmp_path / "completions").iterdir())
    names = [f"completions_0000{step}.parquet" for step in (2, 4, 5)]
    assert files == [*names, "eval_00005.parquet"]
    held = pyarrow.parquet.read_table(tmp_path / "completions" / files[-1]).to_pydict()
    assert len(held["completion"]) == 8 and set(held["step"]) == {5}
    assert rows[2]["eval_reward"] == pytest.approx(sum(held["count_w3"]) / 8)
    table = pyarrow.parquet.read_table(tmp_path / "completions" / files[0]).to_pydict()
    assert table["step"] == [1] * 4 + [2] * 4
    assert set(table) == {"step", "prompt", "completion", "count_w3", "advantage", "length"}
    assert table["length"] == [len(c.split()) for c in table["completion"]]
    assert rows[0]["reward"] == pytest.approx(sum(table["count_w3"]) / 8)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "Completions, step 2" in capsys.readouterr().out


def test_metrics_of_two_windows_are_what_their_micro_batches_were(tmp_path):
    """Token means of a log equal sums over the recorded micro-batches, not means of means."""
    seen = []

    from grpo_fast import GRPOTrainer

    class Watching(GRPOTrainer):
        def loss(self, model, micro):
            loss, metrics = super().loss(model, micro)
            seen.append({k: float(v) for k, v in metrics.items()})
            return loss, metrics

    run = trainer(tmp_path, cls=Watching, max_steps=3, logging_steps=3, max_completion_length=20)
    run.train()
    assert len({m["tokens"] for m in seen}) > 1
    total = sum(m["tokens"] for m in seen)
    entropy = sum(m["entropy"] * m["tokens"] for m in seen) / total
    assert run.state.log_history[0]["entropy"] == pytest.approx(entropy, rel=1e-6)
    assert run.state.log_history[0]["loss"] == pytest.approx(
        sum(m["loss"] for m in seen) / 3, abs=1e-6
    )


def test_a_fresh_run_keeps_the_metrics_of_the_one_before(tmp_path):
    trainer(tmp_path, max_steps=1).train()
    first = (tmp_path / "metrics.jsonl").read_text()
    trainer(tmp_path, max_steps=2).train()
    assert (tmp_path / "previous-1" / "metrics.jsonl").read_text() == first
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_resumed_run_continues_its_lines(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **settings).train()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "rew')
    trainer(tmp_path, **settings).train(str(tmp_path / "checkpoint-2"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]


def test_progress_shows_one_short_line(tmp_path, capfd):
    trainer(tmp_path, max_steps=2, logging_steps=1, disable_tqdm=False).train()
    out, err = capfd.readouterr()
    lines = [line for line in (out + err).splitlines() if line.startswith("step 2: ")]
    assert len(lines) == 1 and "reward " in lines[0] and "clip_ratio" not in out + err
