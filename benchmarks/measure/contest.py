"""One case: every contestant gated against float64, then timed in turn with the others."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case, make, tokens
from benchmarks.measure import timing
from benchmarks.peers import PEERS, LogitsBatch, Peer, reason, version

PASSES = {
    "linear": ("forward", "forward+backward"),
    "logits": ("forward+backward",),
    "logprob": ("forward", "forward+backward"),
}
# Inputs are rotated until together they exceed any last-level cache, so that no round finds its
# inputs there; one lm_head or one (N, V) tensor usually does that alone.
CACHE_BYTES = 512 << 20
Result = dict[str, Tensor]


def passes(level: str, case: Case) -> tuple[str, ...]:
    """What is measured of a case."""
    return case.passes or PASSES[level]


@dataclass
class Contest:
    """A case with its inputs, its float64 truth, and how a contestant of this level is run."""

    level: str
    case: Case
    device: torch.device
    inputs: list = field(init=False)
    truth: Result = field(init=False)

    def __post_init__(self) -> None:
        batch = make(self.case, self.device)
        batches = [batch]
        if self.level == "logits":
            inputs = [_logits(batch)]
            self.truth = timing.logits_truth(self.case, batch, inputs[0].logits)
            size = inputs[0].logits.nbytes
        else:
            inputs, size = [batch], batch.hidden.nbytes + batch.weight.nbytes
            if self.level == "linear":
                self.truth = timing.linear_truth(self.case, batch)
            else:
                self.truth = timing.logprob_truth(batch, _upstream(batch))
        for seed in range(1, min(4, math.ceil(CACHE_BYTES / size))):
            batches.append(make(self.case, self.device, seed))
            inputs.append(_logits(batches[-1]) if self.level == "logits" else batches[-1])
        self.inputs = inputs

    def run(self, fn: Callable, k: int, backward: bool) -> Result:
        """Call a contestant on the k-th inputs (in turn) and return what the truth has too."""
        given = self.inputs[k % len(self.inputs)]
        if self.level == "logits":
            loss, leaf = fn(given)
            loss.backward()
            return {"loss": loss.detach(), "dlogits": leaf.grad[:, : given.ids.shape[1]]}
        given.hidden.grad = given.weight.grad = None
        name = "loss" if self.level == "linear" else "logp"
        if not backward:
            with torch.no_grad():
                return {name: fn(given)}
        out = fn(given)
        upstream = None if self.level == "linear" else _upstream(given)
        if upstream is not None and out.dim() == 1:
            upstream = upstream[given.mask]
        out.backward(upstream)
        return {name: out.detach(), "dhidden": given.hidden.grad, "dweight": given.weight.grad}

    def errors(self, result: Result) -> dict[str, float]:
        """Relative L2 distance of each result from float64, over the unmasked places."""
        out = {}
        mask = self.inputs[0].mask
        for name, got in result.items():
            want = self.truth[name]
            if got is None:
                continue
            if name == "loss":
                # on-policy losses are sums of advantages, which may cancel
                got, want = got.double(), want
                out[name] = abs(got.item() - want.item()) / max(abs(want.item()), 1e-2)
                continue
            if name == "logp":
                want, got = want[mask], got if got.dim() == 1 else got[mask]
            elif name == "dhidden":
                want, got = want[mask], got[mask]
            out[name] = timing.relative(got, want)
        return out


def _logits(batch: Batch) -> LogitsBatch:
    """The logits a model would return: one position more than there are tokens, contiguous."""
    B, T = batch.ids.shape
    V = batch.weight.shape[0]
    logits = torch.zeros(B, T + 1, V, dtype=batch.weight.dtype, device=batch.ids.device)
    with torch.no_grad():
        for b in range(B):
            logits[b, :T] = batch.hidden[b] @ batch.weight.t()
    return LogitsBatch(logits, *batch[2:])


def _upstream(batch: Batch) -> Tensor:
    """A fixed gradient of the log-probs, (B, T)."""
    return torch.cos(torch.arange(batch.ids.numel(), device=batch.ids.device)).view(batch.ids.shape)


def measure(
    level: str,
    case: Case,
    device: torch.device,
    seconds: float,
    tell: Callable[[str], None],
) -> tuple[list[dict], list[dict]]:
    """Records of every contestant and pass of one case, and who did not run with the reason.

    Args:
        seconds: time to spend on the timed rounds of a pass, of which there are 3 to 30.
    """
    skipped, entered = [], {}
    shown = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    for peer in PEERS:
        why = reason(peer, case, level, device)
        if why is None and case.only and peer.name not in case.only:
            why = "left out of this case to keep the run short"
        if why is not None:
            skipped.append({"level": level, "case": shown, "peer": peer.name, "reason": why})
        else:
            entered[peer.name] = peer
    tell("truth in float64")
    contest = Contest(level, case, device)
    functions: dict[str, Callable] = {}
    records: dict[tuple[str, str], dict] = {}
    for name, peer in entered.items():
        tell(f"{name}: correctness")
        start = time.perf_counter()
        try:
            functions[name] = fn = peer.build[level](case)
            # this is the warm-up too: what compiles on its first call does it here
            records.update(_gate(contest, peer, fn, shown))
        # Boundary: what a contestant does on a shape (runs out of memory, refuses it) is a result.
        except Exception as error:
            if peer is PEERS[0] and not isinstance(error, torch.OutOfMemoryError):
                raise
            functions.pop(name, None)
            why = f"{type(error).__name__} after {time.perf_counter() - start:.0f} s: {error}"
            short = " ".join(why.split())[:300]
            skipped.append({"level": level, "case": shown, "peer": name, "reason": short})
        gc.collect()
    contest.truth.clear()
    for name in passes(level, case):
        runs = {
            peer: lambda k, fn=fn: contest.run(fn, k, name != "forward")  # noqa: B023
            for peer, fn in functions.items()
        }
        times = timing.interleaved(
            runs,
            seconds,
            device,
            lambda peer, k, name=name: tell(f"{peer} {name}: round {k + 1}"),
        )
        for peer, durations in times.items():
            records[peer, name]["durations"] = durations
    return list(records.values()), skipped


def _gate(contest: Contest, peer: Peer, fn: Callable, shown: dict) -> dict:
    """Memory and error of one contestant, for each pass of its level."""
    out = {}
    for name in passes(contest.level, contest.case):
        result: Result = {}

        def once(result: Result = result, backward: bool = name != "forward") -> None:
            result.update(contest.run(fn, 0, backward))

        peak = timing.peak_memory(once, contest.device)
        error = contest.errors(result)
        out[peer.name, name] = {
            "level": contest.level,
            "pass": name,
            "case": shown,
            "tokens": tokens(contest.case)[0],
            "active_tokens": tokens(contest.case)[1],
            "peer": peer.name,
            "version": version(peer),
            "what": peer.what,
            "error": error,
            "exact": all(e <= timing.GATE[contest.case.dtype] for e in error.values()),
            "peak_bytes": peak,
            "floor_flops": timing.floor_flops(contest.case, contest.level, name != "forward"),
            "floor_bytes": timing.floor_bytes(contest.case, contest.level),
        }
        if peer is PEERS[0] and contest.case.dtype == torch.float32:
            # promise 8 of the library; others are only marked
            assert max(error.values()) < 2e-5, (contest.case.name, name, error)
        if peer is PEERS[0]:
            assert out[peer.name, name]["exact"], (contest.case.name, name, error)
    return out
