"""GAE at 16,384 tokens, packed and by doubling, against verl's loop over a padded batch.

`python -m benchmarks.gae [--write FOLDER]`. Both whiten. verl's `compute_gae_advantage_return` is
called as its trainer does, (sequences, longest) with a mask; ours gets the packed tokens. Each is
first compared with a loop in float64, then timed in turn: the median of the rounds. A contestant
that cannot run is listed with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from grpo_fast.advantages import gae, whiten

TOKENS = 16384
GAMMA, LAM = 1.0, 0.95
# relative to the largest advantage
BOUND = 1e-5
Run = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A window of completions."""

    name: str
    lengths: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Places of the padded batch."""
        return len(self.lengths) * max(self.lengths)


def _drawn() -> tuple[int, ...]:
    """Lengths of a rollout: log-normal, one in nine cut at 1,024, 16,384 tokens in all."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < TOKENS:
        drawn = 256 * torch.exp(1.1 * torch.randn((), generator=generator))
        lengths.append(min(max(int(drawn), 1), 1024, TOKENS - sum(lengths)))
    return tuple(lengths)


CASES = (
    Case("256 of 64", (64,) * 256),
    Case("64 of 256", (256,) * 64),
    Case("rollout, up to 1,024", _drawn()),
    Case("8 of 2,048", (2048,) * 8),
    Case("1 of 16,384", (TOKENS,)),
)


@dataclass(frozen=True)
class Window:
    """Packed and padded, the same numbers."""

    case: Case
    rewards: Tensor
    """(N,)"""
    values: Tensor
    """(N,)"""
    bounds: Tensor
    """(S + 1,)"""
    mask: Tensor
    """(S, T) bool."""

    def padded(self, packed: Tensor) -> Tensor:
        """(S, T), zeros behind the sequences."""
        return packed.new_zeros(self.mask.shape).masked_scatter(self.mask, packed)


def window(case: Case) -> Window:
    """Rewards and values of a case, from one seed."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(case.lengths)
    bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    rewards, values = (torch.randn(TOKENS, generator=generator) for _ in range(2))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return Window(case, rewards, values, bounds, mask)


def exact(given: Window) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns (N,) by the loop over time, in float64."""
    rewards, values = given.rewards.double(), given.values.double()
    advantages = torch.empty_like(values)
    for start, stop in zip(given.bounds[:-1].tolist(), given.bounds[1:].tolist(), strict=True):
        following = last = 0.0
        for t in reversed(range(start, stop)):
            last = rewards[t] + GAMMA * following - values[t] + GAMMA * LAM * last
            advantages[t], following = last, values[t]
    white = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)
    return white, advantages + values


def ours(given: Window) -> Run:
    """grpo_fast, packed."""
    longest = max(given.case.lengths)
    packed = (given.rewards, given.values, given.bounds)

    def run() -> tuple[Tensor, Tensor]:
        advantages, returns = gae(*packed, gamma=GAMMA, lam=LAM, longest=longest)
        return whiten([advantages])[0], returns

    return run


def verl(given: Window) -> Run:
    """verl's own function, padded."""
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    padded = (given.padded(given.rewards), given.padded(given.values), given.mask.float())
    return lambda: compute_gae_advantage_return(*padded, GAMMA, LAM)


CONTESTANTS = {"grpo_fast": ours, "verl": verl}


def error(given: Window, run: Run, truth: tuple[Tensor, Tensor]) -> float:
    """Largest difference of advantages and returns from the truth, over its largest entry."""
    found = [v[given.mask] if v.dim() == 2 else v for v in run()]
    pairs = zip(found, truth, strict=True)
    return max(((f.double() - t).abs().max() / t.abs().max()).item() for f, t in pairs)


def measure(case: Case, rounds: int) -> dict[str, dict[str, object]]:
    """Milliseconds and error of every contestant, or the reason why it has none."""
    given, runs, found = window(case), {}, {}
    truth = exact(given)
    for name, make in CONTESTANTS.items():
        try:
            runs[name] = make(given)
        except ImportError as missing:
            found[name] = {"reason": str(missing)}
            continue
        found[name] = {"error": error(given, runs[name], truth), "seconds": []}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            found[name]["seconds"].append(time.perf_counter() - began)
    return found


def page(result: dict) -> str:
    """Markdown of a result."""
    lines = [
        "# GAE at 16,384 tokens",
        "",
        "Written by `python -m benchmarks.gae --write benchmarks/results/gae`; do not edit.",
        "",
        f"{result['machine']}, {result['threads']} thread, torch {result['torch']}, verl "
        f"{result['verl']}, {result['date']}. Median of {result['rounds']} rounds in turn, "
        "float32, whitening included; the error is against a loop in float64, relative to the "
        "largest entry.",
        "",
        "| sequences | places of the padded batch | grpo_fast, packed | verl, padded loop | verl / "
        "grpo_fast | error of either |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["cases"].items():
        cells = []
        for contestant in CONTESTANTS:
            entry = row["contestants"][contestant]
            cells.append(entry["reason"] if "reason" in entry else f"{entry['ms']:.2f} ms")
        own, other = (row["contestants"][c] for c in CONTESTANTS)
        share = f"{other['ms'] / own['ms']:.1f}x" if "ms" in other else "-"
        errors = ", ".join(f"{e['error']:.1e}" for e in (own, other) if "error" in e)
        lines.append(f"| {name} | {row['padded']:,} | {' | '.join(cells)} | {share} | {errors} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="folder for gae.json and gae.md")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases, wrong = {}, []
    for case in CASES:
        found = measure(case, asked.rounds)
        for name, entry in found.items():
            if "seconds" in entry:
                seconds = entry.pop("seconds")
                entry["ms"] = 1e3 * statistics.median(seconds)
                entry["ms_least"], entry["ms_most"] = 1e3 * min(seconds), 1e3 * max(seconds)
                wrong += [f"{case.name}: {name}"] if not entry["error"] <= BOUND else []
        cases[case.name] = {"padded": case.padded, "contestants": found}
    try:
        version = metadata.version("verl")
    except metadata.PackageNotFoundError:
        version = "not installed"
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": 1,
        "torch": torch.__version__,
        "verl": version,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "rounds": asked.rounds,
        "cases": cases,
    }
    print(page(result))
    if asked.write:
        asked.write.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1) + "\n"
        (asked.write / "gae.json").write_text(text, encoding="utf-8")
        (asked.write / "gae.md").write_text(page(result), encoding="utf-8")
    if wrong:
        print(f"wrong: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
