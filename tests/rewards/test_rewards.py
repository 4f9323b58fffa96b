"""Rewards: the calling convention, what functions may return, reward models."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import sys
import threading

import numpy as np
import pytest
import torch

from grpo_fast.rewards import RewardSet, load_function, weighted

PROMPTS = ["1 + 1 =", "2 + 2 =", "3 + 3 ="]
COMPLETIONS = [" 2", " four", ""]
IDS = [[5, 1], [7, 8, 1], [1]]


def score(rewards: RewardSet, columns: dict | None = None, **kwargs) -> torch.Tensor:
    return rewards.score(PROMPTS, COMPLETIONS, IDS, columns or {}, **kwargs)


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def test_function_gets_keywords_columns_and_loggers():
    seen, state = {}, object()

    def reward(**kwargs):
        seen.update(kwargs)
        kwargs["log_extra"]("answer_seen", kwargs["answer"])
        kwargs["log_metric"]("share", 0.5)
        return [0.0, 1.0, 2.0]

    extras, metrics = {}, {}
    scored = score(
        RewardSet(reward),
        {"answer": ["2", "4", "6"], "level": [1, 2, 3]},
        trainer_state=state,
        log_extra=extras.__setitem__,
        log_metric=metrics.__setitem__,
    )
    assert scored.dtype == torch.float32 and scored.tolist() == [[0.0], [1.0], [2.0]]
    assert seen["prompts"] == PROMPTS and seen["completions"] == COMPLETIONS
    assert seen["completion_ids"] == IDS and seen["trainer_state"] is state
    assert seen["answer"] == ["2", "4", "6"] and seen["level"] == [1, 2, 3]
    assert extras == {"answer_seen": ["2", "4", "6"]} and metrics == {"share": 0.5}


def test_function_gets_only_what_its_signature_takes():
    def match(completions, answer, missing_column="-"):
        assert missing_column == "-"
        return [
            float(text.strip() == right) for text, right in zip(completions, answer, strict=True)
        ]

    columns = {"answer": ["2", "4", "6"], "level": [1, 2, 3]}
    assert score(RewardSet([match, length]), columns).tolist() == [[1, 2], [0, 5], [0, 0]]


def test_loggers_may_be_absent():
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("x", completions)
        log_metric("y", 1.0)
        return [1.0] * len(completions)

    assert score(RewardSet(reward)).tolist() == [[1], [1], [1]]


@pytest.mark.parametrize(
    "values",
    [
        [True, False, None],
        [1, 0, None],
        (np.float64(1.0), np.int64(0), None),
        [torch.tensor(1.0), torch.tensor(0, dtype=torch.int64), None],
    ],
    ids=["bool", "int", "numpy", "tensor"],
)
def test_accepted_numbers(values):
    scored = score(RewardSet(lambda **kwargs: values))[:, 0].tolist()
    assert scored[:2] == [1.0, 0.0] and math.isnan(scored[2])


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_accepted_arrays(make):
    assert score(RewardSet(lambda **kwargs: make([1.0, -0.0, 3.5]))).tolist() == [
        [1.0],
        [0.0],
        [3.5],
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], r"must return 3 rewards.*got 2"),
        ([1.0] * 4, r"must return 3 rewards.*got 4"),
        (None, r"list of 3 numbers or None, got NoneType"),
        (1.0, r"list of 3 numbers or None, got float"),
        ("abc", r"list of 3 numbers or None, got str"),
        (torch.tensor(1.0), r"list of 3 numbers or None, got Tensor"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, r"got dict"),
        (iter([1.0, 2.0, 3.0]), r"list of 3 numbers or None"),
        ([0.0, math.nan, 1.0], r"nan for completion 1: expected a finite"),
        ([0.0, 1.0, math.inf], r"inf for completion 2: expected a finite"),
        ([-math.inf, 1.0, 0.0], r"-inf for completion 0: expected a finite"),
        ([0.0, 1e39, 0.0], r"1e\+39 for completion 1: expected a finite"),
        ([0, 10**400, 0], r"for completion 1: expected a finite"),
        ([0.0, "1.0", 0.0], r"'1.0' for completion 1: expected a number"),
        ([0.0, 0.0, [1.0]], r"for completion 2: expected a number"),
        ([0.0, torch.ones(1), 0.0], r"for completion 1: expected a number"),
        (torch.ones(3, 1), r"for completion 0: expected a number"),
        (torch.tensor([0.0, math.nan, 0.0]), r"nan for completion 1"),
        ([0.0, 1j, 0.0], r"for completion 1: expected a number"),
    ],
)
def test_bad_returns_name_function_and_index(values, message):
    def fickle(**kwargs):
        return values

    with pytest.raises(ValueError, match=rf"'fickle'.*{message}"):
        score(RewardSet([length, fickle]))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_raising_function_is_named_and_chained(kind):
    def broken(**kwargs):
        raise KeyError("gone")

    async def broken_async(**kwargs):
        raise KeyError("gone")

    function = {"sync": broken, "async": broken_async}[kind]
    with pytest.raises(ValueError, match=rf"'{function.__name__}' raised KeyError") as caught:
        score(RewardSet([length, function]))
    assert isinstance(caught.value.__cause__, KeyError)


def test_lists_of_unequal_length_and_prompt_column():
    with pytest.raises(ValueError, match="level: expected 3 values.*got 2"):
        score(RewardSet(length), {"level": [1, 2]})
    with pytest.raises(ValueError, match="completions: expected 2 values"):
        RewardSet(length).score(PROMPTS[:2], COMPLETIONS, IDS, {})
    with pytest.raises(ValueError, match="got 'prompt' among them"):
        score(RewardSet(length), {"prompt": PROMPTS})


def test_check_columns():
    def match(completions, answer):
        return [0.0] * len(completions)

    rewards = RewardSet([length, match])
    rewards.check_columns(["prompt", "answer", "other"])
    with pytest.raises(ValueError, match="'match' needs 'answer'.*did you mean 'answers'"):
        rewards.check_columns(["prompt", "answers"])
    with pytest.raises(ValueError, match="'log_metric': this name is reserved"):
        rewards.check_columns(["answer", "log_metric"])
    with pytest.raises(ValueError, match="'match' needs 'answer'"):
        score(rewards, {})


def test_async_functions_wait_together():
    """Each waits for the other: a serial call would time out."""
    first, second = [], []

    async def wait_for(event_list, other, value, size):
        event_list.append(1)
        while not other:
            await asyncio.sleep(0.001)
        return [value] * size

    async def left(completions, **kwargs):
        return await asyncio.wait_for(wait_for(first, second, 1.0, len(completions)), 10)

    async def right(completions, **kwargs):
        return await asyncio.wait_for(wait_for(second, first, 2.0, len(completions)), 10)

    assert score(RewardSet([left, right])).tolist() == [[1, 2]] * 3


def test_async_runs_beside_sync_and_keeps_its_loop():
    started, loops = threading.Event(), []

    class Remote:
        async def __call__(self, completions, **kwargs):
            loops.append(asyncio.get_running_loop())
            started.set()
            return [1.0] * len(completions)

    def local(completions, **kwargs):
        assert started.wait(10)
        return [2.0] * len(completions)

    rewards = RewardSet([local, Remote()])
    assert rewards.names == ["local", "Remote"]

    async def inside_a_running_loop():
        return score(rewards)

    assert score(rewards).tolist() == [[2, 1]] * 3
    started.clear()
    assert asyncio.run(inside_a_running_loop()).tolist() == [[2, 1]] * 3
    assert loops[0] is loops[1]


def test_weights_and_unscorable(caplog):
    rewards = RewardSet(
        [lambda **kwargs: [1.0, None, None], lambda **kwargs: [2.0, 3.0, None]], weights=[0.5, 2]
    )
    with caplog.at_level(logging.WARNING, logger="grpo_fast.rewards.protocol"):
        scored = score(rewards)
        score(rewards)
    assert len(caplog.records) == 1 and "1 of 3 completions (first: 2)" in caplog.text
    total = weighted(scored, rewards.weights)
    assert total[:2].tolist() == [4.5, 6.0] and total[2].isnan()
    assert weighted(torch.zeros(0, 2), torch.ones(2)).shape == (0,)
    with pytest.raises(ValueError, match="weights: expected shape"):
        weighted(scored, torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_funcs": []}, "at least one reward"),
        ({"reward_funcs": None}, "at least one reward"),
        ({"reward_funcs": [length, 3]}, r"reward_funcs\[1\].*got int"),
        ({"reward_funcs": [length], "weights": [1.0, 2.0]}, "reward_weights: expected 1"),
        ({"reward_funcs": [length], "weights": [math.nan]}, r"reward_weights\[0\].*nan"),
        ({"reward_funcs": [length], "weights": ["1"]}, r"reward_weights\[0\].*'1'"),
        (
            {"reward_funcs": length, "reward_processing_classes": [1, 2]},
            "expected 1, one per reward",
        ),
        ({"reward_funcs": "/no/such/folder"}, "'/no/such/folder': no reward model"),
    ],
)
def test_bad_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardSet(**arguments)


def test_names_are_unique():
    functions = [length, functools.partial(length, scale=2), length]
    assert RewardSet(functions).names == ["length", "length_2", "length_3"]


def test_load_function(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions): return [0.0] * len(completions)\n"
        "class Scores:\n    @staticmethod\n    def long(completions): return [1.0]\n"
        "LIMIT = 3\n"
    )
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = sys.modules.get("my_rewards")
    assert module is None
    assert load_function("my_rewards:short")([1, 2]) == [0.0, 0.0]
    assert load_function("my_rewards:Scores.long")([1]) == [1.0]
    for spec, message in {
        "my_rewards": "expected 'module:function'",
        ":short": "expected 'module:function'",
        "folder/my_rewards.py:short": "write 'folder.my_rewards:short'",
        "my_rewardz:short": "importing 'my_rewardz' raised ModuleNotFoundError",
        "my_broken:short": "importing 'my_broken' raised ZeroDivisionError",
        "my_rewards:shorty": "has no 'shorty'; did you mean 'short'",
        "my_rewards:LIMIT": "expected a callable, got int 3",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_function(spec)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A two-layer decoder classifier with a byte-level tokenizer and a chat template, on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=1,
    )
    folder = tmp_path_factory.mktemp("judge")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def direct(checkpoint: str, text: str) -> float:
    """The classifier's logit at the last token of one text, unpadded."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1).eval()
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        last = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return model.score(last).item()


def test_reward_model_from_checkpoint_equals_direct_call(checkpoint):
    rewards = RewardSet([checkpoint, length], device="cpu")
    assert rewards.names[0] == checkpoint.split("/")[-1]
    scored = score(rewards)
    expected = [direct(checkpoint, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert max(expected) - min(expected) > 1e-3
    torch.testing.assert_close(scored[:, 0], torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert scored[:, 1].tolist() == [2, 5, 0]


def test_reward_model_given_as_model_with_conversations(checkpoint):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1).train()
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS] * 12
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS] * 12
    scored = RewardSet(model).score(prompts, completions, IDS * 12, {})
    texts = [f"[user]{p}[assistant]{c}" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = torch.tensor([direct(checkpoint, text) for text in texts]).repeat(12)
    torch.testing.assert_close(scored[:, 0], expected, rtol=1e-4, atol=1e-6)
    assert not model.training


def test_reward_model_refusals(checkpoint, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

    two = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=2, ignore_mismatched_sizes=True
    )
    with pytest.raises(ValueError, match="num_labels=1 as reward models, got .* with num_labels=2"):
        RewardSet(two, AutoTokenizer.from_pretrained(checkpoint))
    base = tmp_path / "base"
    LlamaForCausalLM(two.config).save_pretrained(base)
    with pytest.raises(ValueError, match="no weights for score.weight"):
        RewardSet(str(base))
    with pytest.raises(
        ValueError, match="completion 1 with its prompt has 107 tokens.*context of 64"
    ):
        RewardSet(checkpoint).score(PROMPTS, ["", "x" * 100, ""], IDS, {})
