"""Every rule reward: its values by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_fast.advantages import group_advantages, reward_weights
from grpo_fast.rewards import RewardSet, load_reward
from grpo_fast.rewards.numerals import numbers_in, parse_number
from grpo_fast.rewards.shaping import overlong
from grpo_fast.rewards.text import final_answer, text_of


def values(spec, completions, **keywords):
    return load_reward(spec)(completions=completions, **keywords)


# worked examples of the notes that the trainer was built from, with the exact values


@pytest.mark.parametrize("population", [False, True])
def test_four_rewards(population):
    """1, .8, .4, .2: population std .31623 gives +-1.26491, +-.63246; sample .36515 +-1.09545."""
    rewards = torch.tensor([[1.0, 0.8, 0.4, 0.2]]).double()
    got = group_advantages(rewards, eps=0.0, population=population)[0].tolist()
    high, low = (1.26491, 0.63246) if population else (1.09545, 0.54772)
    assert got == pytest.approx([high, low, -low, -high], abs=5e-6)


def test_eight_rewards():
    """Four of 1 and four of 0: sample std .53452, +-.93541; ours with eps 1e-4 +-.93524."""
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]]).double()
    signs = (2 * rewards - 1)[0]
    exact = group_advantages(rewards, eps=0.0)[0]
    assert (exact * signs).tolist() == pytest.approx([0.93541] * 8, abs=5e-6)
    assert (group_advantages(rewards)[0] * signs).tolist() == pytest.approx([0.93524] * 8, abs=5e-6)
    assert (group_advantages(rewards, eps=0.0, population=True)[0] * signs).tolist() == [1.0] * 8


def test_partial_credit_of_a_group():
    """1, .5, 0, .5 -> 1.22474 0 -1.22474 0 (sample), through the rule that gives these rewards."""
    completions = [
        "3 * 24 = 72\n#### 72",
        "3 * 24 = 72, and 72 + 1 = 73\n#### 73",
        "3 * 24 = 62\n#### 62",
        "24 + 48 = 72, so\n#### 96",
    ]
    for rule in ("number", "math?symbolic=false"):
        separator = "&" if "?" in rule else "?"
        got = values(f"rule:{rule}{separator}partial=0.5", completions, answer=["#### 72"] * 4)
        assert got == [1.0, 0.5, 0.0, 0.5]
    advantages = group_advantages(torch.tensor([got]).double(), eps=0.0)[0].tolist()
    assert advantages == pytest.approx([1.22474, 0.0, -1.22474, 0.0], abs=5e-6)


def test_weights_of_four_rewards():
    """softmax .3550 .2907 .1948 .1595; our linear one subtracts the minimum, .5 .375 .125 0."""
    rewards = torch.tensor([[1.0, 0.8, 0.4, 0.2]], dtype=torch.float64)
    soft = reward_weights(rewards, "softmax")[0] / 4
    assert soft.tolist() == pytest.approx([0.3550, 0.2907, 0.1948, 0.1595], abs=5e-5)
    assert (reward_weights(rewards, "linear")[0] / 4).tolist() == pytest.approx(
        [0.5, 0.375, 0.125, 0.0], abs=1e-12
    )


# values


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>why</think><answer>42</answer>", 1),
        ("  <think>\nwhy\n</think>\n\n<answer>42</answer>\n", 1),
        ("<think></think><answer>42</answer>", 1),
        ("<think>why</think><answer> </answer>", 0),
        ("<think>why</think>42", 0),
        ("<think>why</think><answer>42</answer> so", 0),
        ("so <think>why</think><answer>42</answer>", 0),
        ("<think>why</think> so <answer>42</answer>", 0),
        ("<answer>42</answer><think>why</think>", 0),
        ("<think>why<answer>42</answer></think>", 0),
        ("<think>a</think><think>b</think><answer>42</answer>", 0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", 0),
        ("<think>why</think><answer>42", 0),
        ("<think>why<answer>42</answer>", 0),
        ("<THINK>why</THINK><answer>42</answer>", 0),
        ("", 0),
    ],
)
def test_format(text, reward):
    assert values("rule:format", [text]) == [reward]


@pytest.mark.parametrize(
    ("spec", "text", "reward"),
    [
        ("rule:format?tags=think", "<think>why</think>42", 1),
        ("rule:format?tags=think", "<think>why</think>\n ", 0),
        ("rule:format?tags=think&begun=true", "why</think>42", 1),
        ("rule:format?tags=think&begun=true", "<think>why</think>42", 0),
        ("rule:format?begun=true", "why</think><answer>42</answer>", 1),
        ("rule:format?tags=a,b,c", "<a>1</a> <b>2</b> <c>3</c>", 1),
        ("rule:format?tags=a,b,c", "<a>1</a> <c>2</c> <b>3</b>", 0),
        (r"rule:format?pattern=\d+ [ab%26]+", "12 a&b", 1),
        (r"rule:format?pattern=\d+ [ab%26]+", "12 a&b.", 0),
        (r"rule:format?pattern=a.b", "a\nb", 1),
    ],
)
def test_format_with_options(spec, text, reward):
    assert values(spec, [text]) == [reward]


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("<answer>Paris</answer>", "Paris", 1),
        ("I think <answer> New \n York </answer>.", "New York", 1),
        ("<answer>paris</answer>", "Paris", 0),
        ("Paris", "Paris", 1),
        ("<think>Rome? Paris</think>Paris", "Paris", 1),
        ("<answer>Rome</answer><answer>Paris</answer>", "Paris", 0),
        ("<answer>Paris</answer><answer>Rome</answer>", "Paris", 0),
        ("It is \\boxed{Paris}", "Paris", 1),
        ("#### Paris", "Paris", 1),
        ("<answer>7</answer>", 7, 1),
        ("<answer>7</answer>", None, None),
        ("", "Paris", 0),
    ],
)
def test_exact(text, gold, reward):
    assert values("rule:exact", [text], answer=[gold]) == [reward]
    if gold == "Paris" and "paris" in text:
        assert values("rule:exact?ignore_case=yes", [text], answer=[gold]) == [1.0]


@pytest.mark.parametrize(
    ("text", "gold", "reward"),
    [
        ("so 7 + 5 is 12.", "12", 1),
        ("12 apples, no: 13", "12", 0),
        ("<answer>$1,234.50</answer>", "1234.5", 1),
        ("#### 72", "48 + 24 = 72\n#### 72", 1),
        ("\\boxed{\\frac{1}{2}}", 0.5, 1),
        ("-3", "3", 0),
        ("\u22123", "-3", 1),
        ("no number", "3", 0),
        ("3", "no number", None),
        ("3", None, None),
        ("3", True, None),
        ("1e5", "100000", 0),
        ("0.333333333", "1/3", 0),
    ],
)
def test_number(text, gold, reward):
    assert values("rule:number", [text], answer=[gold]) == [reward]


def test_number_with_tolerance_and_another_column():
    spec = "rule:number?column=gold&tolerance=0.01"
    assert values(spec, ["100.9", "101.1", "99"], gold=["100"] * 3) == [1.0, 0.0, 1.0]


def test_partial_credit_is_not_for_lists():
    listed = " ".join(f"= {n}" for n in range(100)) + " #### 7"
    assert values("rule:number?partial=0.5", [listed], answer=["72"]) == [0.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567", 1_234_567),
        ("12,34", None),
        ("1 2", None),
        ("32, 349", None),
        (".5", 0.5),
        ("5.", 5),
        ("+ 3", 3),
        ("\\dfrac{-3}{4}", -0.75),
        ("-\\frac12", -0.5),
        ("3 / 4", 0.75),
        ("1/0", None),
        ("\\$ 10\\,000", 10_000),
        ("\u0663", None),
        ("1e5", None),
        ("", None),
        (".", None),
        ("1" * 500, None),
    ],
)
def test_numbers_are_read_exactly(text, number):
    assert parse_number(text) == number


def test_numbers_in_running_text():
    assert numbers_in("v1.2.3 costs $1,200 or -3/4, 1,23 and .5.") == [1200, -0.75, 1, 23, 0.5]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a \\boxed{1} b \\boxed{\\frac{1}{2}}", "\\boxed{1}, \\boxed{\\frac{1}{2}}"),
        ("\\boxed{1}" + "." * 50 + "\\boxed{2}", "2"),
        ("\\boxed{1}\n\\boxed{2}", "2"),
        ("\\boxed{1", "\\boxed{1"),
        ("\\fbox{x}", "x"),
        ("<think>\\boxed{1}</think> 2", "2"),
        ("<answer>\\boxed{3}</answer> \\boxed{4}", "3"),
        ("#### 5\nand more", "5"),
        ("</answer>5<answer>", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


def test_texts_of_conversations():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}]
    assert text_of([{"content": parts}]) == "ab" and text_of(messages) == "c"
    odd = [None, [], {}, [{}], [None], 3, [{"content": None}], [{"content": [None, "x"]}]]
    assert [text_of(value) for value in odd] == [""] * len(odd)


@pytest.mark.parametrize(
    ("length", "reward"),
    [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (101, -1), (9999, -1)],
)
def test_overlong(length, reward):
    """L = 100, cache = 20, by equation 13 of DAPO."""
    assert values(
        "rule:overlong?max_length=100&cache=20", ["x"], completion_ids=[[1] * length]
    ) == [pytest.approx(reward)]


def test_overlong_without_a_cache_and_from_the_trainer():
    assert [overlong(n, 10, 0) for n in (9, 10, 11)] == [0, 0, -1]
    rewards = RewardSet("rule:overlong?cache=4", max_completion_length=8)
    ids = [[1] * n for n in (4, 6, 8)]
    assert rewards.score(["p"] * 3, ["c"] * 3, ids, {})[:, 0].tolist() == [0.0, -0.5, -1.0]
    with pytest.raises(ValueError, match="'overlong' raised ValueError: max_length: expected"):
        RewardSet("rule:overlong").score(["p"], ["c"], [[1]], {})


def test_length():
    ids = [[1] * n for n in (0, 5, 10, 15, 30)]
    texts = ["x"] * 5
    assert values("rule:length?target=10", texts, completion_ids=ids) == [0, 0, 0, -0.5, -1]
    both = values("rule:length?target=10&both=true", texts, completion_ids=ids)
    assert both == [-1, -0.5, 0, -0.5, -1]
    assert values("rule:length?target=2&unit=words", ["a b c", "a"]) == [-0.5, 0]
    assert values("rule:length?target=2&unit=characters", ["abc", ""]) == [-0.5, 0]


def test_cosine():
    """At 0, L / 2, L and beyond, right then wrong; the cosine would turn back beyond L."""
    ids = [[1] * n for n in (0, 50, 100, 200)] * 2
    answers = ["7"] * 4 + ["8"] * 4
    spec = "rule:cosine?max_length=100&of=number"
    got = values(spec, answers, answer=["7"] * 8, completion_ids=ids)
    assert got == pytest.approx([1, 0.75, 0.5, 0.5, -1, -0.75, -0.5, -0.5])
    quarter = values(spec, ["7"], answer=["7"], completion_ids=[[1] * 25])
    assert quarter == pytest.approx([0.5 + 0.5 * (1 + math.cos(math.pi / 4)) / 2])
    assert values(spec, ["7"], answer=[None], completion_ids=[[1]]) == [None]


def test_repetition():
    """a b a b a b: 3-grams aba bab aba bab, 2 of 4 distinct."""
    assert values("rule:repetition", ["a b a b a b", "A b a B a b"]) == [-0.5, -0.5]
    assert values("rule:repetition", ["a b c d e", "a b", ""]) == [0, 0, 0]
    assert values("rule:repetition?ngram=1&penalty=2", ["x x x x"]) == [-1.5]
    assert values("rule:repetition?ngram=2&unit=characters", ["abab"]) == [pytest.approx(-1 / 3)]


def test_language():
    assert values("rule:language?language=en", ["hello 123!", "\u4f60\u597d", "", "ab\u4f60"]) == [
        *(1, 0, 0),
        pytest.approx(2 / 3),
    ]
    texts = [
        "\u4f60\u597d",
        "\u3042\u6f22",
        "\u043f\u0440\u0438\u0432\u0435\u0442",
        "gr\u00fc\u00dfe",
    ]
    assert values("rule:language", texts, language=["zh", "ja", "ru", None]) == [1, 1, 1, None]
    assert values("rule:language?language=han", [texts[1]]) == [0.5]
    with pytest.raises(ValueError, match="expected one of latin"):
        load_reward("rule:language?language=klingon")


def test_self_correction_is_a_measure():
    metrics = []
    texts = ["7. Wait, that is 8.", "It is 7.", "hmm"]
    reward = load_reward("rule:self_correction")
    assert reward(completions=texts, log_metric=lambda *m: metrics.append(m)) == [None] * 3
    assert metrics == [("self_correction/share", pytest.approx(1 / 3))]
    assert values("rule:self_correction?reward=true", texts) == [1, 0, 0]


def test_reasoning_gym_is_a_rule_too():
    pytest.importorskip("reasoning_gym")
    from grpo_fast.rewards import reasoning_gym_dataset

    rows = reasoning_gym_dataset("chain_sum", 4, min_terms=2, max_terms=2)
    reward = load_reward("rule:reasoning_gym?task=chain_sum")
    assert reward.__name__ == "chain_sum"
    answers = [
        str(sum(map(int, r["prompt"][0]["content"].split(":")[-1].replace("=", "").split("+"))))
        for r in rows
        if "-" not in r["prompt"][0]["content"]
    ]
    entries = [r["entry"] for r in rows if "-" not in r["prompt"][0]["content"]]
    assert answers and reward(completions=answers, entry=entries) == [1.0] * len(answers)
