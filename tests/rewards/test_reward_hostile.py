"""Every rule reward on texts that were made to break it."""

from __future__ import annotations

import math
import time

import psutil
import pytest

from grpo_fast.rewards import load_reward

# texts made to break them

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
