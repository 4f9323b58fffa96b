"""Result files of `pytest benchmarks --benchmark-json=FILE`, checked; who won each case."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "grpo_fast"
# A whole optimizer step is counted in tokens per second, of which contestants may see unequal
# numbers; the other levels give all of them the same tensors.
STEP = "step"
# How much fits in a given memory; compared by that and not by time.
FIT = "fit"
# What every record has, and what every record has that was compared with float64.
ALWAYS = ("level", "case", "peer", "tokens")
COMPARED = ("pass", "error", "exact", "peak_bytes", "floor_flops", "floor_bytes")
COMPARED_LEVELS = ("linear", "logits", "logprob")
# Questions of level fit, with what each answer has besides `fits`, positions or parameters.
QUESTIONS = {
    "longest context": ("verified", "fixed_bytes", "bytes_per_position", "points"),
    "largest model": ("model", "how", "need_bytes"),
}
MACHINE = ("device", "device_name", "driver", "threads", "versions")
# Fields of a case in the order in which they are named; what is at its default is not.
DEFAULTS = {
    "lengths": "full",
    "active": 1.0,
    "trainable": True,
    "old": False,
    "beta": 0.0,
    "num_iterations": 1,
}


@dataclass(frozen=True)
class Record:
    """What one contestant did on one case."""

    level: str
    direction: str
    """forward or forward+backward; empty where a level has but one way."""
    case: dict[str, Any]
    peer: str
    tokens: int
    """Unmasked tokens; at level fit those of one of the runs."""
    median: float
    """Seconds, as are all times."""
    iqr: float
    rounds: int
    info: dict[str, Any]
    """extra_info as it stands in the file: errors, bytes, FLOPs, versions."""

    @property
    def exact(self) -> bool:
        """Within the gate, or of a level that has none."""
        return self.info.get("exact") is not False

    @property
    def error(self) -> dict[str, float]:
        """Relative L2 distance from float64 by the name of what was compared.

        At level step, which has no float64 truth: what the contestants differ by from each other.
        """
        return self.info.get("error") or {}

    @property
    def peak(self) -> int | None:
        """Bytes above inputs and gradients."""
        return self.info.get("peak_bytes")

    @property
    def cost(self) -> float:
        """What is compared: seconds, for a whole step per token; of what fits the inverse."""
        if self.level == FIT:
            return 1 / self.info["fits"] if self.info["fits"] else math.inf
        return self.median / self.tokens if self.level == STEP else self.median


@dataclass(frozen=True)
class Contest:
    """The contestants of one level, pass and case, fastest first and inexact ones last."""

    level: str
    direction: str
    case: dict[str, Any]
    records: tuple[Record, ...]

    @property
    def ours(self) -> Record | None:
        return next((r for r in self.records if r.peer == OURS), None)

    @property
    def rivals(self) -> list[Record]:
        """The others whose result is right: nobody else can win or be beaten."""
        return [r for r in self.records if not r.peer.startswith(OURS) and r.exact]

    @property
    def lost(self) -> bool:
        """Whether someone with a right result is faster, or ours is not right."""
        if self.ours is None:
            return False
        if self.level == STEP and not self.ours.exact:
            # they differ from each other, which does not say who is right
            return False
        return not self.ours.exact or any(r.cost < self.ours.cost for r in self.rivals)

    @property
    def won(self) -> bool:
        """Whether there was someone to beat, and ours beat all of them with a right result."""
        if self.ours is None or not self.ours.exact or self.lost:
            return False
        return bool(self.rivals) and all(r.cost > self.ours.cost for r in self.rivals)

    @property
    def smaller(self) -> Record | None:
        """The rival with the least memory, where that is less than ours."""
        if self.ours is None or self.ours.peak is None:
            return None
        known = [r for r in self.rivals if r.peak is not None]
        least = min(known, key=lambda r: r.peak, default=None)
        return least if least is not None and least.peak < self.ours.peak else None

    def ratio(self, record: Record) -> float | None:
        """A contestant's time over ours: above 1 it is slower than grpo_fast."""
        return None if self.ours is None else record.cost / self.ours.cost


@dataclass(frozen=True)
class Result:
    """One result file: one machine, one commit, one date."""

    path: Path
    machine: dict[str, Any]
    commit: str
    dirty: bool
    date: str
    """ISO 8601, UTC."""
    sources: str | None
    contests: tuple[Contest, ...]
    """Of the levels that are timed."""
    fits: tuple[Contest, ...]
    """Of level fit."""
    skipped: tuple[dict[str, Any], ...]

    @property
    def peers(self) -> list[str]:
        """Contestants in order of appearance, ours first."""
        names = dict.fromkeys(r.peer for c in self.contests + self.fits for r in c.records)
        return sorted(names, key=lambda name: (name != OURS, name))

    def share(self, record: Record) -> float | None:
        """Floor over time over the machine's own ceiling: 1 is as fast as it gets here.

        From logits the floor is traffic and the ceiling a copy, else FLOPs of the lm_head and a
        matrix product in the dtype of the case.
        """
        if record.level == "logits":
            ceiling = self.machine.get("copy_bytes_per_s")
        else:
            ceiling = (self.machine.get("gemm_flops") or {}).get(record.case.get("dtype"))
        floor = floor_of(record)
        return floor / record.median / ceiling if floor and ceiling else None


def floor_of(record: Record) -> float | None:
    """Bytes (from logits) or FLOPs (else) without which there is no such result."""
    return record.info.get("floor_bytes" if record.level == "logits" else "floor_flops") or None


def positions(case: dict[str, Any]) -> int | None:
    """Completion positions N = B T, masked ones included."""
    return case["B"] * case["T"] if "B" in case and "T" in case else None


def head(case: dict[str, Any]) -> str:
    """Everything of a case but its name and N, in words."""
    parts = [f"{key} {case[key]}" for key in ("H", "V") if key in case]
    parts += [case["dtype"]] if "dtype" in case else []
    changed = {k: case[k] for k, v in DEFAULTS.items() if k in case and case[k] != v}
    words = {"trainable": "frozen head", "old": "old log-probs"}
    parts += [words.get(k) or f"{k} {v}" for k, v in changed.items()]
    parts += [f"prompts of {case['prompt']} tokens"] if "prompt" in case else []
    parts += [f"micro-batches of {case['micro']}"] if "micro" in case else []
    return ", ".join(parts + (["flat logits"] if case.get("flat") else []))


def read(path: Path) -> Result:
    """A result file.

    Raises:
        ValueError: no such file, not a result file, or a record lacks a field; the message names
            the file, the test and the fields.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a result file: it is no JSON ({error})") from None
    wanted = ("benchmarks", "machine_info", "datetime")
    if not isinstance(data, dict) or any(key not in data for key in wanted):
        keys = ", ".join(wanted)
        raise ValueError(f"{path}: not a result file: expected pytest-benchmark's JSON with {keys}")
    machine = data["machine_info"]
    if lacking := [key for key in MACHINE if key not in machine]:
        raise ValueError(f"{path}: machine_info lacks {', '.join(lacking)}")
    records = [_record(path, entry) for entry in data["benchmarks"]]
    contests = _contests(path, records)
    commit = data.get("commit_info") or {}
    return Result(
        path,
        machine,
        commit.get("id") or "unknown",
        bool(commit.get("dirty")),
        data["datetime"],
        data.get("sources"),
        tuple(c for c in contests if c.level != FIT),
        tuple(c for c in contests if c.level == FIT),
        tuple(_skipped(path, data.get("skipped", []))),
    )


def _record(path: Path, entry: dict[str, Any]) -> Record:
    info, stats = entry.get("extra_info") or {}, entry.get("stats") or {}
    at = f"{path}: {entry.get('name', 'a benchmark without a name')}"
    wanted = ALWAYS + (COMPARED if info.get("level") in COMPARED_LEVELS else ())
    if info.get("level") == FIT:
        wanted += ("pass", "fits", *QUESTIONS.get(info.get("pass"), ()))
    if lacking := [key for key in wanted if key not in info]:
        raise ValueError(f"{at}: extra_info lacks {', '.join(lacking)}")
    if lacking := [key for key in ("median", "iqr", "rounds") if key not in stats]:
        raise ValueError(f"{at}: stats lack {', '.join(lacking)}")
    if not isinstance(info["case"], dict) or "name" not in info["case"]:
        raise ValueError(f"{at}: case: expected a mapping with a name, got {info['case']!r}")
    if info["level"] == FIT:
        _check_fit(at, info)
    for key, value in (("median", stats["median"]), ("tokens", info["tokens"])):
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ValueError(f"{at}: {key}: expected a number above 0, got {value!r}")
    return Record(
        info["level"],
        "" if info.get("pass") in (None, info["level"]) else info["pass"],
        info["case"],
        info["peer"],
        info["tokens"],
        stats["median"],
        stats["iqr"],
        stats["rounds"],
        info,
    )


def _check_fit(at: str, info: dict[str, Any]) -> None:
    if info["pass"] not in QUESTIONS:
        raise ValueError(
            f"{at}: pass: expected one of {', '.join(QUESTIONS)}, got {info['pass']!r}"
        )
    if "budget" not in info["case"]:
        raise ValueError(f"{at}: case: lacks budget")
    fits = info["fits"]
    if not (isinstance(fits, int) and fits >= 0):
        raise ValueError(f"{at}: fits: expected a whole number, 0 or more, got {fits!r}")


def _contests(path: Path, records: Iterable[Record]) -> list[Contest]:
    """In the order of the file, with the levels kept together."""
    groups: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        key = (record.level, record.case["name"], record.direction)
        group = groups.setdefault(key, {})
        if record.peer in group:
            raise ValueError(f"{path}: {' '.join(key)}: two records of {record.peer}")
        group[record.peer] = record
    levels = list(dict.fromkeys(level for level, _, _ in groups))
    out = []
    for (level, _, direction), group in groups.items():
        ranked = sorted(group.values(), key=lambda r: (not r.exact, r.cost))
        out.append(Contest(level, direction, ranked[0].case, tuple(ranked)))
    return sorted(out, key=lambda c: levels.index(c.level))


def _skipped(path: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with the case by its name."""
    out = []
    for entry in entries:
        if lacking := [key for key in ("level", "case", "peer", "reason") if key not in entry]:
            raise ValueError(f"{path}: an entry of skipped lacks {', '.join(lacking)}: {entry}")
        case = entry["case"]
        out.append({**entry, "case": case["name"] if isinstance(case, dict) else str(case)})
    return out
