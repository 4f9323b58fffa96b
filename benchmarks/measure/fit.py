"""Level (e): the longest context and the largest model whose loss step fits in a given memory.

A step is the on-policy dapo loss, forward and backward, of one sequence with every position
unmasked and active. Counted: its hidden states, the lm_head weight, ids, mask and advantages; the
gradients of the first two; and what the contestant has allocated above these at its worst moment.
Not counted: the rest of the model, its activations, the optimizer, other ranks. Ours and theirs
would share those, so that next to a real model all of them fit less. Nor, on CPU, the memory in
which a BLAS packs operands, some tens of MiB for all.

The bytes of a step at a few values of N have to lie on a line, which is followed to the budget.
Then 95 % of the answer is run: on CUDA under that budget, on CPU its bytes are measured. Where the
line was wrong there, it goes on from that run. An answer that takes too long to run is called
extrapolated. Once workspaces have their full size, every moment of a step takes memory linear in
N, and the worst of them convex: an extrapolated answer is the most that can fit, and fewer do where
another moment is the worst at larger N. To find such a moment, long sequences are run with a very
small vocabulary, which is quick: what they need and the rest of the weight is needed in any case.

The largest model is that of a list of real ones whose loss step at N positions fits: run at the
shape of its head where that is quick, else by the contestant's law: a line in H through two heads
of the same vocabulary, by the same reasoning the least that a larger head can take.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.cases import Batch, Case
from benchmarks.fit_cases import FIT_CASES, FitCase, Model
from benchmarks.measure import timing
from benchmarks.peers import PEERS, Peer, reason, version

__all__ = ["FIT_CASES", "LEVEL", "PASSES", "FitCase", "Model", "footprint", "measure"]

LEVEL = "fit"
CONTEXT, MODEL = PASSES = ("longest context", "largest model")
# How far the middle point may lie off the line through the outer two, as a share of their rise, and
# the bytes of the answer's run off the line.
STRAIGHT = 0.05
# What of the answer is run; the next one where that runs out of memory.
SHARES = (0.95, 0.85, 0.7)
# Runs in search of an answer, where memory is no single line.
TRIES = 5


class Sample(NamedTuple):
    """A step that was run."""

    positions: int
    bytes: int
    seconds: float


class Line(NamedTuple):
    """bytes = fixed + slope * positions."""

    fixed: float
    slope: float
    bend: float
    """How far inner points lie off it, as a share of the rise between the outer ones."""
    samples: tuple[Sample, ...]

    def at(self, positions: int) -> float:
        """Bytes of a step of that many positions."""
        return self.fixed + self.slope * positions


def line(*samples: Sample) -> Line:
    """The line through the first and the last of them."""
    first, last = samples[0], samples[-1]
    rise = last.bytes - first.bytes
    slope = rise / (last.positions - first.positions)
    fixed = first.bytes - slope * first.positions
    off = [abs(s.bytes - fixed - slope * s.positions) for s in samples[1:-1]]
    bend = max(off, default=0.0) / abs(rise) if rise else math.inf
    return Line(fixed, slope, bend, samples)


class NoAnswer(Exception):
    """Why a question has no answer for a contestant, in a sentence."""


@contextlib.contextmanager
def limited(device: torch.device, budget: int | None) -> Iterator[None]:
    """On CUDA no more than `budget` bytes can be allocated inside; elsewhere nothing changes."""
    gc.collect()
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(device)[1]
    room = total if budget is None else budget + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _batch(case: Case, device: torch.device) -> Batch:
    """Inputs in their own dtype from the start, so that making them takes no more than they do.

    What a step allocates does not depend on the values; cases.make wants several times their bytes.
    """
    g = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": g, "device": device}
    shape = (case.B, case.T)
    hidden = torch.randn(*shape, case.H, dtype=case.dtype, **options)
    weight = torch.randn(case.V, case.H, dtype=case.dtype, **options).mul_(case.H**-0.5)
    return Batch(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(case.V, shape, **options),
        torch.ones(shape, dtype=torch.bool, device=device),
        torch.randn(case.B, **options),
        None,
        None,
    )


def footprint(peer: Peer, case: Case, device: torch.device, warm: bool = True) -> Sample:
    """A step of a contestant: the bytes of its inputs, its gradients and its peak above both.

    Args:
        warm: on CUDA run once before, so that what tunes itself on a first call has done so.
    """
    batch = _batch(case, device)
    fn = peer.build["linear"](case)

    def run() -> None:
        fn(batch).backward()

    if warm and device.type == "cuda":
        run()
        batch.hidden.grad = batch.weight.grad = None
    start = time.perf_counter()
    peak = timing.peak_memory(run, device)
    seconds = time.perf_counter() - start
    kept = [*batch, batch.hidden.grad, batch.weight.grad]
    return Sample(case.T, peak + sum(t.nbytes for t in kept if t is not None), seconds)


class Contestant:
    """What is asked about one contestant, and the steps that it was run on for the answers."""

    def __init__(self, case: FitCase, peer: Peer, device: torch.device) -> None:
        self.case, self.peer, self.device = case, peer, device
        self.taken: list[Sample] = []
        self._known: dict[tuple[int, int], Sample] = {}
        self._heads: dict[tuple[int, int], float] = {}

    def run(
        self, n: int, H: int | None = None, V: int | None = None, budget: int | None = None
    ) -> Sample:
        """A step of n positions, of the case's head where no other is given; warm without budget.

        Raises:
            torch.OutOfMemoryError: on CUDA, where it takes more than the budget.
        """
        shape = _loss_case(self.case, n, H, V)
        with limited(self.device, budget):
            self.taken.append(footprint(self.peer, shape, self.device, warm=budget is None))
        return self.taken[-1]

    @functools.cached_property
    def line(self) -> Line:
        """Memory by N for the head of the case."""
        points = self.case.points_of.get(self.peer.name, self.case.points)
        return line(*(self._at(n, self.case.H) for n in points))

    @functools.cached_property
    def far(self) -> Line:
        """Memory by N of long sequences with a very small vocabulary."""
        return line(*(self.run(n, V=self.case.far_V) for n in self.case.far))

    def longest(self, budget: int) -> dict[str, Any]:
        """The most positions whose step fits; 0 where not even its smallest run did.

        Raises:
            NoAnswer: its memory is no line, or no run confirmed the answer.
        """
        found = self._straight()
        first = found.samples[0]
        if first.bytes > budget:
            return self._answer(found, 0, first)
        shares = iter(SHARES)
        share = next(shares)
        for _ in range(TRIES):
            n = int((budget - found.fixed) / found.slope)
            k = int(n * share)
            if self._seconds(k, self.case.H, self.case.V) > self.case.verify_seconds:
                return self._answer(found, min(n, self._bound(n, budget)), None)
            try:
                done = self.run(k, budget=budget)
            except torch.OutOfMemoryError:
                share = next(shares, None)
                if share is None:
                    break
                continue
            if done.bytes <= budget and abs(done.bytes / found.at(k) - 1) <= STRAIGHT:
                return self._answer(found, n if share == SHARES[0] else k, done)
            found = line(found.samples[-1], done)
        raise NoAnswer(
            f"Its line promised {n} positions, and no run of nearly as many confirmed it."
        )

    @staticmethod
    def _answer(found: Line, n: int, done: Sample | None) -> dict[str, Any]:
        ran = {} if done is None else {"run_positions": done.positions, "run_bytes": done.bytes}
        return {
            "fits": n,
            "verified": done is not None,
            **ran,
            "fixed_bytes": found.fixed,
            "bytes_per_position": found.slope,
            "points": [[s.positions, s.bytes] for s in found.samples],
        }

    def _bound(self, n: int, budget: int) -> int:
        """Positions that a small vocabulary leaves room for; n where that is less far to run."""
        case = self.case
        if self.peer.name not in case.far_only or n <= case.far[0]:
            return n
        rest = case.H * (case.V - case.far_V) * case.dtype.itemsize
        return int((budget - rest - self.far.fixed) / self.far.slope)

    def largest(self, budget: int) -> dict[str, Any]:
        """The model with the most parameters whose loss step fits; fits is 0 where none does.

        Raises:
            NoAnswer: a model's head takes too long to run, and there is no law for it.
        """
        for model in sorted(self.case.models, key=lambda m: -m.parameters):
            need, how = self._need(model)
            if need <= budget:
                shown = {"model": model.name, "head": [model.H, model.V], "need_bytes": need}
                return {"fits": model.parameters, "how": how, **shown}
        return {"fits": 0, "how": how, "model": None, "head": None, "need_bytes": None}

    def law(self, H: int) -> float:
        """Bytes of a step of N positions at the vocabulary of the case: a line in H."""
        case = self.case
        near, far = (self._at(case.N, width).bytes for width in (case.H, case.narrow))
        return far + (near - far) * (H - case.narrow) / (case.H - case.narrow)

    def _at(self, n: int, H: int) -> Sample:
        """`run` without a budget, once."""
        if (n, H) not in self._known:
            self._known[n, H] = self.run(n, H)
        return self._known[n, H]

    def _straight(self) -> Line:
        if self.line.bend > STRAIGHT:
            at = ", ".join(f"{s.bytes} bytes at {s.positions}" for s in self.line.samples)
            raise NoAnswer(f"Its memory is no line in the number of positions: {at}.")
        return self.line

    def _seconds(self, n: int, H: int, V: int) -> float:
        """About how long a step takes."""
        last = self.line.samples[-1]
        return last.seconds * n * H * V / (last.positions * self.case.H * self.case.V)

    def _need(self, model: Model) -> tuple[float, str]:
        """Bytes of the loss step of a model, and whether it was run or is by the law."""
        case, head = self.case, (model.H, model.V)
        seconds = self._seconds(case.N, *head)
        if seconds <= case.model_seconds:
            if head not in self._heads:
                try:
                    done = self.run(case.N, *head, budget=max(case.budgets.values()))
                    self._heads[head] = done.bytes
                except torch.OutOfMemoryError:
                    self._heads[head] = math.inf
            return self._heads[head], "run"
        if case.narrow and model.V == case.V:
            return self.law(model.H), "law"
        raise NoAnswer(
            f"A run at the head of {model.name} would take about {seconds:.0f} s, and there is no"
            " law for it."
        )


def _loss_case(case: FitCase, n: int, H: int | None = None, V: int | None = None) -> Case:
    return Case(case.name, 1, n, H or case.H, V or case.V, dtype=case.dtype)


def _shown(case: FitCase, name: str, label: str) -> dict[str, Any]:
    """A question as its record names it."""
    shown = {
        "name": f"{case.name}-{label}".replace(" ", ""),
        "dtype": str(case.dtype).removeprefix("torch."),
        "budget": label,
        "budget_bytes": case.budgets[label],
        "reserve_bytes": case.reserve,
    }
    return shown | ({"H": case.H, "V": case.V} if name == CONTEXT else {"B": 1, "T": case.N})


def measure(case: FitCase, peer: Peer, device: torch.device) -> tuple[list[dict], list[dict]]:
    """Records of one contestant with the seconds of its runs, and what it has no answer to."""
    records: list[dict] = []
    skipped: list[dict] = []
    start = time.perf_counter()
    why = reason(peer, _loss_case(case, case.points[0]), "linear", device)
    if why is None and case.only and peer.name not in case.only:
        why = "Left out of this level to keep the run short."
    one = Contestant(case, peer, device)
    for label, budget in case.budgets.items():
        for name, ask in ((CONTEXT, one.longest), (MODEL, one.largest)):
            about = {"level": LEVEL, "pass": name, "case": _shown(case, name, label)}
            about["peer"] = peer.name
            try:
                if why is not None:
                    raise NoAnswer(why)
                if device.type == "cuda" and budget > torch.cuda.mem_get_info(device)[1]:
                    raise NoAnswer("This device has less memory.")
                answer = ask(budget)
            except NoAnswer as sentence:
                skipped.append({**about, "reason": str(sentence)})
                continue
            # Boundary: what a contestant does on a shape (runs out of memory, refuses it) is a
            # result, and not to be tried again.
            except Exception as error:
                if peer is PEERS[0] and not isinstance(error, torch.OutOfMemoryError):
                    raise
                took = time.perf_counter() - start
                why = " ".join(f"{type(error).__name__} after {took:.0f} s: {error}".split())[:300]
                skipped.append({**about, "reason": why})
                continue
            about |= {"tokens": one.line.samples[-1].positions, "version": version(peer)}
            durations = [sample.seconds for sample in one.taken]
            records.append({**about, "what": peer.what, **answer, "durations": durations})
    return records, skipped
