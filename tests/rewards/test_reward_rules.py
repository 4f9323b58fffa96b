"""Every rule reward: its values by hand, its options, and texts made to break it."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import psutil
import pytest
import torch

from grpo_fast.advantages import group_advantages, reward_weights
from grpo_fast.rewards import RULES, RewardSet, load_reward, rules
from grpo_fast.rewards.numerals import numbers_in, parse_number
from grpo_fast.rewards.shaping import overlong
from grpo_fast.rewards.text import final_answer, text_of

ROOT = Path(__file__).resolve().parents[2]


def values(spec, completions, **keywords):
    return load_reward(spec)(completions=completions, **keywords)


# worked examples of the notes that the trainer was built from, with the exact values -------------


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


# values ------------------------------------------------------------------------------------------


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


# names and options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rule:formt", "'rule:formt': no such rule; did you mean 'format'?"),
        ("rule:", "no such rule"),
        ("rule:format?tag=think", "no option 'tag'; did you mean 'tags'?"),
        ("rule:format?tags", "expected option=value after '?', got 'tags'"),
        ("rule:format?tags=a&tags=b", "expected tags once"),
        ("rule:format?tags=", "expected different names"),
        ("rule:format?tags=a,a", "expected different names"),
        ("rule:format?tags=a b", "expected different names"),
        ("rule:format?begun=maybe", "begun: expected true or false, got 'maybe'"),
        ("rule:format?pattern=(", "pattern: expected a regular expression"),
        ("rule:length", "expected option target, as in rule:length?target=..."),
        ("rule:length?target=0", "target: expected an integer >= 1, got 0"),
        ("rule:length?target=1.5", "target: expected an integer, got '1.5'"),
        ("rule:length?target=5&unit=lines", "unit: expected one of tokens, words, characters"),
        ("rule:overlong?max_length=5&cache=6", "cache: expected at most max_length = 5"),
        ("rule:overlong?cache=-1", "cache: expected an integer >= 0"),
        ("rule:number?partial=2", r"partial: expected a number in [0, 1], got 2.0"),
        ("rule:number?tolerance=-1", "tolerance: expected a number in [0, 1)"),
        ("rule:cosine?of=code", "of: expected math, number or exact"),
        ("rule:repetition?penalty=nan", "penalty: expected a number >= 0"),
        ("rule:repetition?unit=tokens", "unit: expected words or characters"),
        ("rule:self_correction?markers=", "markers: expected phrases"),
        ("rule:judge", "expected option model"),
        ("rule:judge?model=m&mode=rank", "mode: expected score or pairwise"),
        ("rule:judge?model=m&url=file:///etc/passwd", "url: expected http"),
        ("rule:judge?model=m&low=5&high=5", "low: expected less than high"),
        ("reasoning_gym:chain_sumz", "has no task 'chain_sumz'"),
        ("worker:os:getcwdd", "has no 'getcwdd'"),
        ("worker:os.path:join?workers=0", "expected workers to be an integer >= 1"),
        ("worker:os.path:join?wrkers=1", "no option 'wrkers'; did you mean 'workers'?"),
    ],
)
def test_bad_names_and_options(spec, message):
    with pytest.raises(ValueError) as caught:
        load_reward(spec)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_from_python():
    reward = load_reward("rule:format", tags=("a", "b"))
    assert reward(completions=["<a>1</a><b>2</b>"]) == [1.0] and reward.__name__ == "format"
    with pytest.raises(ValueError, match="no option 'tag'"):
        load_reward("rule:format", tag=("a",))
    with pytest.raises(ValueError, match="only rules and workers have options"):
        load_reward("os.path:join", tags=3)
    with pytest.raises(ValueError, match="expected a name such as 'rule:math', got 3"):
        load_reward(3)


def test_rules_are_known_before_a_run_begins():
    rewards = RewardSet(["rule:exact", "rule:number?column=gold", "rule:format", "rule:format"])
    assert rewards.names == ["exact", "number", "format", "format_2"]
    with pytest.raises(ValueError, match="'exact' needs 'answer'.*did you mean 'answers'"):
        rewards.check_columns(["answers", "gold"])
    rewards.check_columns(["answer", "gold"])
    with pytest.raises(ValueError, match="no such rule"):
        RewardSet(["rule:maths_"])


# texts made to break them ------------------------------------------------------------------------

MEGABYTE = 1_000_000
HOSTILE = {
    "empty": "",
    "words": "a b c " * (MEGABYTE // 6),
    "one word": "ab" * (MEGABYTE // 2),
    "nul": "\0" * MEGABYTE,
    "spaces": " " * MEGABYTE,
    "lines": "\n" * MEGABYTE,
    "opening tags": "<think>" * (MEGABYTE // 7),
    "closing tags": "</think>" * (MEGABYTE // 8),
    "pairs of tags": "<think>" * 50_000 + "</think><answer>" * 30_000,
    "brackets": "<" * MEGABYTE,
    "an answer": "<answer>" + "x " * (MEGABYTE // 2) + "</answer>",
    "open boxes": "\\boxed{" * (MEGABYTE // 7),
    "boxes": "\\boxed{1}" * (MEGABYTE // 9),
    "braces": "\\boxed{" + "{" * MEGABYTE,
    "fractions": "\\frac{1}{" * (MEGABYTE // 9),
    "digits": "1" * MEGABYTE,
    "commas": "1,234" * (MEGABYTE // 5),
    "dots": "." * MEGABYTE,
    "slashes": "1/" * (MEGABYTE // 2),
    "equals": "=1" * (MEGABYTE // 2),
    "minus": "-" * MEGABYTE,
    "dollars": "$" * MEGABYTE,
    "hashes": "####" * (MEGABYTE // 4),
    "han": "\u6f22" * MEGABYTE,
    "emoji": "\U0001f600" * (MEGABYTE // 4),
    "surrogates": "\ud800" * 100_000,
    "waits": "wait, " * (MEGABYTE // 6),
    "tower": "\\boxed{9^{9^{9^{9}}}}",
    "factorial": "\\boxed{100000!}",
    "nested factorial": "\\boxed{((9!)!)!}",
    "power": "\\boxed{2^{999999999}}",
    "parentheses": "\\boxed{" + "(" * 900 + ")" * 900 + "}",
    "roots": "\\boxed{" + "\\sqrt{" * 200 + "2" + "}" * 200 + "}",
    "sum": "\\boxed{\\sum_{k=1}^{99999999} k^k}",
    "product": "\\boxed{\\prod_{k=1}^{99999999} k}",
    "backtracking": "a " * 40 + "!",
    "boxed dashes": "\\boxed{" + "-" * 1_900 + "}",
    "boxed signs": "\\boxed{" + "-1+" * 600 + "}",
    "boxed letters": "\\boxed{" + "a b c " * 300 + "}",
    "boxed commas": "\\boxed{" + "1," * 900 + "}",
    "boxed product": "\\boxed{" + "(x+1)" * 300 + "}",
}
SPECS = (
    "rule:format",
    "rule:format?tags=think&begun=true",
    r"rule:format?pattern=^(\s*\w+\s*)+$",
    "rule:exact?ignore_case=true",
    "rule:number?partial=0.5",
    "rule:math?partial=0.5",
    "rule:length?target=10&unit=words",
    "rule:cosine?max_length=100&unit=words&of=number",
    "rule:overlong?max_length=10&cache=5",
    "rule:repetition",
    "rule:repetition?unit=characters",
    "rule:language?language=en",
    "rule:self_correction?reward=true",
)


def seconds_of_children():
    used = 0.0
    for child in psutil.Process().children():
        try:
            used += sum(child.cpu_times()[:2])
        except psutil.Error:
            continue
    return used


@pytest.mark.parametrize("spec", SPECS)
def test_hostile_texts_are_answered_within_a_fifth_of_a_second(spec):
    """CPU seconds of ours and of the worker for each text; 0.2 s and no exception."""
    if "math" in spec:
        pytest.importorskip("math_verify")
    reward = load_reward(spec)
    keywords = {"answer": ["\\frac{x}{2}"], "completion_ids": [[1] * 20]}
    # a worker is started, and has imported what it needs
    reward(completions=["\\boxed{x+1}"], **keywords)
    slow = {}
    for name, text in HOSTILE.items():
        began, children = time.process_time(), seconds_of_children()
        (value,) = reward(completions=[text], **keywords)
        took = time.process_time() - began + max(0.0, seconds_of_children() - children)
        assert value is None or math.isfinite(value)
        if took > 0.2:
            slow[name] = took
    assert slow == {}


def test_a_pattern_that_takes_for_ever_is_not_judged():
    metrics = []
    reward = load_reward(r"rule:format?pattern=^(\s*\w+\s*)+$")
    texts = ["a b", "a " * 40 + "!", "a b c"]
    got = reward(completions=texts, log_metric=lambda *m: metrics.append(m))
    assert got == [1.0, None, 1.0] and metrics == [("format/unjudged", pytest.approx(1 / 3))]


# documentation -----------------------------------------------------------------------------------


def documented():
    """The generated part of docs/rewards.md."""
    lines = [rules.table(), "| rule | options |", "|---|---|"]
    for name in RULES:
        # its own issue: another branch brings it
        if name == "code" and not (ROOT / "grpo_fast/rewards/code.py").exists():
            continue
        lines.append(f"| `{name}` | {rules.option_table(name)} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_the_table():
    text = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    begin, end = "<!-- rules -->\n", "<!-- /rules -->\n"
    assert text.count(begin) == text.count(end) == 1
    shown = text.partition(begin)[2].partition(end)[0]
    assert [line for line in shown.splitlines() if not line.startswith("| `code` | `")] == [
        line for line in documented().splitlines() if not line.startswith("| `code` | `")
    ]


def test_every_row_has_a_source_and_a_factory():
    for name, row in RULES.items():
        assert row.source and row.equation and row.range and ":" in row.factory, name
        assert "|" not in "".join((row.equation, row.range, row.needs, row.source)), name
    assert len(set(itertools.chain(RULES))) == 13
