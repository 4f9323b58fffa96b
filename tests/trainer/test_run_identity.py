"""Two runs that differ in their answers or rewards, and inputs that only a run could meet."""

import logging

import pytest
from tiny_trainer import dataset, model, trainer

from grpo_fast.trainer.identity import code_digest, columns_digest


def near(completions, target, **_):
    return [float(t in c) for c, t in zip(completions, target, strict=True)]


def saved(tmp_path, **more):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    return trainer(tmp_path, **{"reward": near, **options, **more})


def test_another_answer_column_is_another_run(tmp_path):
    saved(tmp_path).train()
    other = [{**row, "target": "w9"} for row in dataset()]
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="train_dataset columns"):
        saved(tmp_path, train_dataset=other).train(resume_from_checkpoint=checkpoint)
    saved(tmp_path).train(resume_from_checkpoint=checkpoint)


def test_another_reward_body_is_followed_and_said(tmp_path, caplog):
    saved(tmp_path).train()
    near_again = eval("lambda completions, target, **_: [2.0 * len(c) for c in completions]")
    near_again.__name__ = "near"
    with caplog.at_level(logging.WARNING, "grpo_fast"):
        run = saved(tmp_path, reward=near_again)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "code of the rewards was" in caplog.text


def test_digests():
    assert columns_digest(dataset()) == columns_digest([dict(row) for row in dataset()])
    assert columns_digest(dataset()) != columns_digest(dataset()[::-1])
    prompts = [{**row, "prompt": "w1"} for row in dataset()]
    assert columns_digest(prompts) == columns_digest(dataset())
    odd = [{"prompt": "w1", "b": b"x", "o": object(), "s": "\ud800"}]
    assert columns_digest(odd) == columns_digest([{**odd[0], "o": object()}])
    assert columns_digest(odd) != columns_digest([{**odd[0], "b": b"y"}])
    one, two = (eval(f"lambda x: x in {{{v}}}") for v in ("'a', 'b'", "'a', 'c'"))
    assert code_digest([one]) == code_digest([eval("lambda x: x in {'b', 'a'}")])
    assert code_digest([one]) != code_digest([two])


@pytest.mark.parametrize("prompt", ["w1 \ud83d", [{"role": "user", "content": "\udc00"}]])
def test_half_a_surrogate_pair_is_named_with_its_row(tmp_path, prompt):
    good = "w1" if isinstance(prompt, str) else [{"role": "user", "content": "w1"}]
    rows = [{"prompt": good}, {"prompt": prompt}]
    with pytest.raises(ValueError, match="^train_dataset: .* half of a surrogate pair .* in row 1"):
        trainer(tmp_path, train_dataset=rows)


def test_nothing_to_train(tmp_path):
    with pytest.raises(ValueError, match="^model: expected at least one parameter that is trained"):
        trainer(tmp_path, model().requires_grad_(False))


@pytest.mark.parametrize("name", ["no/such-model", "./nothing-here"])
def test_an_unknown_model_is_one_sentence(tmp_path, name):
    with pytest.raises(ValueError, match=f"^model: expected a folder .* got '{name}'; ") as caught:
        trainer(tmp_path, name, processing_class=None)
    assert "\n" not in str(caught.value)
