"""100 bad inputs: one clear sentence each, before any work where it can be known before."""

import bad_runs
import pytest
from tiny_trainer import config, count_w3, dataset, model, tokenizer, trainer

from grpo_fast import GRPOTrainer
from grpo_fast.cli.options import TrainParser
from grpo_fast.rewards import RewardSet


def one_sentence(error, named):
    text = str(error)
    assert named in text
    assert "\n" not in text
    assert 20 < len(text) < 400
    # what it may be, or what is wrong about it
    assert any(word in text for word in ("expected", "must", "returned", "no such", "reserved"))


def test_there_are_a_hundred():
    lists = (bad_runs.OPTIONS, bad_runs.DATA, bad_runs.RETURNS, bad_runs.REWARDS, bad_runs.YAML)
    assert sum(map(len, lists)) + len(MODELS) >= 100


@pytest.mark.parametrize(("name", "value"), bad_runs.OPTIONS, ids=str)
def test_options(tmp_path, name, value):
    with pytest.raises(ValueError) as caught:
        config(tmp_path / "run", **{name: value})
    one_sentence(caught.value, name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", bad_runs.DATA)
def test_data(tmp_path, name):
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path / "run", train_dataset=bad_runs.DATA[name], max_completion_length=8)
    one_sentence(caught.value, "completions" if name.startswith("a name") else "train_dataset")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", bad_runs.RETURNS)
def test_what_a_reward_returns(name):
    def judge(completions, **_):
        return bad_runs.RETURNS[name]

    with pytest.raises(ValueError) as caught:
        RewardSet(judge).score(["w1"] * 4, ["w2"] * 4, [[3]] * 4, {})
    one_sentence(caught.value, "judge")


@pytest.mark.parametrize("name", bad_runs.REWARDS)
def test_what_is_no_reward(name):
    with pytest.raises(ValueError) as caught:
        RewardSet(bad_runs.REWARDS[name])
    one_sentence(caught.value, "rule:maths" if name == "unknown rule" else "reward_funcs")


MODELS = {
    "no such folder": "./nothing-here",
    "a number": 3,
    "nothing": None,
    "a class": type(model()),
    "nothing trained": model().requires_grad_(False),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path, name):
    given = None if name.startswith("no such") else tokenizer()
    args = config(tmp_path / "run")
    with pytest.raises(ValueError) as caught:
        GRPOTrainer(MODELS[name], count_w3, args, dataset(), None, given)
    one_sentence(caught.value, "model")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", bad_runs.YAML)
def test_yaml(tmp_path, name):
    path = tmp_path / "run.yaml"
    path.write_text(bad_runs.YAML[name], encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        TrainParser().from_yaml(str(path))
    text = str(caught.value)
    assert str(path) in text
    # PyYAML shows the place in lines of its own
    assert "\n" not in text or name == "not closed"
