"""Rules about the shape of a completion: its length, repetitions, language, corrections."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from .matching import Reward, declared
from .text import text_of

UNITS = ("tokens", "words", "characters")
# words or characters of a text that are looked at, its end: bounds the work on a megabyte
_WINDOW = 50_000

# ranges of the scripts that languages are written in; Latin with its accents, Han with its
# extension A and the compatibility ideographs
_SCRIPTS = {
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "cyrillic": "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "han": "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ebef",
    "kana": "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9f",
    "hangul": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "arabic": "\u0620-\u064a\u066e-\u06d3\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc",
    "hebrew": "\u05d0-\u05ea\u05ef-\u05f2",
    "devanagari": "\u0900-\u0963\u0970-\u097f",
    "thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
}
_LANGUAGES = {
    **{name: (name,) for name in _SCRIPTS},
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi"), ("latin",)),
    **dict.fromkeys(("ru", "uk", "bg"), ("cyrillic",)),
    "el": ("greek",),
    "zh": ("han",),
    "ja": ("han", "kana"),
    "ko": ("hangul", "han"),
    "ar": ("arabic",),
    "fa": ("arabic",),
    "he": ("hebrew",),
    "hi": ("devanagari",),
    "th": ("thai",),
}
_LETTERS = re.compile(r"[^\W\d_]+")


def _measure(unit: str) -> Callable[[Any, Sequence[int] | None], int]:
    if unit not in UNITS:
        raise ValueError(f"unit: expected one of {', '.join(UNITS)}, got {unit!r}.")
    if unit == "tokens":
        return lambda completion, ids: len(ids or ())
    if unit == "words":
        return lambda completion, ids: len(text_of(completion).split())
    return lambda completion, ids: len(text_of(completion))


def _lengths(
    measure: Callable[..., int], completions: Sequence[Any], ids: Sequence[Any] | None
) -> list[int]:
    return [
        measure(completion, None if ids is None else ids[row])
        for row, completion in enumerate(completions)
    ]


def _check_ids(unit: str, ids: Any) -> None:
    if unit == "tokens" and ids is None:
        raise ValueError("unit: expected completion_ids for tokens, got none; try unit=words.")


def _check_count(name: str, value: Any, low: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}.")


def length_reward(target: int, *, unit: str = "tokens", both: bool = False) -> Reward:
    """r = -min(1, max(0, n - target) / target), n the length of the completion.

    With `both`, |n - target| takes the place of max(0, n - target): too short costs as well.

    Args:
        target: in units.
        unit: tokens, words or characters.
        both: penalise short completions too.

    Raises:
        ValueError: for a target below 1 or an unknown unit.
    """
    _check_count("target", target)
    measure = _measure(unit)

    def score(completions: Sequence[Any], completion_ids: Any = None, **_: Any) -> list[float]:
        _check_ids(unit, completion_ids)
        gaps = [n - target for n in _lengths(measure, completions, completion_ids)]
        gaps = [abs(gap) if both else max(0, gap) for gap in gaps]
        return [-min(1.0, gap / target) for gap in gaps]

    return score


def overlong_reward(max_length: int | None = None, *, cache: int = 64) -> Reward:
    """The soft overlong punishment, n the tokens of the completion and L their limit:

        r = 0                          n <= L - cache
            ((L - cache) - n) / cache  L - cache < n <= L
            -1                         n > L

    With cache = 0 it is 0 up to L and -1 beyond. A completion that is cut at L gets -1 where the
    cache is above 0.
    Source: DAPO: An Open-Source LLM Reinforcement Learning System at Scale (2025), equation 13.

    Args:
        max_length: L; None takes the trainer's `max_completion_length`.
        cache: tokens before the limit in which the punishment grows.

    Raises:
        ValueError: for a number out of range, or no limit.
    """
    if max_length is not None:
        _check_count("max_length", max_length)
    _check_count("cache", cache, 0)
    if max_length is not None and cache > max_length:
        raise ValueError(f"cache: expected at most max_length = {max_length}, got {cache}.")

    def score(
        completion_ids: Sequence[Any], max_completion_length: int | None = None, **_: Any
    ) -> list[float]:
        limit = max_completion_length if max_length is None else max_length
        if limit is None:
            raise ValueError("max_length: expected a number of tokens outside a trainer, got None.")
        return [overlong(len(ids), limit, cache) for ids in completion_ids]

    return score


def overlong(length: int, limit: int, cache: int) -> float:
    """The value of `overlong_reward` for one length."""
    if length > limit:
        return -1.0
    return 0.0 if length <= limit - cache else (limit - cache - length) / cache


def cosine_reward(
    max_length: int | None = None,
    *,
    of: str = "math",
    column: str = "answer",
    unit: str = "tokens",
    right_short: float = 1.0,
    right_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
) -> Reward:
    """Short right answers above long ones, long wrong answers above short ones:

        r = end + (start - end) * (1 + cos(pi * min(n, L) / L)) / 2

    start is the value at length 0 and end the value at L, of right or of wrong answers. Lengths are
    clamped at L, since the cosine turns back there.
    Source: Demystifying Long Chain-of-Thought Reasoning in LLMs (2025).

    Args:
        max_length: L in units; None takes the trainer's `max_completion_length`.
        of: the rule that says what is right: math, number or exact. Not judged there: None.
        column: dataset column with the gold answers.
        unit: tokens, words or characters.
        right_short, right_long: values of a right answer at length 0 and at L.
        wrong_short, wrong_long: values of a wrong answer at length 0 and at L.

    Raises:
        ValueError: for another rule, an unknown unit or a number out of range.
    """
    if max_length is not None:
        _check_count("max_length", max_length)
    if of not in ("math", "number", "exact"):
        raise ValueError(f"of: expected math, number or exact, got {of!r}.")
    if max_length is None and unit != "tokens":
        raise ValueError(f"max_length: expected a number of {unit}, got None.")
    values = (right_short, right_long, wrong_short, wrong_long)
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise ValueError(f"right_short to wrong_long: expected finite numbers, got {values!r}.")
    from .rules import build

    measure, correctness = _measure(unit), build(of, {}, {"column": column})

    def score(
        completions: Sequence[Any],
        completion_ids: Any = None,
        max_completion_length: int | None = None,
        **columns: Any,
    ) -> list[float | None]:
        limit = max_completion_length if max_length is None else max_length
        if limit is None:
            raise ValueError("max_length: expected a number of tokens outside a trainer, got None.")
        _check_ids(unit, completion_ids)
        judged = correctness(completions=completions, **columns)
        out: list[float | None] = []
        for n, right in zip(_lengths(measure, completions, completion_ids), judged, strict=True):
            if right is None:
                out.append(None)
                continue
            start, end = (right_short, right_long) if right == 1 else (wrong_short, wrong_long)
            share = (1 + math.cos(math.pi * min(n, limit) / limit)) / 2
            out.append(end + (start - end) * share)
        return out

    optional = ("completion_ids", "max_completion_length", "log_metric")
    return declared(score, "completions", column, optional=optional)


def repetition_reward(ngram: int = 3, *, penalty: float = 1.0, unit: str = "words") -> Reward:
    """r = -penalty * (1 - distinct n-grams / n-grams); 0 for a text of fewer than n pieces.

    Of a text of more than 50,000 pieces the last ones count.
    Source: the repetition penalty of Demystifying Long Chain-of-Thought Reasoning in LLMs (2025),
    for a completion as a whole.

    Args:
        ngram: n.
        penalty: largest size of the punishment.
        unit: words (at white space, case-folded) or characters, for languages without spaces.

    Raises:
        ValueError: for a number out of range or an unknown unit.
    """
    _check_count("ngram", ngram)
    if not isinstance(penalty, (int, float)) or not 0 <= penalty < math.inf:
        raise ValueError(f"penalty: expected a number >= 0, got {penalty!r}.")
    if unit not in UNITS[1:]:
        raise ValueError(f"unit: expected words or characters, got {unit!r}.")

    def one(text: str) -> float:
        # words of eight characters at most, on average
        text = text[-8 * _WINDOW :]
        pieces: Sequence[str] = text if unit == "characters" else text.casefold().split()
        pieces = pieces[-_WINDOW:]
        count = len(pieces) - ngram + 1
        if count < 1:
            return 0.0
        distinct = len(set(zip(*(islice(pieces, k, None) for k in range(ngram)), strict=False)))
        return -penalty * (1 - distinct / count)

    def score(completions: Sequence[Any], **_: Any) -> list[float]:
        return [one(text_of(completion)) for completion in completions]

    return score


def language_reward(language: str | None = None, *, column: str = "language") -> Reward:
    """r = letters of the language's scripts / all letters; 0 for a text without letters.

    A language is known by its script alone: this tells Chinese or Russian from English, not German
    from English. Latin letters of formulas and code count as Latin. The last 50,000 characters
    are looked at.
    Source: the language consistency reward of DeepSeek-R1: Incentivizing Reasoning Capability in
    LLMs via Reinforcement Learning (2025), which takes the share of words.

    Args:
        language: code (en, zh, ja, ...) or script (latin, han, ...); None reads the column.
        column: dataset column with the language of each row; a row without one is not judged.

    Raises:
        ValueError: for an unknown language.
    """
    if language is not None:
        _script(language)

    def score(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if language is None and column not in columns:
            raise ValueError(f"language: expected one, or a dataset column {column!r}, got none.")
        wanted = columns[column] if language is None else [language] * len(completions)
        return [
            _share(text_of(completion), which)
            for completion, which in zip(completions, wanted, strict=True)
        ]

    return declared(score, "completions", *([column] if language is None else []))


def _share(text: str, language: Any) -> float | None:
    if not isinstance(language, str):
        return None
    letters = "".join(_LETTERS.findall(text[-_WINDOW:]))
    if not letters:
        return 0.0
    return 1.0 - len(_script(language).sub("", letters)) / len(letters)


def _script(language: str) -> re.Pattern[str]:
    if language not in _LANGUAGES:
        raise ValueError(f"language: expected one of {', '.join(_LANGUAGES)}, got {language!r}.")
    return re.compile("[" + "".join(_SCRIPTS[name] for name in _LANGUAGES[language]) + "]+")


_MARKERS = (
    "wait,",
    "wait.",
    "hmm",
    "let me check",
    "let me re-check",
    "let me recheck",
    "let me reconsider",
    "let me double-check",
    "let me verify",
    "that's not right",
    "that is not right",
    "that's wrong",
    "that is wrong",
    "i made a mistake",
    "i made an error",
    "on second thought",
    "actually, no",
    "correction:",
    "going back",
)


def self_correction_reward(
    *, reward: bool = False, markers: tuple[str, ...] | None = None
) -> Reward:
    """A measure: how many completions stop and correct themselves.

    A completion counts when one of the markers stands in it, before its end. The share is logged as
    `self_correction/share`. The function returns None for every completion, so that nothing is
    trained on it: a word that is paid for is soon in every answer. With `reward` it returns 1 or 0.

    Args:
        reward: return 1 where a completion counts and 0 elsewhere.
        markers: phrases; None takes a list of ours, such as "let me check".

    Raises:
        ValueError: for no markers.
    """
    chosen = _MARKERS if markers is None else markers
    phrases = tuple(marker.lower() for marker in chosen if marker.strip())
    if not phrases:
        raise ValueError(f"markers: expected phrases, got {markers!r}.")

    def score(completions: Sequence[Any], log_metric: Any = None, **_: Any) -> list[float | None]:
        texts = [text_of(completion)[-4 * _WINDOW :].lower().rstrip() for completion in completions]
        found = [
            any(0 <= text.find(phrase) < len(text) - len(phrase) for phrase in phrases)
            for text in texts
        ]
        if log_metric is not None and found:
            log_metric("self_correction/share", sum(found) / len(found))
        return [float(value) if reward else None for value in found]

    return score
