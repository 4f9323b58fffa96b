"""Preferences: rows of people's or a judge's choices -> ranked sets, split by prompt."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast.checks import fail

COLUMNS = "prompt, chosen, rejected[, margin] or prompt, completions, ranks | scores[, margin]"


@dataclass(frozen=True)
class RankedSet:
    """One prompt and K >= 2 answers.

    Args:
        prompt: text, or messages.
        completions: K texts, or K lists of messages, as the prompt is.
        ratings: K numbers, higher is better; equal ones are no pair.
        margin: how far apart the scores of each ordered pair should be.
    """

    prompt: Any
    completions: list[Any]
    ratings: list[float]
    margin: float = 0.0

    @property
    def pairs(self) -> int:
        """Ordered pairs: answers of which one is rated above the other."""
        ratings = self.ratings
        return sum(a > b for a in ratings for b in ratings)


def ranked_sets(name: str, rows: Any, drop_ties: bool = False) -> tuple[list[RankedSet], int]:
    """The rows of a dataset as sets, and how many of them say nothing.

    Args:
        name: what a message calls the dataset.
        rows: dicts with the columns of `COLUMNS`; a rank of 1 is the best, a score is better when
            it is higher. `chosen` and `rejected` may be whole conversations without `prompt`.
        drop_ties: leave out rows without a preference, which are refused otherwise.

    Raises:
        ValueError: naming the row: other columns, one answer only, no preference, a rank or score
            that is no number, answers of another kind than the prompt.
    """
    sets, dropped = [], 0
    for index in range(len(rows)):
        one = _set_of(f"{name}[{index}]", dict(rows[index]))
        if one.pairs:
            sets.append(one)
            continue
        dropped += 1
        if not drop_ties:
            hint = "all answers are rated alike; drop_ties=True leaves such rows out and counts"
            fail(f"{name}[{index}]", "a preference among its answers", one.ratings, hint)
    if not sets:
        got = f"none in {len(rows)} rows" if len(rows) else "no rows"
        fail(name, "at least one row with a preference", got)
    return sets, dropped


def _set_of(name: str, row: dict[str, Any]) -> RankedSet:
    given = {key for key, value in row.items() if value is not None}
    margin = row["margin"] if "margin" in given else 0.0
    if not _finite(margin):
        fail(f"{name}.margin", "a finite number", repr(margin))
    if {"chosen", "rejected"} <= given:
        prompt, answers = _pair_of(name, row, given)
        ratings = [1.0, 0.0]
    elif {"prompt", "completions"} <= given and len({"ranks", "scores"} & given) == 1:
        prompt, answers = row["prompt"], row["completions"]
        kind = "ranks" if "ranks" in given else "scores"
        ratings = row[kind]
        if not isinstance(answers, (list, tuple)) or not isinstance(ratings, (list, tuple)):
            fail(name, f"lists of completions and {kind}", f"{type(answers).__name__}")
        if len(ratings) != len(answers):
            fail(f"{name}.{kind}", f"{len(answers)}, one for each completion", len(ratings))
        bad = [value for value in ratings if not _finite(value)]
        if bad:
            fail(f"{name}.{kind}", "finite numbers", repr(bad[0]))
        ratings = [-float(v) if kind == "ranks" else float(v) for v in ratings]
    else:
        fail(name, f"the columns {COLUMNS}", ", ".join(sorted(given)) or "none")
    if len(answers) < 2:
        fail(f"{name}.completions", "at least two completions to choose among", len(answers))
    _check_kinds(name, prompt, answers)
    return RankedSet(prompt, list(answers), ratings, float(margin))


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _pair_of(name: str, row: dict[str, Any], given: set[str]) -> tuple[Any, list[Any]]:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in given:
        return row["prompt"], [chosen, rejected]
    if isinstance(chosen, str) or isinstance(rejected, str):
        hint = "rows are split by prompt; only messages may hold it inside"
        fail(name, "a column 'prompt' beside texts", "none", hint)
    shared = 0
    limit = min(len(chosen), len(rejected)) - 1
    while shared < limit and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        fail(name, "conversations that begin alike, with the prompt", "none that do")
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _check_kinds(name: str, prompt: Any, answers: list[Any]) -> None:
    kind = str if isinstance(prompt, str) else (list, tuple)
    word = "text" if kind is str else "messages"
    if not isinstance(prompt, (str, list, tuple)) or (kind is not str and not prompt):
        fail(f"{name}.prompt", "a text or a list of messages", type(prompt).__name__)
    for value in answers:
        if not isinstance(value, kind):
            got = f"{type(value).__name__} {value!r:.60}"
            fail(f"{name}.completions", f"{word}, as the prompt is", got)


def load_preferences(path: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file.

    Raises:
        ValueError: another ending, no such file, a line that is no JSON object.
    """
    file = Path(path)
    if file.suffix not in (".jsonl", ".parquet"):
        fail("dataset", "a .jsonl or .parquet file", repr(path))
    if not file.is_file():
        fail("dataset", "a file", f"{path!r}, where there is none")
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pylist()
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            fail("dataset", "one JSON object in each line", f"line {number} of {path} ({error})")
        if not isinstance(row, dict):
            fail("dataset", "one JSON object in each line", f"{row!r:.40} in line {number}")
        rows.append(row)
    return rows


def key_of(prompt: Any) -> str:
    """A short hash of a prompt, the same for equal ones."""
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_by_prompt(rows: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(to train on, held out): rows of one prompt are never in both.

    Args:
        rows: dicts or `RankedSet`s.
        share: of the prompts that are held out, at least one prompt where it is above 0.
        seed: with the prompts alone it decides, not the order of the rows.

    Raises:
        ValueError: no prompt is left to train on.
    """
    keys = [key_of(_prompt(row)) for row in rows]
    prompts = sorted(set(keys))
    random.Random(f"{seed}:held out").shuffle(prompts)
    count = min(max(1, round(share * len(prompts))), len(prompts)) if share > 0 else 0
    if count == len(prompts):
        fail("validation_split", "a share that leaves prompts to train on", share)
    out = set(prompts[:count])
    kept = [row for row, key in zip(rows, keys, strict=True) if key not in out]
    return kept, [row for row, key in zip(rows, keys, strict=True) if key in out]


def _prompt(row: Any) -> Any:
    if isinstance(row, RankedSet):
        return row.prompt
    if row.get("prompt") is not None:
        return row["prompt"]
    return _set_of("dataset", dict(row)).prompt


def matrices(sets: list[RankedSet], scale: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Places (M, K) of each set's answers in one list, ratings (M, K), margins (M, K, K).

    Behind the last answer of a shorter set stand place 0 and a rating of NaN.

    Args:
        scale: margin_ij = margin of the set + scale * (rating_i - rating_j).
    """
    width = max(len(one.completions) for one in sets)
    places = torch.zeros((len(sets), width), dtype=torch.int64)
    ratings = torch.full((len(sets), width), math.nan)
    start = 0
    for row, one in enumerate(sets):
        size = len(one.completions)
        places[row, :size] = torch.arange(start, start + size)
        ratings[row, :size] = torch.tensor(one.ratings)
        start += size
    margin = torch.tensor([one.margin for one in sets])[:, None, None]
    gaps = torch.nan_to_num(ratings[:, :, None] - ratings[:, None, :])
    return places, ratings, margin + scale * gaps
