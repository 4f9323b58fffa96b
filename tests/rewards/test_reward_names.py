"""Rewards by name: options, what is refused and how, and the table in the docs."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from grpo_fast.rewards import RULES, RewardSet, load_reward, rules

ROOT = Path(__file__).resolve().parents[2]


# names and options


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
        ("reasoning_gym:chain_sumz", "expected a task of reasoning_gym, got 'chain_sumz'"),
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


# documentation


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
    """GRPO_FAST_WRITE=1 writes it there instead."""
    page = ROOT / "docs/rewards.md"
    text = page.read_text(encoding="utf-8")
    begin, end = "<!-- rules -->\n", "<!-- /rules -->\n"
    if os.environ.get("GRPO_FAST_WRITE") == "1":
        before, after = text.partition(begin)[0], text.partition(end)[2]
        page.write_text(before + begin + documented() + end + after, encoding="utf-8")
        return
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
