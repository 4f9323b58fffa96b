"""Rules that compare texts: the form of a completion, equal answers, equal numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from .numerals import last_number, parse_number, results_in
from .text import ANSWER_LIMIT, final_answer, sections, text_of
from .worker import Lost, Worker

Reward = Callable[..., list[float | None]]

# results of steps that `partial` looks at: a text that lists more is fishing for one of them
RESULTS = 64


def format_reward(
    tags: tuple[str, ...] = ("think", "answer"),
    *,
    begun: bool = False,
    pattern: str | None = None,
    timeout: float = 0.1,
) -> Reward:
    """r = 1 where the completion has the form, else 0.

    The form is `<think>...</think> <answer>...</answer>`: every tag opens and closes exactly once,
    in order, not nested; around them is white space alone, and the last content is not empty. With
    a single tag the answer is the text after it. The scanner is linear in the text.

    With a `pattern` the completion has to match it as a whole (`re.fullmatch`, `re.DOTALL`), and
    tags do not count. It runs in a process that is killed after `timeout` CPU seconds, since a
    pattern can take exponential time; such a completion is not judged (None).

    Args:
        tags: names of the tags, in order.
        begun: the prompt ends with the first opening tag, so that the completion has only its end.
        pattern: a regular expression instead of the tags.
        timeout: CPU seconds of the pattern on one completion.

    Raises:
        ValueError: for no tags, a tag that is no name, or a pattern that is no expression.
    """
    if pattern is not None:
        return _pattern_reward(pattern, timeout)
    names = [tag for tag in tags if re.fullmatch(r"[\w-]+", tag)]
    if not names or len(set(names)) < len(tags):
        raise ValueError(f"tags: expected different names such as think,answer, got {tags!r}.")

    def score(completions: Sequence[Any], **_: Any) -> list[float | None]:
        parts = (sections(text_of(completion), tags, begun) for completion in completions)
        return [float(found is not None and bool(found[-1].strip())) for found in parts]

    return score


def _pattern_reward(pattern: str, timeout: float) -> Reward:
    try:
        re.compile(pattern, re.DOTALL)
    # a pattern of enormous repeats overflows or exhausts the compiler
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"pattern: expected a regular expression, got {error}.") from error
    worker = Worker("regex", {"pattern": pattern}, cpu=timeout, memory=1 << 30)

    def score(completions: Sequence[Any], log_metric: Any = None, **_: Any) -> list[float | None]:
        values = [_matches(worker, text_of(completion)) for completion in completions]
        log_unjudged("format", values, log_metric)
        return values

    return score


def _matches(worker: Worker, text: str) -> float | None:
    try:
        answer = worker.ask({"text": text})
    except Lost:
        return None
    return None if "error" in answer else float(answer["value"])


def log_unjudged(name: str, values: Sequence[float | None], log_metric: Any) -> None:
    """Log the share of completions that could not be judged, where there are any."""
    missing = sum(value is None for value in values)
    if missing and log_metric is not None:
        log_metric(f"{name}/unjudged", missing / len(values))


def declared(
    function: Reward, *required: str, optional: tuple[str, ...] = ("log_metric",)
) -> Reward:
    """The function with a signature that says which keywords it reads.

    A column that is missing is then known before a run begins, and others are not copied for it.
    """
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind) for name in required]
    parameters += [inspect.Parameter(name, kind, default=None) for name in optional]
    function.__signature__ = inspect.Signature(parameters)
    return function


def gold_of(columns: dict[str, Any], column: str, size: int) -> Sequence[Any]:
    """The gold answers of a batch.

    Raises:
        ValueError: when the dataset has no such column.
    """
    if column not in columns:
        given = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"column: expected a dataset column {column!r}, got {given}.")
    return columns[column]


def gold_text(gold: Any) -> str | None:
    """A gold answer as text: a number, a text, or a worked solution whose final answer counts."""
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        return None
    return final_answer(gold) if isinstance(gold, str) else repr(gold)


def exact_reward(
    column: str = "answer", *, tag: str = "answer", ignore_case: bool = False
) -> Reward:
    """r = 1 where the final answer is the gold one as text, else 0.

    Runs of white space count as one space. The final answer is the content of the only `<answer>`
    pair, else of the last box, else the whole text after the reasoning.

    Args:
        column: dataset column with the gold answers; a row without one (None) is not judged.
        tag: name of the tag around the answer.
        ignore_case: compare case-folded.
    """

    def normal(text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if ignore_case else text

    def score(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        values: list[float | None] = []
        for completion, gold in zip(
            completions, gold_of(columns, column, len(completions)), strict=True
        ):
            right, answer = gold_text(gold), final_answer(text_of(completion), tag)
            if right is None:
                values.append(None)
            else:
                values.append(float(answer is not None and normal(answer) == normal(right)))
        return values

    return declared(score, "completions", column)


def number_reward(
    column: str = "answer", *, tag: str = "answer", tolerance: float = 0.0, partial: float = 0.0
) -> Reward:
    """r = 1 where the last number of the final answer equals that of the gold answer.

        |x - gold| <= tolerance |gold|

    in exact fractions. Otherwise r = `partial` where the gold number is the result of a step: it
    stands right after an equals sign somewhere in the completion, which has at most 64 such
    results. A right result that was not given as the answer is what this pays for; that the steps
    are right it cannot know. Otherwise r = 0.

    Args:
        column: dataset column with the gold answers: numbers, texts, or solutions that end in
            `#### 72`. A row without a number is not judged (None).
        tag: name of the tag around the answer.
        tolerance: relative.
        partial: 0.5 is the usual partial credit.

    Raises:
        ValueError: for a number out of range.
    """
    check_share("partial", partial)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a number in [0, 1), got {tolerance!r}.")

    def score(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        values: list[float | None] = []
        for completion, gold in zip(
            completions, gold_of(columns, column, len(completions)), strict=True
        ):
            text = text_of(completion)
            right = gold_text(gold)
            target = None if right is None else _number_of(right)
            answer = final_answer(text, tag)
            if target is None:
                values.append(None)
                continue
            value = None if answer is None else _number_of(answer)
            if value is not None and abs(value - target) <= tolerance * abs(target):
                values.append(1.0)
            else:
                values.append(partial if partial and target in results_in(text, RESULTS) else 0.0)
        return values

    return declared(score, "completions", column)


def _number_of(text: str) -> Any:
    whole = parse_number(text[:ANSWER_LIMIT])
    return last_number(text) if whole is None else whole


def partial_credit(text: str, gold: str, partial: float) -> float:
    """`partial` where the number `gold` is the result of a step of the text, else 0."""
    target = parse_number(gold)
    if not partial or target is None:
        return 0.0
    return partial if target in results_in(text, RESULTS) else 0.0


def check_share(name: str, value: Any) -> None:
    """A number in [0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}.")
