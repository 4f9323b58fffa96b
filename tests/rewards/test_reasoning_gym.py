"""reasoning-gym: datasets without repeats, and the tasks' own scores."""

from __future__ import annotations

import json

import pytest
import torch

from grpo_fast.rewards import RewardSet, reasoning_gym_dataset, reasoning_gym_reward
from grpo_fast.rewards.reasoning import decode_entry, encode_entry


def test_reasoning_gym_dataset_is_deterministic_and_without_repeats():
    pytest.importorskip("reasoning_gym")
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    rows = reasoning_gym_dataset("chain_sum", 60, seed=3, **settings)
    assert rows.column_names == ["prompt", "entry"] and len(rows) == 60
    questions = [row["prompt"][0]["content"] for row in rows]
    assert len(set(questions)) == 60
    assert rows.to_list() == reasoning_gym_dataset("chain_sum", 60, seed=3, **settings).to_list()
    plain = reasoning_gym_dataset(
        "chain_sum", 2, seed=3, formatter=lambda e: e["question"], **settings
    )
    assert plain["prompt"][:2] == questions[:2]


def test_reasoning_gym_reward_agrees_with_the_task():
    gym = pytest.importorskip("reasoning_gym")
    for task in ("chain_sum", "spell_backward", "arc_agi", "word_sorting"):
        source = gym.create_dataset(task, size=6, seed=1)
        entries = [source[index] for index in range(6)]
        answers = [entry["answer"] for entry in entries]
        texts = [answers[0], f" {answers[1]}\n", f"It is {answers[2]}", answers[2], "", "no idea"]
        rewards = RewardSet(reasoning_gym_reward(task))
        columns = {"entry": [encode_entry(entry) for entry in entries]}
        scored = rewards.score(["?"] * 6, texts, [[1]] * 6, columns)[:, 0]
        pairs = zip(texts, entries, strict=True)
        expected = [source.score_answer(text.strip(), entry) for text, entry in pairs]
        assert rewards.names == [task] and expected[0] == expected[1] == 1.0
        torch.testing.assert_close(scored, torch.tensor(expected))
        direct = reasoning_gym_reward(task)(prompts=["?"] * 6, completions=texts, **columns)
        assert direct == expected
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        assert torch.equal(rewards.score(["?"] * 6, chats, [[1]] * 6, columns)[:, 0], scored)


def test_entry_codec_keeps_tuples_and_integer_keys():
    entry = {"question": "q", "answer": "a", "metadata": {"grid": ((1, 2), [3]), "by": {1: (2,)}}}
    assert decode_entry(encode_entry(entry)) == entry
    assert decode_entry(json.dumps({"question": "q"})) == {"question": "q"}
    with pytest.raises(ValueError, match="expected the JSON of a reasoning-gym entry"):
        decode_entry("[1]")


def test_reasoning_gym_answer_that_breaks_the_scorer_is_unscorable():
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("prime_factorization", size=1, seed=1)[0]
    metrics = {}
    scored = RewardSet(reasoning_gym_reward("prime_factorization")).score(
        ["?"] * 2,
        [entry["answer"], "a"],
        [[1]] * 2,
        {"entry": [encode_entry(entry)] * 2},
        log_metric=metrics.__setitem__,
    )
    assert scored[0, 0] == 1.0 and scored[1, 0].isnan()
    assert metrics == {"prime_factorization/unscorable": 0.5}


def test_reasoning_gym_refusals():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="task: .*got 'chain_sums'; did you mean 'chain_sum'"):
        reasoning_gym_reward("chain_sums")
    with pytest.raises(ValueError, match="'chain_sum' refuses"):
        reasoning_gym_dataset("chain_sum", 4, min_terms=5, max_terms=2)
    with pytest.raises(ValueError, match="'chain_sum' refuses.*no_such"):
        reasoning_gym_dataset("chain_sum", 4, no_such=1)
    with pytest.raises(
        ValueError, match="size: expected 500 different questions .* in 10000 draws"
    ):
        reasoning_gym_dataset(
            "chain_sum", 500, min_terms=2, max_terms=2, min_digits=1, max_digits=1
        )
    with pytest.raises(ValueError, match="size: expected an integer >= 1"):
        reasoning_gym_dataset("chain_sum", 0)
    with pytest.raises(ValueError, match="'chain_sum' needs 'entry'"):
        RewardSet(reasoning_gym_reward("chain_sum")).check_columns(["prompt", "answer"])
