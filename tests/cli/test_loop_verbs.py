"""grpo-fast reward-model and grpo-fast iterate."""

import json

import pytest
import tiny_trainer

from grpo_fast.cli.main import main
from grpo_fast.rewards.model import RewardModel

QUIET = ["--report-to", "none", "--disable-tqdm", "true", "--use-cpu", "true"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_trainer.checkpoint(tmp_path_factory.mktemp("policy"))


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_reward_model_from_a_file(source, tmp_path, capsys):
    rows = [{"prompt": f"w{i}", "chosen": " w3 w3", "rejected": " w5"} for i in range(12)]
    argv = ["reward-model", "--model", source, "--dataset", lines(tmp_path / "p.jsonl", rows)]
    argv += ["--output-dir", str(tmp_path / "reward"), "--validation-split", "0.2", *QUIET]
    assert main([*argv, "--max-steps", "2", "--save-strategy", "no"]) == 0
    assert "reward model: " in capsys.readouterr().out
    assert len(RewardModel(str(tmp_path / "reward"))(["w1"], [" w3"])) == 1


def test_iterate_with_people(source, tmp_path, capsys):
    prompts = [{"prompt": row["prompt"]} for row in tiny_trainer.dataset(12)]
    data = lines(tmp_path / "prompts.jsonl", prompts)
    argv = ["iterate", "--model", source, "--dataset", data, "--judge", "file", *QUIET]
    argv += ["--output-dir", str(tmp_path / "run"), "--iterations", "1", "--max-steps", "1"]
    argv += ["--per-device-train-batch-size", "8", "--num-generations", "4"]
    argv += ["--max-completion-length", "4", "--collect-prompts", "6", "--save-strategy", "no"]
    argv += ["--reward-args", '{"max_steps": 1, "save_strategy": "no", "disable_tqdm": true}']
    assert main(argv) == 3
    assert "wait for labels" in capsys.readouterr().out
    questions = (tmp_path / "run" / "001-to_label.jsonl").read_text().splitlines()
    labels = [{"id": json.loads(q)["id"], "score": i % 3} for i, q in enumerate(questions)]
    lines(tmp_path / "run" / "001-labels.jsonl", labels)
    assert main(argv) == 0
    assert (tmp_path / "run" / "report" / "index.md").is_file()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["reward-model"], "model: expected a value, or --demo, got none"),
        (["reward-model", "--demo", "--model", "x"], "model: expected no value with --demo"),
        (["reward-model", "--model", "x", "--dataset", "no.jsonl"], "dataset: expected a file"),
        (["iterate", "--model", "x", "--dataset", "y.jsonl"], "judge: expected a value"),
        (["iterate", "--historyshare", "1"], "did you mean --history-share"),
        (["iterate", "--demo", "--history-share", "1"], "history_share: expected a number in"),
    ],
)
def test_bad_options_are_one_sentence(argv, sentence, capsys):
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err


def test_demo_sets_are_of_different_words():
    pytest.importorskip("vaderSentiment")
    from grpo_fast.cli.reward_demo import rated_sets

    train, held_out = rated_sets(0)
    words = [{w for row in rows for w in row["completions"]} for rows in (train, held_out)]
    assert not words[0] & words[1] and len(held_out) == 120
    assert rated_sets(0) == (train, held_out) != rated_sets(1)
