"""Labels of collected completions: by a judge that can be called, or by people, through a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from grpo_fast.checks import fail
from grpo_fast.rewards import RewardSet, weighted

from .preferences import RankedSet
from .record import completion_of

TO_LABEL, LABELS = "to_label.jsonl", "labels.jsonl"


class LabelsNeeded(Exception):
    """A run that waits for people: it goes on when the file of labels is there.

    Args:
        questions: the file to read.
        labels: the file to write.
        count: completions to label.
    """

    def __init__(self, questions: Path, labels: Path, count: int) -> None:
        self.questions, self.labels, self.count = questions, labels, count
        super().__init__(
            f"{count} completions wait for labels: give each line of {questions} a number as "
            f"'score' (higher is better, null where it cannot be judged), write them to {labels}, "
            "and run the same command again."
        )


def judged(judge: RewardSet, rows: list[dict[str, Any]]) -> list[list[float | None]]:
    """The judge's score of each completion of each row; None where it gives none.

    Args:
        rows: with `prompt`, `completions` (texts), `completion_ids` and `columns`.

    Raises:
        ValueError: as the judge's functions do; it scores nothing at all.
    """
    prompts, texts, ids = [], [], []
    columns: dict[str, list[Any]] = {name: [] for name in rows[0]["columns"]}
    for row in rows:
        for text, tokens in zip(row["completions"], row["completion_ids"], strict=True):
            prompts.append(row["prompt"])
            texts.append(completion_of(row["prompt"], text))
            ids.append(tokens)
            for name, values in columns.items():
                values.append(row["columns"][name])
    scores = judge.score(prompts, texts, ids, columns)
    total = weighted(scores, judge.weights)
    flat = [None if math.isnan(value) else value for value in total.tolist()]
    if all(value is None for value in flat):
        fail("judge", "a number for some completion", f"None for all {len(flat)}")
    out, start = [], 0
    for row in rows:
        out.append(flat[start : start + len(row["completions"])])
        start += len(row["completions"])
    return out


def identifiers(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A name for each completion of each row."""
    return [[f"{row['id']}-{i}" for i in range(len(row["completions"]))] for row in rows]


def export(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that people label."""
    lines = []
    for row, names in zip(rows, identifiers(rows), strict=True):
        for name, text in zip(names, row["completions"], strict=True):
            lines.append({"id": name, "prompt": row["prompt"], "completion": text, "score": None})
    return lines


def read_labels(path: Path, rows: list[dict[str, Any]]) -> list[list[float | None]]:
    """The scores in a file that people filled in.

    Raises:
        ValueError: naming the line or the ids: no JSON, missing, foreign or repeated ids, a score
            that is no number, no score at all.
    """
    wanted = identifiers(rows)
    known = {name for names in wanted for name in names}
    found: dict[str, float | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            entry = json.loads(line)
            name, score = entry["id"], entry["score"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            fail(
                "labels", "a JSON object with 'id' and 'score'", f"{line:.60} in {where} ({error})"
            )
        if name not in known:
            fail("labels", f"ids of {TO_LABEL}", f"{name!r}, which is foreign, in {where}")
        if name in found:
            fail("labels", "each id once", f"{name!r} again in {where}")
        number_given = isinstance(score, (int, float)) and not isinstance(score, bool)
        if score is not None and not (number_given and math.isfinite(score)):
            fail("labels", "a finite number or null as score", f"{score!r} in {where}")
        found[name] = None if score is None else float(score)
    missing = sorted(known - found.keys())
    if missing:
        got = f"none for {len(missing)} of {len(known)}, such as {missing[0]!r}, in {path}"
        fail("labels", f"a line for every id of {TO_LABEL}", got)
    if all(score is None for score in found.values()):
        fail("labels", "a number for some completion", f"null in every line of {path}")
    return [[found[name] for name in names] for names in wanted]


def sets_of_labels(
    rows: list[dict[str, Any]], scores: list[list[float | None]]
) -> tuple[list[RankedSet], int]:
    """The rows with a preference as ranked sets, and how many rows have none.

    A completion without a score is in no set.
    """
    sets = []
    for row, values in zip(rows, scores, strict=True):
        kept = [i for i, value in enumerate(values) if value is not None]
        answers = [completion_of(row["prompt"], row["completions"][i]) for i in kept]
        one = RankedSet(row["prompt"], answers, [values[i] for i in kept])
        if one.pairs:
            sets.append(one)
    return sets, len(rows) - len(sets)
