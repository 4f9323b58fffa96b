"""rule:code: the share of tests that a program in a completion passes, run in a sandbox.

The tests stay outside. The sandbox gets the program and the arguments, or the standard input, and
gives back what was returned or printed; this module compares. A test body runs in a sandbox of its
own, where its calls of the program go from one sandbox to the other.
"""

from __future__ import annotations

import ast
import functools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .sandbox import Limits, Outcome, Program, Sandbox
from .sandbox.child import NotPlain, encode
from .sandbox.values import TYPES, neutral, read, same

logger = logging.getLogger(__name__)

SCORES = ("share", "all")
_LANGUAGES = ("python", "py", "python3")
# completions from which a progress line is worth its place on a terminal
_PROGRESS = 64


def code_reward(
    *,
    score: str = "share",
    types: str = "strict",
    tolerance: float = 0.0,
    sandbox: str = "bwrap",
    cpu: float = Limits.cpu,
    wall: float = Limits.wall,
    memory: int = Limits.memory,
    output: int = Limits.output,
    disk: int = Limits.disk,
    threads: int = Limits.threads,
    size: int | None = None,
    packages: str | Sequence[str] = (),
    progress: bool | Callable[[int, int], None] | None = None,
) -> Callable[..., list[float | None]]:
    """A reward function: tests passed / tests of the program in each completion.

    The program is `extract(completion)`, behind the text of the column `prefix` where there is one.
    A row of the dataset says how it is tested, with one of:

    - `entry_point`, a function's name or `Class.method`, and `cases`, a list of
      [arguments, expected], arguments a list or a dict of keywords; a string of JSON or of a Python
      literal is read first. Each case is a test. A result that is no plain data fails.
    - `stdin` and `stdout`, lists of texts of equal length: the program is a script. Each pair is a
      test, passed when the script ends without an error and prints the text, white space at the end
      of lines and of the whole aside.
    - `entry_point` and `test`, Python that calls the function by its name or as `candidate`;
      `check(candidate)` and `test_...()` are called where they are defined. It is one test, passed
      when nothing is raised. Arguments and results have to be plain data, and arrive as copies.
      `before` is code that stands in front of the body.

    A row with none of them gets None, and so does a completion that the sandbox failed on, which is
    never the program's doing: what a program does to end, slow or break its sandbox earns 0.

    Args:
        score: "share" of passed tests, or "all": 1.0 when every test passed, else 0.0.
        types: how results are compared, "strict" or "json"; see `sandbox.values.same`.
        tolerance: relative tolerance of floats, 0 for none.
        sandbox: "bwrap", or "none": programs then run **unprotected**, with the user's own rights.
        cpu: seconds of CPU of one program (all its cases, or one standard input).
        wall: seconds, those in which it waited for a core aside.
        memory: MiB.
        output: KiB.
        disk: MiB in its only writable folder.
        threads: at a time.
        size: programs at a time; None takes the cores of this rank.
        packages: installed packages that programs may import, comma-separated or a list.
        progress: True or False, or called with (done, programs); None shows a line on a terminal
            from 64 programs on.

    Returns:
        A function of the keywords `completions` and the columns above, which returns one number in
        [0, 1] or None for each completion and logs the shares `code/...`.

    Raises:
        ValueError: for an unknown option.
        SandboxUnavailable: when no sandbox starts here; it says why.
    """
    for name, value, known in (("score", score, SCORES), ("types", types, TYPES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}.")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a number in [0, 1), got {tolerance!r}.")
    if isinstance(packages, str):
        packages = [name.strip() for name in packages.split(",") if name.strip()]
    limits = Limits(cpu, wall, memory, output, disk, threads)
    pool = Sandbox(limits, size, packages, sandbox)
    if sandbox == "none":
        logger.warning("sandbox=none: programs written by the model run unprotected, as you.")
    else:
        pool.check()
    compare = functools.partial(same, types=types, tolerance=tolerance)

    def code(
        completions: list[Any],
        entry_point: list[Any] | None = None,
        cases: list[Any] | None = None,
        stdin: list[Any] | None = None,
        stdout: list[Any] | None = None,
        test: list[Any] | None = None,
        before: list[Any] | None = None,
        prefix: list[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        given = {"entry_point": entry_point, "cases": cases, "stdin": stdin, "stdout": stdout}
        given |= {"test": test, "before": before, "prefix": prefix}
        present = {name: values for name, values in given.items() if values is not None}
        if not {"cases", "stdin", "test"} & present.keys():
            raise ValueError(
                "rule:code: expected a column 'cases', 'stdin' or 'test', got "
                f"{sorted({*present, *columns})}."
            )
        works: list[_Work] = []
        for row, completion in enumerate(completions):
            values = {name: values[row] for name, values in present.items()}
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            works += _works(row, extract(text), values, limits)
        results = _Results(works, score == "all", compare)
        with _Progress(progress, len(works)) as line:
            pool.run(
                [work.program for work in works],
                wanted=results.wanted,
                on_outcome=lambda index, outcome: (results.add(index, outcome), line.advance()),
            )
        rewards = results.rewards(len(completions))
        results.report(log_metric)
        return rewards

    code.close, code.sandbox = pool.close, pool
    return code


def extract(text: str) -> str:
    """The program in a completion.

    The last fenced block whose language is python, py or python3, in any case; without one the last
    fenced block that names no language; without a fence the whole text. A block that is not closed
    ends with the text.
    """
    best: list[str] | None = None
    ranked = False
    inside: list[str] | None = None
    language, fence = "", ""
    for line in [*text.split("\n"), None]:
        stripped = "" if line is None else line.strip()
        if inside is None:
            if stripped.startswith(("```", "~~~")):
                fence = stripped[: len(stripped) - len(stripped.lstrip(stripped[0]))]
                words = stripped[len(fence) :].split()
                language, inside = (words[0].lower() if words else ""), []
        elif line is None or (stripped and stripped == fence[0] * max(len(stripped), len(fence))):
            python = language in _LANGUAGES
            if python or (not language and not ranked):
                best, ranked = inside, python
            inside = None
        else:
            inside.append(line)
    return text if best is None else "\n".join(best)


@dataclass(frozen=True)
class _Work:
    """One program to run, and the tests of its row that it decides."""

    row: int
    program: Program
    expected: tuple[Any, ...]
    """Values of `neutral` for calls, one text for a script, one True for a test body."""


def _works(row: int, code: str, values: dict[str, Any], limits: Limits) -> list[_Work]:
    """What has to run for one completion; nothing when its row has no tests."""
    code = (values.get("prefix") or "") + code
    entry = values.get("entry_point")
    if values.get("cases") is not None:
        calls, expected = _read_cases(row, values["cases"])
        program = Program("call", code, _check_entry(row, entry), calls)
        return [_Work(row, program, expected)]
    if values.get("test") is not None:
        tests, before = values["test"], values.get("before") or ""
        for name, source in (("test", tests), ("before", before)):
            _check_python(row, name, source)
        program = Program("test", code, _check_entry(row, entry), before=before, tests=tests)
        return [_Work(row, program, (True,))]
    if values.get("stdin") is None:
        return []
    inputs, outputs = values["stdin"], values.get("stdout")
    lists = isinstance(inputs, (list, tuple)) and isinstance(outputs, (list, tuple))
    if not lists or len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"row {row}: expected lists stdin and stdout of equal length, not empty.")
    works = []
    for text, expected in zip(inputs, outputs, strict=True):
        if not isinstance(text, str) or not isinstance(expected, str):
            raise ValueError(f"row {row}: expected texts in stdin and stdout, got {type(text)}.")
        data = text.encode("utf-8", "surrogatepass")
        if len(data) > limits.disk << 19:
            raise ValueError(f"row {row}: expected a stdin of at most half of disk, got a longer.")
        works.append(_Work(row, Program("program", code, stdin=data), (_lines(expected),)))
    return works


def _read_cases(row: int, cases: Any) -> tuple[tuple[bytes, ...], tuple[Any, ...]]:
    """The calls as they are sent, and what each should return."""
    if isinstance(cases, str):
        try:
            cases = json.loads(cases)
        except ValueError:
            try:
                cases = ast.literal_eval(cases)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
                raise ValueError(
                    f"cases of row {row}: expected JSON or a Python literal, got "
                    f"{type(error).__name__}: {error}."
                ) from error
    if not isinstance(cases, (list, tuple)) or not cases:
        raise ValueError(f"cases of row {row}: expected a list, not empty, got {type(cases)}.")
    calls, expected = [], []
    for number, case in enumerate(cases):
        where = f"cases of row {row}, case {number}"
        if not isinstance(case, (list, tuple)) or len(case) != 2:
            raise ValueError(f"{where}: expected [arguments, expected], got {case!r:.80}.")
        arguments, result = case
        if not isinstance(arguments, (list, tuple, dict)):
            raise ValueError(f"{where}: expected arguments in a list or a dict, got {arguments!r}.")
        named = isinstance(arguments, dict)
        try:
            calls.append(encode([[], arguments] if named else [list(arguments), {}]))
            expected.append(neutral(result))
        except NotPlain as error:
            raise ValueError(f"{where}: expected plain data, got {error}.") from error
    return tuple(calls), tuple(expected)


def _check_entry(row: int, entry: Any) -> str:
    names = entry.split(".") if isinstance(entry, str) else [""]
    if not all(name.isidentifier() for name in names):
        raise ValueError(f"entry_point of row {row}: expected a function's name, got {entry!r}.")
    return entry


def _check_python(row: int, name: str, source: Any) -> None:
    try:
        compile(source, f"<{name}>", "exec", ast.PyCF_ONLY_AST)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{name} of row {row}: expected Python, got {type(error).__name__}: {error}."
        ) from error


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


class _Results:
    """Collects outcomes and turns them into rewards."""

    def __init__(
        self, works: list[_Work], every: bool, compare: Callable[[Any, Any], bool]
    ) -> None:
        self.works, self.every, self.compare = works, every, compare
        self.passed: dict[int, int] = {}
        self.total: dict[int, int] = {}
        self.unjudged: dict[int, str] = {}
        self.statuses: dict[str, int] = {}
        for work in works:
            self.passed[work.row] = 0
            self.total[work.row] = self.total.get(work.row, 0) + len(work.expected)
        self.failed: set[int] = set()

    def wanted(self, index: int) -> bool:
        """Whether a program can still change its row's reward."""
        return not (self.every and self.works[index].row in self.failed)

    def add(self, index: int, outcome: Outcome) -> None:
        work = self.works[index]
        status = outcome.status
        passed = self._passed(work, outcome) if outcome.judged else None
        if passed is None:
            status = "unjudged"
            detail = outcome.detail or outcome.replies[-1][1:].decode("utf-8", "replace")
            self.unjudged[work.row] = detail
        else:
            self.passed[work.row] += passed
            if passed < len(work.expected):
                self.failed.add(work.row)
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def _passed(self, work: _Work, outcome: Outcome) -> int | None:
        """How many of its tests a program passed; None when its test body cannot judge it."""
        kind = work.program.kind
        if kind == "program":
            done = outcome.status == "done"
            return int(done and _lines(outcome.stdout.decode("utf-8", "replace")) in work.expected)
        if kind == "test":
            verdict = outcome.replies[-1] if outcome.replies and outcome.status == "done" else b""
            return None if verdict[:1] == b"!" else int(verdict == b"p")
        # started, defined, and then an answer to each call; more of them than calls is no answer
        answers = outcome.replies[2 : 2 + len(work.expected)]
        return sum(map(self._right, answers, work.expected))

    def _right(self, answer: bytes, expected: Any) -> bool:
        try:
            return answer[:1] == b"v" and self.compare(read(answer[1:]), expected)
        except NotPlain:
            return False

    def rewards(self, size: int) -> list[float | None]:
        rewards: list[float | None] = [None] * size
        for row, total in self.total.items():
            # a test that failed for certain decides "all", whatever could not be judged
            if self.every and row in self.failed:
                rewards[row] = 0.0
            elif row not in self.unjudged:
                share = self.passed[row] / total
                rewards[row] = float(share == 1) if self.every else share
        return rewards

    def report(self, log_metric: Callable[[str, float], None] | None) -> None:
        if self.unjudged:
            row, why = next(iter(self.unjudged.items()))
            _warn_unjudged(why, row)
        if log_metric is not None and self.works:
            for status in ("cpu", "wall", "output", "threads", "crashed", "unjudged"):
                log_metric(f"code/{status}", self.statuses.get(status, 0) / len(self.works))


@functools.cache
def _warned(why: str) -> list[bool]:
    return [False]


def _warn_unjudged(why: str, row: int) -> None:
    said = _warned(why)
    if not said[0]:
        said[0] = True
        logger.warning(
            "rule:code could not judge some completions (first: %d): %s. They get None. This is "
            "said once.",
            row,
            why,
        )


class _Progress:
    """A line on a terminal, a callback, or nothing."""

    def __init__(self, wish: bool | Callable[[int, int], None] | None, total: int) -> None:
        self.total, self.done = total, 0
        self.callback = wish if callable(wish) else None
        if wish is None:
            wish = total >= _PROGRESS and sys.stderr.isatty()
        self.shown = wish is True

    def __enter__(self) -> _Progress:
        if self.shown:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(stderr=True)
            self.line = Progress(console=console, transient=console.is_terminal)
            self.line.start()
            self.task = self.line.add_task("programs", total=self.total)
        return self

    def advance(self) -> None:
        self.done += 1
        if self.callback is not None:
            self.callback(self.done, self.total)
        if self.shown:
            self.line.advance(self.task)

    def __exit__(self, *error: object) -> None:
        if self.shown:
            self.line.stop()
