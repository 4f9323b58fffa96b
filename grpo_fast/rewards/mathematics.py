"""rule:math: equal as numbers, else equal as mathematics by math-verify in a killable process."""

from __future__ import annotations

import functools
import importlib.util
import logging
import queue
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .matching import (
    Reward,
    check_share,
    declared,
    gold_of,
    gold_text,
    log_unjudged,
    partial_credit,
)
from .numerals import parse_number
from .text import ANSWER_LIMIT, final_answer, text_of
from .worker import Lost, Worker

logger = logging.getLogger(__name__)

# what would make a computer algebra system compute for ever is not handed to it
_DIGITS = re.compile(r"\d{300}")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*[{(]?\s*-?\d{5}")
_TOWER = re.compile(r"(?:\^|\*\*)[^+=,;]{0,40}?(?:\^|\*\*)[^+=,;]{0,40}?(?:\^|\*\*)")
_FACTORIAL = re.compile(r"\d{5}\s*[)}]?\s*!|!\s*[)}]?\s*!\s*[)}]?\s*!|(?:binom|choose)\D{0,3}\d{5}")
_DEPTH = 40
# a row of dots, dashes or letters is no answer, and math-verify's search is quadratic in it
_ROW = re.compile(r"([^\w\s{}()\[\]])\1{16}|[a-zA-Z]{40}")
# characters of an expression, and at the end of running text in which one is looked for: 1,500
# characters of (x+1)(x+1)... took 1.1 s
_LONGEST = 400
# a decimal of so many places may be a rounded fraction, which only math-verify equates with it
_PLACES = re.compile(r"\.\d{3}")
# words of running text, not names of LaTeX commands
_WORDS = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}")


def math_reward(
    column: str = "answer",
    *,
    tag: str = "answer",
    partial: float = 0.0,
    symbolic: bool = True,
    timeout: float = 3.0,
    workers: int = 1,
) -> Reward:
    r"""r = 1 where the final answer is the gold one as mathematics, `partial`, or 0.

    The final answer is the content of the only `<answer>` pair, else of the last `\boxed{}`, else
    the line after `####`, else the last 400 characters after the reasoning. Two numbers or
    fractions are compared exactly by ourselves. Everything else goes to math-verify (expressions,
    sets, intervals, equations, matrices, units) in a process of its own, which is killed after
    `timeout` CPU seconds for one answer; it uses no signal, so it works in any thread.

    An answer of more than 2,000 characters is wrong, and so is a row of dots. An expression of more
    than 400 characters, with a tower of powers, a number of 300 digits or 40 levels of brackets is
    not handed to a computer algebra system, and is not judged; nor is what takes too long, or a
    gold answer that math-verify cannot read (None each).

    Args:
        column: dataset column with the gold answers; a row without one (None) is not judged.
        tag: name of the tag around the answer.
        partial: credit for a completion whose answer is wrong, where the gold number stands right
            after an equals sign as the result of one of at most 64 steps.
        symbolic: False compares numbers and equal texts alone and needs no package.
        timeout: CPU seconds of math-verify for one answer.
        workers: processes, used in turns.

    Raises:
        ValueError: math-verify is not installed, or a number is out of range.
    """
    check_share("partial", partial)
    if not timeout > 0 or workers < 1:
        raise ValueError(f"timeout, workers: expected > 0, got {timeout!r}, {workers!r}.")
    if symbolic and importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "it needs the package math-verify (pip install 'grpo_fast[math]'); "
            "symbolic=false compares numbers without it."
        )
    equal = _Equality(timeout, workers) if symbolic else _same_texts

    def score(
        completions: Sequence[Any], log_metric: Any = None, **columns: Any
    ) -> list[float | None]:
        texts = [text_of(completion) for completion in completions]
        golds = [_gold_of(gold) for gold in gold_of(columns, column, len(completions))]
        answers = [_answer_of(text, tag) for text in texts]
        decided = [_decide(*pair) for pair in zip(answers, golds, strict=True)]
        open_pairs = {
            (answer, gold)
            for answer, gold, value in zip(answers, golds, decided, strict=True)
            if value is None and gold is not None
        }
        found = equal(open_pairs) if open_pairs else {}
        values: list[float | None] = []
        for text, answer, gold, value in zip(texts, answers, golds, decided, strict=True):
            value = found.get((answer, gold)) if value is None else value
            wrong = value is not None and not value
            credit = partial_credit(text, gold or "", partial) if wrong else 0.0
            values.append(credit or (None if value is None else float(value)))
        log_unjudged("math", values, log_metric)
        return values

    return declared(score, "completions", column)


def _answer_of(text: str, tag: str) -> str | None:
    """The final answer; of a text without any mark of one, its end."""
    answer = final_answer(text, tag)
    if answer is None or len(answer) <= _LONGEST:
        return answer
    if answer == text.rpartition("</think>")[2].strip():
        return answer[-_LONGEST:]
    return answer if len(answer) <= ANSWER_LIMIT else None


def _gold_of(gold: Any) -> str | None:
    """The gold answer; of a solution without any mark of one, its end."""
    text = gold_text(gold)
    return text if text is None else text[-_LONGEST:]


def _decide(answer: str | None, gold: str | None) -> bool | None:
    """Whether an answer is right, as far as that shows without computer algebra."""
    if gold is None:
        return None
    if not answer or _ROW.search(answer):
        return False
    equal = equal_numbers(answer, gold)
    return True if equal is None and answer == gold else equal


def equal_numbers(answer: str, gold: str) -> bool | None:
    """Whether two texts are one number; None where one of them is no plain number.

    None as well for a decimal of three places beside another number: it may be a rounded fraction.
    """
    first, second = parse_number(answer), parse_number(gold)
    if first is None or second is None:
        return None
    if first == second:
        return True
    return None if _PLACES.search(answer) or _PLACES.search(gold) else False


def is_safe(text: str) -> bool:
    """Whether a computer algebra system may see a text; linear in it."""
    if len(text) > _LONGEST or "\0" in text:
        return False
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    unsafe = (_DIGITS, _EXPONENT, _TOWER, _FACTORIAL)
    return deepest <= _DEPTH and not any(pattern.search(text) for pattern in unsafe)


def _same_texts(pairs: set[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
    return {pair: "".join(pair[0].split()) == "".join(pair[1].split()) for pair in pairs}


class _Equality:
    """Equality by math-verify: True, False, or None where it could not be decided."""

    def __init__(self, timeout: float, workers: int) -> None:
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._count = workers
        for _ in range(workers):
            self._free.put(Worker("mathematics", {}, cpu=timeout, memory=4 << 30))
        # a policy repeats its answers, and a group shares its gold one
        self._cached = functools.lru_cache(maxsize=65_536)(self._ask)

    def __call__(self, pairs: set[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
        # sorted: which answers a worker has seen before must not depend on the hash seed
        ordered = sorted(pairs)
        if self._count == 1 or len(ordered) == 1:
            return {pair: self._cached(*pair) for pair in ordered}
        with ThreadPoolExecutor(self._count) as pool:
            return dict(zip(ordered, pool.map(lambda p: self._cached(*p), ordered), strict=True))

    def _ask(self, answer: str, gold: str) -> bool | None:
        if not is_safe(gold):
            _warn_gold(gold)
            return None
        if not is_safe(answer):
            # the policy wrote it: unreadable must not pay better than wrong
            return False
        worker = self._free.get()
        try:
            reply = worker.ask({"answer": _marked(answer), "gold": _marked(gold)})
        except Lost:
            return None
        finally:
            self._free.put(worker)
        if reply.get("why") == "gold":
            _warn_gold(gold)
        return reply.get("value")


def _marked(text: str) -> str:
    """The text with a mark that math-verify looks for; running text is left to its own search."""
    marked = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    if marked or len(_WORDS.findall(text)) > 1:
        return text
    return f"\\boxed{{{text}}}"


@functools.cache
def _warn_gold(gold: str) -> None:
    logger.warning("math: the gold answer %r cannot be read; its rows are not judged.", gold[:80])
