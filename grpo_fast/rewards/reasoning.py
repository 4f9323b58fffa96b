"""reasoning-gym: procedural tasks as datasets, each with the scorer it was published with."""

from __future__ import annotations

import difflib
import functools
import json
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grpo_fast.checks import fail

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# JSON has neither tuples nor keys other than strings, and some scorers tell them apart
_TUPLE, _ITEMS = "__tuple__", "__items__"
# questions drawn at most for each one kept: a task with fewer different questions is refused
_DRAWS = 20


def reasoning_gym_dataset(
    task: str,
    size: int,
    seed: int = 0,
    formatter: Callable[[dict[str, Any]], str | list[dict[str, str]]] | None = None,
    **config: Any,
) -> Dataset:
    """`size` different questions of a reasoning-gym task.

    All questions differ, so that any split of the rows is a clean one. Held-out questions must come
    from such a split: the task's datasets of neighbouring seeds share most of their questions.

    Args:
        task: name of the task, such as "chain_sum".
        size: questions.
        seed: the same seed gives the same rows.
        formatter: entry -> prompt, a string or a list of messages; None asks the question as one
            user message. The entry has at least `question`, `answer` and `metadata`.
        config: fields of the task's own configuration.

    Returns:
        Dataset with the columns `prompt` and `entry` (JSON, see `encode_entry`).

    Raises:
        ValueError: for an unknown task or field, a value that it refuses, or too few questions.
    """
    from datasets import Dataset

    if size < 1:
        fail("size", "an integer >= 1", size)
    draws = _DRAWS * size
    source = _create(task, size=draws, seed=seed, **config)
    formatter = formatter or _as_message
    rows: dict[str, dict[str, Any]] = {}
    for index in range(draws):
        entry = source[index]
        if entry["question"] not in rows:
            rows[entry["question"]] = {"prompt": formatter(entry), "entry": encode_entry(entry)}
        if len(rows) == size:
            return Dataset.from_list(list(rows.values()))
    got = f"{len(rows)} in {draws} draws"
    fail("size", f"{size} different questions of {task!r} with these settings", got)


def reasoning_gym_reward(task: str, **config: Any) -> Callable[..., list[float | None]]:
    """A reward function named after the task: its own `score_answer` on each completion.

    It reads the dataset column `entry`. A completion is stripped of white space at both ends; of a
    conversation the last message counts. An answer on which the scorer raises is unscorable (None),
    and the share of these is logged as `<task>/unscorable`. Scorers run here without a time limit.

    Args:
        task: name of the task, such as "chain_sum".
        config: fields of the task's own configuration, for the scorers that read it.

    Raises:
        ValueError: for an unknown task or field.
    """
    scorer = _create(task, **config)

    def score(
        completions: list[Any],
        entry: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        pairs = zip(texts, entry, strict=True)
        scores = [_score(scorer, task, text.strip(), row) for text, row in pairs]
        unscorable = sum(value is None for value in scores)
        if unscorable and log_metric is not None:
            log_metric(f"{task}/unscorable", unscorable / len(scores))
        return scores

    score.__name__ = task
    return score


def encode_entry(entry: dict[str, Any]) -> str:
    """JSON of an entry; `decode_entry` restores its tuples and integer keys too."""
    return json.dumps(_plain(entry))


def decode_entry(text: str) -> dict[str, Any]:
    """The entry of `encode_entry`; plain JSON of an entry is read as it is.

    Raises:
        ValueError: for text that is not the JSON of an entry with a question.
    """
    entry = json.loads(text, object_hook=_restore)
    if not isinstance(entry, dict) or "question" not in entry:
        fail("entry", "the JSON of a reasoning-gym entry", repr(text[:80]))
    return entry


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
        return {_ITEMS: [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(item) for item in value]}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _restore(value: dict[str, Any]) -> Any:
    if value.keys() == {_TUPLE}:
        return tuple(value[_TUPLE])
    return dict(value[_ITEMS]) if value.keys() == {_ITEMS} else value


def _as_message(entry: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": entry["question"]}]


def _create(task: str, **config: Any) -> Any:
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"reasoning_gym:{task} needs the reasoning-gym package: pip install 'grpo-fast[demo]'."
        ) from error
    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see reasoning_gym."
        fail("task", "a task of reasoning_gym", repr(task), hint)
    try:
        return create_dataset(task, **config)
    # a task checks its settings with assertions
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym task {task!r} refuses {config}: {error}") from error


@functools.cache
def _warn_once(task: str, error: str) -> None:
    logger.warning("the scorer of %r raised %s; such completions are unscorable.", task, error)


def _score(scorer: Any, task: str, text: str, entry: str) -> float | None:
    decoded = decode_entry(entry)
    try:
        value = float(scorer.score_answer(text, decoded))
    # some scorers raise on text they cannot parse; that says nothing about the answer's worth
    except Exception as error:
        _warn_once(task, type(error).__name__)
        return None
    return value if math.isfinite(value) else None
