"""The first minutes on a GPU: are the kernels right, how fast, as predicted, and what to change.

    python -m benchmarks.first_minute                     # at most 8 minutes, one GPU
    TRITON_INTERPRET=1 python -m benchmarks.first_minute --rehearse --out DIR   # none, tiny sizes

In order of importance, each part written to disk before the next one begins: the machine's own
ceilings; every kernel against float64; the row kernels' times beside those that `make floors`
predicts; the linear path beside its floor 6 N H V, with and without rows that wait; the launch
table around its counted optimum. A part that the time is too short for is named in the result.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.counts import linear
from benchmarks.counts.machines import H100_COPY_RATE, MACHINES
from benchmarks.counts.records import Count, from_json
from benchmarks.measure.timing import ceilings, interleaved, relative, seconds
from grpo_fast import LossConfig, linear_policy_loss
from grpo_fast.engine import gradients
from grpo_fast.kernels import configs, logprob, policy
from grpo_fast.objective import objectives
from grpo_fast.presets import OBJECTIVES

RESULTS = Path(__file__).resolve().parent / "results"
FLOORS = RESULTS / "counts" / "floors.json"
# the most that a result may be off float64: promise 8 with room for the rounding of the output
GATE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
# Triton's interpreter cuts to bf16 where a GPU rounds
REHEARSED = 8e-3
# one change each around what the counts chose
SWEEP: dict[str, dict[str, Any]] = {
    "as shipped": {},
    **configs.CANDIDATES,
    "forward, 4 strips in bf16": {"FORWARD_STRIPS": {2: 4, 4: 4}, "FORWARD_REGISTERS": 96},
    "forward, 1 strip in bf16": {"FORWARD_STRIPS": {2: 1, 4: 2}},
    "gradient, 2 strips": {"GRADIENT_STRIPS": {2: 2, 4: 2}},
    "gradient, 4 tiles a program": {"GRADIENT_TILES": 4},
    "gradient, 16 tiles a program": {"GRADIENT_TILES": 16},
    "L2 kept for rows of any width": {"L2_BYTES": 1 << 40},
}


class Sizes:
    """Rows, widths and repeats, of a GPU or of a rehearsal."""

    def __init__(self, rehearse: bool) -> None:
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.rows, self.V = (6, 1009) if rehearse else (2048, 151936)
        self.others = (77,) if rehearse else (32001, 50257, 262144)
        self.linear = (64, 32, 503) if rehearse else (8192, 4096, 151936)
        self.repeats = 2 if rehearse else 20
        self.budget = 0.0 if rehearse else 3.0


class Rows:
    """Peaked logits, tokens drawn from them, and the tensors that a launch fills."""

    def __init__(self, sizes: Sizes, V: int, dtype: torch.dtype, n: int | None = None) -> None:
        self.sizes, device = sizes, sizes.device
        g = torch.Generator(device=device).manual_seed(0)
        n = sizes.rows if n is None else n
        self.logits = torch.randn(1, n, V, generator=g, device=device).mul_(2.5).to(dtype)
        self.ids = torch.randint(V, (n,), generator=g, device=device)
        rows = torch.arange(n, device=device)
        # every other token is a likely one
        likely = self.logits[0].argmax(1)
        self.ids = torch.where(rows % 2 == 0, likely, self.ids)
        self.upstream = torch.randn(3, n, generator=g, device=device)
        self.terms = torch.empty(6, n, device=device)
        self.out = torch.empty_like(self.logits)

    def forward(self, entropy: bool = True) -> None:
        """Log-probs."""
        logprob.logprob_fwd(self.logits, self.ids, self.terms[:4], entropy=entropy)

    def backward(self, dentropy: bool = False, out: Tensor | None = None) -> None:
        """The gradient of log-probs, and with dentropy of all three."""
        more = {"dlse": self.upstream[1], "dentropy": self.upstream[2]} if dentropy else {}
        stats, out = self.terms[:4], self.out if out is None else out
        logprob.logprob_bwd(self.logits, self.ids, stats, self.upstream[0], out, **more)

    def policy(self) -> None:
        """The one-pass loss, on its policy."""
        policy.policy(
            self.logits,
            self.ids,
            self.upstream[0],
            torch.ones_like(self.upstream[1]),
            self.terms,
            self.out,
            token_loss=objectives.token_loss,
            objective=objectives.clip,
            kl=objectives.k3,
            kl_gradient=objectives.k3,
            through_ratio=OBJECTIVES["clip"].through_ratio,
            weight_kl=True,
            parameters=(0.8, 1.2, float("inf"), 0.0),
            beta=0.0,
        )


def check(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Every kernel against float64, a block of rows at a time."""
    for V in (sizes.V, *sizes.others):
        for dtype in (torch.bfloat16, torch.float32):
            yield _check(Rows(sizes, V, dtype), V, dtype)


def _check(rows: Rows, V: int, dtype: torch.dtype) -> dict[str, Any]:
    rows.forward()
    logp, entropy, out = rows.terms[0].clone(), rows.terms[1].clone(), rows.out
    rows.backward(dentropy=True)
    worst = {"logp": 0.0, "entropy": 0.0, "gradient": 0.0, "policy": 0.0}
    blocks = [slice(i, i + 64) for i in range(0, logp.numel(), 64)][:: max(1, logp.numel() // 512)]
    for part in blocks:
        x = rows.logits[0, part].double().requires_grad_()
        z = x.log_softmax(-1)
        want = z.gather(1, rows.ids[part, None])[:, 0]
        bits = -(z.exp() * z).sum(-1)
        a, b, c = (u[part].double() for u in rows.upstream)
        (a * want + b * x.logsumexp(-1) + c * bits).sum().backward()
        worst["logp"] = max(worst["logp"], relative(logp[part], want))
        worst["entropy"] = max(worst["entropy"], relative(entropy[part], bits))
        worst["gradient"] = max(worst["gradient"], relative(out[0, part], x.grad))
    rows.policy()
    for part in blocks:
        x = rows.logits[0, part].double().requires_grad_()
        want = x.log_softmax(-1).gather(1, rows.ids[part, None])[:, 0]
        # at a ratio of 1 the derivative is that of -A logp
        (-rows.upstream[0, part].double() * want).sum().backward()
        worst["policy"] = max(worst["policy"], relative(out[0, part], x.grad))
    low = REHEARSED if rows.logits.is_cpu and dtype == torch.bfloat16 else GATE[dtype]
    gate = {"logp": GATE[torch.float32], "entropy": 1e-5, "gradient": low, "policy": low}
    wrong = [name for name in gate if not worst[name] <= gate[name]]
    return {"V": V, "dtype": str(dtype), "errors": worst, "wrong": wrong}


def _median(run: Callable[[], None], sizes: Sizes) -> float:
    run()
    return statistics.median(seconds(run, sizes.device) for _ in range(sizes.repeats))


@functools.cache
def predictions() -> dict[str, list[Count]]:
    """The passes of our launches on sm_90 by name, from the committed counts."""
    ours = json.loads(FLOORS.read_text(encoding="utf-8"))["ours"]
    found: dict[str, list[Count]] = {}
    for one in from_json(ours.get(triton.__version__, next(iter(ours.values())))):
        if one.target == "sm_90":
            found.setdefault(one.launch, []).append(one)
    return found


def predicted(name: str, logits: int, copy_rate: float) -> float | None:
    """Seconds of a launch: of each pass its bytes at the measured copy rate, or its issue at 80 %
    where that takes longer."""
    known = predictions().get(name)
    if known is None:
        return None
    total = 0.0
    for one in known:
        issue = one.bytes / MACHINES["sm_90"].copy_rate / one.share_80
        total += max(one.bytes / copy_rate, issue if one.share_80 < 1 else 0.0)
    return total * logits


def time_rows(sizes: Sizes, copy_rate: float) -> Iterator[dict[str, Any]]:
    """The row kernels beside what was predicted."""
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        rows = Rows(sizes, sizes.V, dtype)
        low = rows.logits.view(torch.bfloat16)[..., : sizes.V]
        own = torch.empty_like(rows.logits, dtype=torch.bfloat16)
        runs = {
            f"logprob_fwd {short}": rows.forward,
            f"logprob_fwd {short} no entropy": lambda r=rows: r.forward(entropy=False),
            f"logprob_bwd {short}": rows.backward,
            f"logprob_bwd {short} dentropy": lambda r=rows: r.backward(dentropy=True),
            f"policy {short}": rows.policy,
        }
        if short == "fp32":
            runs["logprob_bwd fp32 -> bf16"] = lambda r=rows, low=low: r.backward(out=low)
            runs["logprob_bwd fp32 -> bf16 of its own"] = lambda r=rows, o=own: r.backward(out=o)
        for name, run in runs.items():
            words = name.split(" ", 2)
            types = words[1] + (" -> bf16" if "-> bf16" in name else "")
            more = next((w for w in ("no entropy", "dentropy") if name.endswith(w)), "")
            launch = f"{words[0]} {types} V={sizes.V} {more}".strip()
            taken, n = _median(run, sizes), rows.logits.numel()
            want = predicted(launch, n, copy_rate)
            yield {"launch": name, "logits": n, "seconds": taken, "predicted": want}


def time_linear(sizes: Sizes, gemm: float, copy_rate: float) -> Iterator[dict[str, Any]]:
    """The loss from hidden states beside 6 N H V, with rows that wait and with an fp32 dweight, and
    the shares that the arithmetic of `make floors` expects at the measured rates."""
    N, H, V = sizes.linear
    g = torch.Generator(device=sizes.device).manual_seed(0)
    hidden, weight = (
        torch.randn(n, H, generator=g, device=sizes.device).bfloat16().requires_grad_()
        for n in (N, V)
    )
    ids = torch.randint(V, (N,), generator=g, device=sizes.device)
    advantages = torch.randn(N, generator=g, device=sizes.device)

    def run(_: int = 0) -> None:
        hidden.grad = weight.grad = None
        linear_policy_loss(hidden, weight, ids, advantages, config=LossConfig("dapo"))[0].backward()

    def without(_: int) -> None:
        with mock.patch.object(gradients, "held_in", lambda *_: 0):
            run()

    arms = {"rows wait": run, "fp32 dweight": without}
    for arm in arms.values():
        arm(0)
    times = interleaved(arms, sizes.budget * 4, sizes.device, lambda *_: None)
    rates, shape = linear.Rates(flops=gemm, copy=copy_rate), linear.Shape(N, H, V)
    designs = {"rows wait": linear.TODAY, "fp32 dweight": replace(linear.TODAY, one_product=False)}
    for name, taken in times.items():
        middle, floor = statistics.median(taken), linear.floor(shape, rates)
        expected = linear.shares(shape, designs[name], rates)
        row = {"arm": name, "seconds": middle, "floor": floor, "share": floor / middle}
        yield {**row, "expected, epilogues hidden or not": expected}


@contextlib.contextmanager
def table(changes: dict[str, Any]) -> Iterator[None]:
    """Inside, the launch table has other values."""
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(mock.patch.object(configs, name, value))
        yield


def sweep(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Other values of the launch table, on bf16 rows: seconds of each kernel."""
    rows = Rows(sizes, sizes.V, torch.bfloat16)
    for name, changes in SWEEP.items():
        with table(changes):
            runs = {"forward": rows.forward, "backward": rows.backward, "policy": rows.policy}
            found = {kernel: _median(run, sizes) for kernel, run in runs.items()}
        yield {"table": name, **found}


def machine(sizes: Sizes) -> dict[str, Any]:
    """What the numbers are of."""
    root = Path(__file__).resolve().parents[1]
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    cuda = sizes.device.type == "cuda"
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name() if cuda else "rehearsal on a CPU",
        "driver": subprocess.run(driver, capture_output=True, text=True).stdout.strip()
        if cuda
        else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git.stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "assumed copy rate": [MACHINES["sm_90"].copy_rate, H100_COPY_RATE],
    }


def measure(sizes: Sizes, out: Path, minutes: float) -> dict[str, Any]:
    """All parts, each written as soon as it is done."""
    began, result = time.monotonic(), {"machine": machine(sizes)}

    def keep(name: str, value: Any) -> None:
        result[name] = value
        part = out.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(part, out)
        print(f"{time.monotonic() - began:6.1f} s  {name}", file=sys.stderr, flush=True)

    keep("ceilings", ceilings(sizes.device))
    copy = result["ceilings"]["copy_bytes_per_s"]
    flops = result["ceilings"]["gemm_flops"]
    gemm = flops.get("bfloat16", flops["float32"])
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "right": lambda: check(sizes),
        "rows": lambda: time_rows(sizes, copy),
        "linear": lambda: time_linear(sizes, gemm, copy),
        "sweep": lambda: sweep(sizes),
    }
    for name, part in parts.items():
        found = []
        for row in part():
            found.append(row)
            keep(name, found)
            if time.monotonic() - began > 60 * minutes:
                keep("cut short at", name)
                return result
    return result


def summary(result: dict[str, Any]) -> list[str]:
    """Measured beside predicted, for people."""
    lines = [f"{'launch':<40} {'ms':>9} {'predicted':>9}"]
    for row in result.get("rows", []):
        want = "-" if row["predicted"] is None else f"{1e3 * row['predicted']:.3f}"
        lines.append(f"{row['launch']:<40} {1e3 * row['seconds']:9.3f} {want:>9}")
    for row in result.get("linear", []):
        lines.append(f"{row['arm']:<40} {1e3 * row['seconds']:9.3f} {row['share']:9.0%} of 6NHV")
    shipped, *others = result.get("sweep", [{}])
    for row in others:
        gains = {k: shipped[k] / row[k] for k in ("forward", "backward", "policy")}
        gains = ", ".join(f"{k} {v:.2f}x" for k, v in gains.items())
        lines.append(f"{row['table']}: {gains} of the shipped speed")
    if "cut short at" in result:
        lines.append(f"the time ended in: {result['cut short at']}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "first_minute.json")
    parser.add_argument("--minutes", type=float, default=8.0)
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("no GPU here: --rehearse runs every part on a CPU at tiny sizes")
    if given.rehearse:
        os.environ["GRPO_FAST_BACKEND"] = "triton"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    result = measure(Sizes(given.rehearse), given.out, given.minutes)
    print("\n".join(summary(result)), file=sys.stderr)
    right = result.get("right", [])
    wrong = [f"{r['dtype']} V={r['V']}: {r['wrong']}" for r in right if r["wrong"]]
    print("\n".join(wrong) or "every kernel agrees with float64", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
