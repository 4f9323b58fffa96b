"""rule:code: what a program is, how it is tested, what is refused, what honest programs may do."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_fast.rewards import RewardSet
from grpo_fast.rewards.code import _works, code_reward, extract
from grpo_fast.rewards.sandbox import Limits, Sandbox, SandboxUnavailable
from grpo_fast.rewards.sandbox.command import find_bwrap

SQUARE = "def f(x):\n    return x * x\n"


def _bubblewrap() -> bool:
    try:
        find_bwrap()
    except SandboxUnavailable:
        return False
    return True


pytestmark = pytest.mark.skipif(not _bubblewrap(), reason="needs bubblewrap")


@pytest.fixture(scope="module")
def reward():
    """One sandbox for all tests here."""
    reward = code_reward()
    yield reward
    reward.close()


def _judge(reward, program: str, cases: list, entry: str = "f") -> float | None:
    return reward([program], entry_point=[entry], cases=[cases])[0]


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("", ""),
        ("text\n```python\nx = 1\n```\nmore", "x = 1"),
        ("```python\nx = 1\n```\nno, better:\n```py\nx = 2\n```", "x = 2"),
        ("```Python3 title=a.py\nx = 1\n```\n```bash\nls\n```", "x = 1"),
        ("```python\nx = 1\n```\n```\noutput\n```", "x = 1"),
        ("```\nx = 1\n```\n```\nx = 2\n```", "x = 2"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("```python\nx = 1", "x = 1"),
        ("  ```python\n  x = 1\n  ```", "  x = 1"),
        ("````python\n```\nx = 1\n````", "```\nx = 1"),
        ("~~~python\nx = 1\n~~~", "x = 1"),
        ("``` python\nx = 1\n```", "x = 1"),
        ("```python\r\nx = 1\r\n```", "x = 1\r"),
        ('```python\nx = """\n``\n"""\n```', 'x = """\n``\n"""'),
    ],
)
def test_extract(completion, program):
    assert extract(completion) == program


@pytest.mark.parametrize("unit", ["`", "```\n", "```python\n", "~~~", "\0", "x = 1\n", "` ``\n"])
def test_extract_takes_linear_time(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    extract(text)
    assert time.process_time() - start < 2


def test_share_and_all():
    cases = [[[2], 4], [[3], 9], [[-1], 1], [[0], 5]]
    columns = {"entry_point": ["f", "f"], "cases": [cases, cases[:3]]}
    share, every = code_reward(size=1), code_reward(score="all", size=1)
    assert share([SQUARE, SQUARE], **columns) == [0.75, 1.0]
    assert every([SQUARE, SQUARE], **columns) == [0.0, 1.0]
    # what it returned before it ran into a limit counts as a share
    slow = "def f(x):\n    while x == 0: pass\n    return x * x\n"
    limited = code_reward(cpu=0.2, size=1)
    assert limited([slow], entry_point=["f"], cases=[cases]) == [0.75]
    for reward in (share, every, limited):
        reward.close()


def test_arguments_and_entry_points(reward):
    assert _judge(reward, "def f(a, *, b): return a - b", [[{"a": 3, "b": 1}, 2]]) == 1
    solution = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
    assert _judge(reward, solution, [[[1, 2], 3], [["a", "b"], "ab"]], "Solution.add") == 1
    assert _judge(reward, SQUARE, [[[1], 1]], "g") == 0
    assert _judge(reward, "f = 1", [[[1], 1]]) == 0
    assert _judge(reward, "def f(:", [[[1], 1]]) == 0
    # an argument is a copy: what one case does to it does not reach the next
    assert _judge(reward, "def f(a): a.append(1); return a", [[[[]], [1]], [[[]], [1]]]) == 1


def test_types(reward):
    loose = code_reward(types="json", tolerance=1e-6)
    rows = [
        ("1", True, 0, 0),
        ("1", 1.0, 0, 1),
        ("1.0", 1, 0, 1),
        ("(1, 2)", [1, 2], 0, 1),
        ("{1, 2}", {2, 1}, 1, 1),
        ("{'a': (1,)}", {"a": [1]}, 0, 1),
        ("0.1 + 0.2", 0.3, 0, 1),
        ("float('nan')", float("nan"), 1, 1),
        ("-0.0", 0.0, 1, 1),
        ("10 ** 5000", 10**5000, 1, 1),
        ("'\\ud800'", "\ud800", 1, 1),
        ("b'a'", "a", 0, 0),
        ("None", None, 1, 1),
        ("None", False, 0, 0),
        ("[[]] * 3", [[], [], []], 1, 1),
        ("range(3)", [0, 1, 2], 0, 0),
        ("{1: 2, 3: 4}", {3: 4, 1: 2}, 1, 1),
        ("frozenset([1])", {1}, 0, 0),
        ("1 + 2j", 1 + 2j, 1, 1),
    ]
    programs = [f"def f(): return {text}" for text, *_ in rows]
    columns = {"entry_point": ["f"] * len(rows), "cases": [[[[], row[1]]] for row in rows]}
    assert reward(programs, **columns) == [float(row[2]) for row in rows]
    assert loose(programs, **columns) == [float(row[3]) for row in rows]
    loose.close()


def test_scripts(reward):
    """Standard input and output, in the ways people read and leave."""
    inputs, outputs = [["3\n4\n", "10\n-10"]], [["7", "0\n"]]
    bodies = {
        "print(int(input()) + int(input()))": 1,
        "import sys\nprint(sum(map(int, sys.stdin.read().split())), '  ')": 1,
        "import sys\nfor n in [sum(int(x) for x in sys.stdin)]: sys.stdout.write(str(n))": 1,
        "import os\nprint(sum(map(int, os.read(0, 100).split())))\nexit()": 1,
        "print(sum(map(int, open(0).read().split())))\nraise SystemExit": 1,
        "if __name__ == '__main__':\n    print(sum(map(int, [input(), input()])))": 1,
        "print(7)": 0.5,
        "print(int(input()) + int(input()))\n1 / 0": 0,
        "print(int(input()) + int(input()))\nexit(3)": 0,
        "print('answer:', int(input()) + int(input()))": 0,
        "": 0,
    }
    rewards = reward(list(bodies), stdin=inputs * len(bodies), stdout=outputs * len(bodies))
    assert rewards == list(bodies.values())


def test_scripts_stop_at_the_first_failure_of_all(monkeypatch):
    asked = []
    run = Sandbox.run

    def count(self, programs, **keywords):
        outcomes = run(self, programs, **keywords)
        asked.append([outcome.status for outcome in outcomes])
        return outcomes

    reward = code_reward(score="all", size=1)
    monkeypatch.setattr(Sandbox, "run", count)
    columns = {"stdin": [["1"] * 20], "stdout": [["2"] + ["1"] * 19]}
    assert reward(["print(input())"], **columns) == [0.0]
    assert asked[0].count("skipped") >= 16
    reward.close()


def test_test_bodies(reward):
    bodies = {
        "assert candidate(3) == 9 and f(2) == 4": 1,
        "def check(candidate):\n    assert candidate(3) == 10": 0,
        "def test_one(): assert f(1) == 1\ndef test_two(): assert f(2) == 5": 0,
        "for n in range(50): assert candidate(n) == helper(n)": 1,
        "try: candidate('a')\nexcept TypeError: pass\nelse: assert False": 1,
        "try: candidate('a')\nexcept KeyError: pass": 0,
        "import os\nos.environ['x']": 0,
        "assert isinstance(candidate(2), bool)": 0,
        "values = [1, 2]; candidate(len(values)); assert values == [1, 2]": 1,
    }
    before = "def helper(n): return n * n"
    rewards = reward(
        [SQUARE] * len(bodies),
        entry_point=["f"] * len(bodies),
        test=list(bodies),
        before=[before] * len(bodies),
    )
    assert rewards == list(bodies.values())


def test_a_test_body_cannot_be_lied_to(reward):
    """What the program defines, prints, raises or patches does not reach the body."""
    body = "try: got = candidate(3)\nexcept Exception: got = 'raised'\nassert got == 9"
    programs = [
        "class A:\n    __eq__ = lambda s, o: True\nf = lambda x: A()",
        "import builtins\nbuiltins.isinstance = lambda *a: True\nf = lambda x: 1",
        "def f(x): raise AssertionError",
        "def f(x): raise SystemExit(0)",
        "candidate = helper = check = lambda *a: 9\nf = lambda x: 8",
        "import sys\nsys.modules['tests'] = sys\nf = lambda x: None",
    ]
    columns = {"entry_point": ["f"] * len(programs), "test": [body] * len(programs)}
    assert reward(programs, **columns) == [0.0] * len(programs)
    # no plain data is a failure even where the body expects an exception
    expecting = "try: candidate(3)\nexcept BaseException: pass"
    assert reward(
        ["f = lambda x: x.real.as_integer_ratio"], entry_point=["f"], test=[expecting]
    ) == [0]


def test_a_body_that_cannot_judge_gives_none(reward, caplog):
    with caplog.at_level(logging.WARNING, logger="grpo_fast.rewards.code"):
        assert reward([SQUARE], entry_point=["f"], test=["candidate(lambda: 1)"]) == [None]
    assert "expected arguments of plain data, got no plain data: function" in caplog.text


HONEST = {
    "threads": "import threading\ndef f(x):\n    found = []\n"
    "    threads = [threading.Thread(target=found.append, args=(i,)) for i in range(8)]\n"
    "    [t.start() for t in threads]\n    [t.join() for t in threads]\n    return sum(found)",
    "asyncio": "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return 28\n"
    "def f(x): return asyncio.run(g(x))",
    "dataclasses": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass A:\n    x: int = 28\ndef f(x): return A().x",
    "files": "import tempfile\ndef f(x):\n    with tempfile.TemporaryFile('w+') as file:\n"
    "        file.write('28'); file.seek(0)\n        return int(file.read())",
    "recursion": "import sys\nsys.setrecursionlimit(20000)\n"
    "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x): return g(9000) - 8972",
    "libraries": "import collections, datetime, decimal, fractions, functools, hashlib, heapq, "
    "itertools, json, math, random, re, statistics, string, typing, uuid, zlib\n"
    "def f(x): return int(decimal.Decimal(28))",
    "printing": "def f(x):\n    print('x' * 1000000)\n    return 28",
    "sleeping": "import time\ndef f(x):\n    time.sleep(0.3)\n    return 28",
    "concurrent": "from concurrent.futures import ThreadPoolExecutor\ndef f(x):\n"
    "    with ThreadPoolExecutor(4) as pool: return sum(pool.map(int, '1234567'))",
    "pickle": "import pickle\nclass A: pass\ndef f(x):\n"
    "    return 28 if isinstance(pickle.loads(pickle.dumps(A())), A) else 0",
    "memory": "def f(x): return len(bytearray(200 << 20)) // (200 << 20) * 28",
    "hashing": "def f(x): return 28 if list({'a', 'b', 'c'}) == list({'a', 'b', 'c'}) else 0",
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs(reward, name):
    assert _judge(reward, HONEST[name], [[[0], 28]]) == 1


def test_the_same_program_earns_the_same(reward):
    """Sets of texts come in one order: the seed of the hash is fixed."""
    program = "def f(): return list({'one', 'two', 'three', 'four', 'five', 'six'})"
    cases = [[[], order] for order in (["one"], ["two"])]
    columns = {"entry_point": ["f"], "cases": [cases]}
    pool = Sandbox(size=1)
    works = _works(0, program, {name: values[0] for name, values in columns.items()}, Limits())
    replies = {pool.run([works[0].program])[0].replies for _ in range(5)}
    pool.close()
    assert len(replies) == 1


def test_packages():
    program = "import numpy\ndef f(x): return numpy.arange(x).sum().item()"
    without, reward = code_reward(size=1), code_reward(packages="numpy", size=1, memory=1024)
    assert _judge(without, program, [[[4], 6]]) == 0
    assert _judge(reward, program, [[[4], 6]]) == 1
    without.close()
    reward.close()
    with pytest.raises(ValueError, match="packages: expected installed packages, got 'no_such'"):
        code_reward(packages="no_such")


@pytest.mark.parametrize("text", ["", "\0", "x" * 1_000_000, "(" * 100_000, "\ud800", "'''" * 1001])
def test_any_text_is_judged(reward, text):
    assert _judge(reward, text, [[[1], 1]]) == 0
    assert reward([text], stdin=[["1"]], stdout=[["1"]]) == [0]


def test_rows_without_tests_and_conversations(reward):
    """Columns of a mixed data set: a row with none of them is another reward's."""
    chat = [{"role": "assistant", "content": f"```python\n{SQUARE}```"}]
    columns = {
        "entry_point": ["f", None, None, "f"],
        "cases": [json.dumps([[[2], 4]]), None, None, None],
        "stdin": [None, None, ["5"], None],
        "stdout": [None, None, ["5"], None],
        "test": [None, None, None, "assert f(3) == 9"],
    }
    completions = [chat, chat, "print(input())", SQUARE]
    assert reward(completions, **columns) == [1.0, None, 1.0, 1.0]


def test_under_the_convention():
    """As RewardSet calls it: with every column and the loggers."""
    reward = code_reward(cpu=0.3)
    metrics, rewards = {}, RewardSet(reward)
    scored = rewards.score(
        ["p"] * 3,
        [SQUARE, "while True: pass", "import os; os._exit(0)"],
        [[1]] * 3,
        {"entry_point": ["f"] * 3, "cases": [[[[2], 4]]] * 3, "level": [1] * 3},
        log_metric=metrics.__setitem__,
    )
    assert rewards.names == ["code"] and scored.tolist() == [[1.0], [0.0], [0.0]]
    assert metrics["code/cpu"] == pytest.approx(1 / 3)
    assert metrics["code/crashed"] == pytest.approx(1 / 3) and metrics["code/unjudged"] == 0
    reward.close()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "expected a column 'cases', 'stdin' or 'test', got"),
        ({"cases": [[[[1], 1]]]}, "entry_point of row 0: expected a function's name, got None"),
        ({"entry_point": ["a b"], "cases": [[[[1], 1]]]}, "got 'a b'"),
        ({"entry_point": ["f"], "cases": ["[1, "]}, "expected JSON or a Python literal"),
        ({"entry_point": ["f"], "cases": [[]]}, "cases of row 0: expected a list, not empty"),
        ({"entry_point": ["f"], "cases": [[[1, 2, 3]]]}, r"expected \[arguments, expected\]"),
        ({"entry_point": ["f"], "cases": [[[1, 2]]]}, "arguments in a list or a dict, got 1"),
        ({"entry_point": ["f"], "cases": [[[[1], object()]]]}, "plain data.*object"),
        ({"stdin": [["1"]], "stdout": [["1", "2"]]}, "stdin and stdout of equal length"),
        ({"stdin": [["1"]]}, "stdin and stdout of equal length"),
        ({"stdin": [[1]], "stdout": [["1"]]}, "expected texts in stdin and stdout"),
        ({"stdin": [["1" * (9 << 20)]], "stdout": [["1"]]}, "at most half of disk"),
        ({"entry_point": ["f"], "test": ["assert ("]}, "test of row 0: expected Python"),
    ],
)
def test_mistakes_in_the_data_set(reward, columns, message):
    with pytest.raises(ValueError, match=message):
        reward([SQUARE], **columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "most"}, "score: expected one of .*'share', 'all'.*got 'most'"),
        ({"types": "any"}, "types: expected one of"),
        ({"tolerance": -1}, "tolerance: expected a number in"),
        ({"sandbox": "docker"}, "sandbox: expected one of .*'bwrap', 'none'.*got 'docker'"),
        ({"cpu": 0}, "cpu: expected a number above 0, got 0"),
        ({"memory": 0.5}, "memory: expected a whole number above 0, got 0.5"),
        ({"wall": float("nan")}, "wall: expected a number above 0"),
        ({"threads": True}, "threads: expected a whole number above 0, got True"),
        ({"size": 0}, "size: expected at least 1, got 0"),
    ],
)
def test_mistakes_in_the_options(options, message):
    with pytest.raises(ValueError, match=message):
        code_reward(**options)


def test_progress(capsys):
    seen = []
    reward = code_reward(progress=lambda done, total: seen.append((done, total)))
    columns = {"entry_point": ["f"] * 5, "cases": [[[[2], 4]]] * 5}
    assert reward([SQUARE] * 5, **columns) == [1.0] * 5
    assert seen == [(done, 5) for done in range(1, 6)]
    reward.close()
    line = code_reward(progress=True)
    line([SQUARE] * 5, **columns)
    line.close()
    assert "programs" in capsys.readouterr().err


def test_unprotected_only_when_asked(tmp_path, caplog):
    """sandbox=none judges the same and says what it is; the harm it lets through is real."""
    mark = tmp_path / "mark"
    harmful = f"open({str(mark)!r}, 'w').write('x')\n{SQUARE}"
    columns = {"entry_point": ["f"], "cases": [[[[2], 4]]]}
    protected = code_reward(size=1)
    assert protected([harmful], **columns) == [0.0] and not mark.exists()
    protected.close()
    with caplog.at_level(logging.WARNING, logger="grpo_fast.rewards.code"):
        reward = code_reward(sandbox="none", size=1, cpu=0.3)
    assert "run unprotected" in caplog.text
    assert reward([harmful], **columns) == [1.0] and mark.exists()
    assert reward(["while True: pass"], **columns) == [0.0]
    assert reward(["print(1)"], stdin=[["1"]], stdout=[["1"]]) == [1.0]
    os.environ["SECRET_OF_THE_TRAINER"] = "x"
    peek = "import os\ndef f(x): return 4 if 'SECRET_OF_THE_TRAINER' not in os.environ else 0"
    assert reward([peek], **columns) == [1.0]
    del os.environ["SECRET_OF_THE_TRAINER"]
    reward.close()


def test_works_in_a_virtual_environment_made_with_copies(tmp_path):
    """There sys.executable is not below sys.base_prefix, and bubblewrap would find no Python."""
    folder = tmp_path / "copied"
    subprocess.run([sys.executable, "-m", "venv", "--copies", "--without-pip", folder], check=True)
    code = "from sandbox import Sandbox; s = Sandbox(); print(s.check()['result']); s.close()"
    folders = [str(Path(__file__).resolve().parents[2] / "grpo_fast" / "rewards"), *sys.path]
    result = subprocess.run(
        [folder / "bin" / "python", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "45\n", result.stderr
