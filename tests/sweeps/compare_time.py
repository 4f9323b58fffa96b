"""CPU time of tiny calls, where checks and preparation are all there is: N = 8, V = 64, H = 16."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CALLS = 20
"""Calls of one figure."""
Step = Callable[[], Any]


def cases() -> dict[str, Step]:
    """Forward passes with a gradient wanted, of a padded (2, 4) batch with 8 tokens."""
    from grpo_fast import LossConfig, linear_logprob, linear_policy_loss, logprob, policy_loss

    g = torch.Generator().manual_seed(0)
    B, T, V, H = 2, 4, 64, 16
    hidden = torch.randn(B, T, H, generator=g).requires_grad_()
    weight = torch.randn(V, H, generator=g).requires_grad_()
    logits = torch.randn(B, T, V, generator=g).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 3] = False
    advantages = torch.tensor([1.0, -1.0])
    with torch.no_grad():
        old = linear_logprob(hidden, weight, ids).logp + 0.2 * torch.randn(B, T, generator=g)
    given = {"mask": mask, "old_logp": old}
    dapo, gspo = LossConfig(), LossConfig(loss_type="gspo")
    head, head_loss = (hidden, weight, ids), (hidden, weight, ids, advantages)
    frozen = (hidden, weight.detach(), ids, advantages)
    packed = {
        "mask": mask.flatten(),
        "old_logp": old.flatten(),
        "cu_seqlens": torch.tensor([0, 4, 8]),
    }
    flat = (hidden.detach().flatten(0, 1).requires_grad_(), weight, ids.flatten(), advantages)
    return {
        "linear_policy_loss": lambda: linear_policy_loss(*head_loss, config=dapo, **given)[0],
        "linear_policy_loss gspo": lambda: linear_policy_loss(*flat, config=gspo, **packed)[0],
        "linear_policy_loss frozen": lambda: linear_policy_loss(*frozen, config=gspo, **given)[0],
        "linear_policy_loss explain": lambda: linear_policy_loss(
            *head_loss, config=dapo, **given, explain=True
        ),
        "policy_loss": lambda: policy_loss(logits, ids, advantages, config=dapo, **given)[0],
        "linear_logprob": lambda: linear_logprob(*head, mask=mask).logp.sum(),
        "logprob": lambda: logprob(logits, ids, mask=mask).logp.sum(),
    }


def measure(calls: dict[str, Step], count: int) -> dict[str, float]:
    """Milliseconds of CPU time of one forward, and of one backward, in a batch of `count`."""
    out = {}
    for name, call in calls.items():
        start = time.process_time()
        results = [call() for _ in range(count)]
        out[f"{name} forward"] = (time.process_time() - start) * 1e3 / count
        if not isinstance(results[0], torch.Tensor):
            continue
        start = time.process_time()
        for result in results:
            result.backward()
        out[f"{name} backward"] = (time.process_time() - start) * 1e3 / count
    return out


def count_events(calls: dict[str, Step]) -> dict[str, int]:
    """Calls of Python and C functions in one forward: what a machine's noise leaves alone."""
    out = {}
    for name, call in calls.items():
        events = []
        sys.setprofile(lambda _, event, __: events.append(event))  # noqa: B023
        try:
            call()
        finally:
            sys.setprofile(None)
        out[f"{name} forward"] = sum(event in ("call", "c_call") for event in events)
    return out


def alone(batches: int = 40) -> dict[str, float]:
    """Median over batches in this process."""
    calls = _warm()
    rows = [measure(calls, CALLS) for _ in range(batches)]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _warm() -> dict[str, Step]:
    torch.set_num_threads(1)
    calls = cases()
    measure(calls, 5 * CALLS)
    gc.collect()
    gc.disable()
    return calls


def serve() -> None:
    """Events, then a batch of times for each line on the standard input, until it ends."""
    calls = _warm()
    print(json.dumps(count_events(calls)), flush=True)
    for _ in sys.stdin:
        gc.collect()
        print(json.dumps(measure(calls, CALLS)), flush=True)


def compare(
    a: Path, b: Path, environment: Callable[[Path], dict[str, str]], rounds: int, batches: int
) -> dict[str, dict[str, Any]]:
    """CPU times of two checkouts, batch by batch in turns, in `rounds` pairs of processes.

    Returns:
        For each case the median milliseconds of both; of b / a over neighbouring batches the
        median and the 99.9 % interval of it; and the events of `count_events`.
    """
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(rounds):
        servers, events = zip(*(_start(environment(path)) for path in (a, b)), strict=True)
        try:
            for batch in range(batches):
                # the one that is first changes
                order = (0, 1) if batch % 2 == 0 else (1, 0)
                rows = {which: _ask(servers[which]) for which in order}
                pairs.append((rows[0], rows[1]))
        finally:
            for server in servers:
                server.stdin.close()
                server.wait(timeout=60)
    out = {}
    for name in pairs[0][0].keys() & pairs[0][1].keys():
        ratios = sorted(y[name] / x[name] for x, y in pairs)
        # ranks of a median's interval at 3.3 standard deviations of a fair coin
        reach = int(1.65 * len(ratios) ** 0.5) + 1
        counts = [mine.get(name) for mine in events]
        out[name] = {
            "a_ms": statistics.median(x[name] for x, _ in pairs),
            "b_ms": statistics.median(y[name] for _, y in pairs),
            "ratio": statistics.median(ratios),
            "low": ratios[max(len(ratios) // 2 - reach, 0)],
            "high": ratios[min(len(ratios) // 2 + reach, len(ratios) - 1)],
            "events": "" if None in counts else f"events {counts[0]} and {counts[1]}",
        }
    return dict(sorted(out.items()))


def _start(environment: dict[str, str]) -> tuple[subprocess.Popen, dict[str, int]]:
    script = str(Path(__file__).resolve().parent / "compare_checkouts.py")
    server = subprocess.Popen(
        [sys.executable, script, "serve"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    events = server.stdout.readline()
    if not events:
        raise RuntimeError(f"the timing process in {environment['PYTHONPATH']} ended")
    return server, json.loads(events)


def _ask(server: subprocess.Popen) -> dict[str, float]:
    server.stdin.write("go\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())
