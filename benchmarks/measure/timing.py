"""How a number comes about: the truth in float64, interleaved timing, peak memory, ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Batch, Case, tokens
from grpo_fast import reference
from grpo_fast.engine.chunks import release_workspace

# Relative L2 distance from float64 up to which a result counts as right. In fp32 1 - p of a likely
# token cancels in plain torch, which costs it 3e-5 of the gradient on peaked logits; bf16 logits
# have 8 bits.
GATE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
ROUNDS = (3, 30)


def _sequences(case: Case, batch: Batch) -> Iterator[tuple[int, int]]:
    """Sequences that add something to the loss, with their lengths."""
    for b, n in enumerate(batch.mask.sum(1).tolist()):
        # without a KL an advantage of 0 gives a loss and gradients of exactly 0
        if n and (case.beta or batch.advantages[b] != 0):
            yield b, n


def _loss64(case: Case, batch: Batch, logits: Tensor, b: int, n: int) -> Tensor:
    """What sequence b adds to the loss, from its logits (1, n, V) float64."""
    old, ref = (
        None if t is None else t[b : b + 1, :n].double() for t in (batch.old_logp, batch.ref_logp)
    )
    return reference.policy_loss(
        logits,
        batch.ids[b : b + 1, :n],
        batch.advantages[b : b + 1].double(),
        case.config,
        old_logp=old,
        ref_logp=ref,
        denominator=batch.mask.sum().item(),
    )


def linear_truth(case: Case, batch: Batch) -> dict[str, Tensor]:
    """loss, dhidden and dweight of the reference in float64, one sequence at a time."""
    weight = batch.weight.detach().double().requires_grad_()
    dhidden = torch.zeros_like(batch.hidden, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    for b, n in _sequences(case, batch):
        hidden = batch.hidden[b : b + 1, :n].detach().double().requires_grad_()
        part = _loss64(case, batch, reference.head_logits(hidden, weight), b, n)
        part.backward()
        loss += part.detach()
        dhidden[b, :n] = hidden.grad[0]
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return {"loss": loss, "dhidden": dhidden, "dweight": weight.grad}


def logits_truth(case: Case, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
    """loss and dlogits (B, T, V) in the dtype of the logits, from float64 sequence by sequence."""
    T = batch.ids.shape[1]
    grad = torch.zeros_like(logits[:, :T], dtype=torch.float32)
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    for b, n in _sequences(case, batch):
        leaf = logits[b : b + 1, :n].double().requires_grad_()
        part = _loss64(case, batch, leaf, b, n)
        part.backward()
        loss += part.detach()
        grad[b, :n] = leaf.grad[0].float()
    return {"loss": loss, "dlogits": grad}


def logprob_truth(batch: Batch, upstream: Tensor) -> dict[str, Tensor]:
    """logp (B, T), 0 where masked, and the gradients of sum(upstream * logp), in float64."""
    weight = batch.weight.detach().double().requires_grad_()
    dhidden = torch.zeros_like(batch.hidden, dtype=torch.float64)
    logp = torch.zeros(batch.ids.shape, dtype=torch.float64, device=weight.device)
    for b, n in enumerate(batch.mask.sum(1).tolist()):
        if n == 0:
            continue
        hidden = batch.hidden[b : b + 1, :n].detach().double().requires_grad_()
        logits = reference.head_logits(hidden, weight)
        values = reference.logprob(logits, batch.ids[b : b + 1, :n])[0]
        (values * upstream[b, :n].double()).sum().backward()
        logp[b, :n] = values.detach()[0]
        dhidden[b, :n] = hidden.grad[0]
    return {"logp": logp, "dhidden": dhidden, "dweight": weight.grad}


def relative(got: Tensor, want: Tensor, rows: int = 4096) -> float:
    """Relative L2 distance, a few rows at a time in float64; NaN stays NaN."""
    got, want = got.detach().reshape(-1, got.shape[-1] if got.dim() else 1), want.detach()
    want = want.reshape(got.shape)
    error = norm = 0.0
    for start in range(0, got.shape[0], rows):
        a, b = got[start : start + rows].double(), want[start : start + rows].double()
        error += (a - b).square().sum().item()
        norm += b.square().sum().item()
    return (error / norm) ** 0.5 if norm > 0 else error**0.5


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Duration of one call: CUDA events on a GPU, the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def interleaved(
    runs: dict[str, Callable[[int], None]],
    budget: float,
    device: torch.device,
    tell: Callable[[str, int], None],
) -> dict[str, list[float]]:
    """Durations of every run in every round; each round takes all of them, beginning with another.

    A drift of the machine's speed then falls on all alike. A run is given the number of the round,
    by which it picks its inputs. Rounds are begun until budget seconds have passed, 3 at least and
    30 at most.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    start = time.perf_counter()
    for k in range(ROUNDS[1]):
        if k >= ROUNDS[0] and time.perf_counter() - start > budget:
            break
        first = k % len(names)
        for name in names[first:] + names[:first]:
            tell(name, k)
            times[name].append(seconds(lambda name=name, k=k: runs[name](k), device))
    return times


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Bytes that run had allocated at its worst moment, less what it leaves behind (gradients).

    Every tensor counts, also those of compiled code; on CPU as torch's profiler records them. So
    does the workspace that our calls keep for the next one.
    """
    release_workspace()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        release_workspace()
        return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
        release_workspace()
    events = recorded.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    alive = peak = 0
    for event in events:
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak - alive


def ceilings(device: torch.device) -> dict[str, object]:
    """The machine's own best at a matrix product (FLOP/s by dtype) and at a copy (bytes/s)."""
    cuda = device.type == "cuda"
    n = 8192 if cuda else 2048
    dtypes = [torch.float32, torch.bfloat16] if cuda else [torch.float32]
    gemm = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        times = [seconds(lambda a=a, b=b: torch.mm(a, b), device) for _ in range(9)]
        gemm[str(dtype).removeprefix("torch.")] = 2 * n**3 / statistics.median(times[2:])
    size = (4 << 30) if cuda else (256 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(9)]
    return {"gemm_flops": gemm, "copy_bytes_per_s": 2 * size / statistics.median(times[2:])}


def floor_flops(case: Case, level: str, backward: bool) -> float:
    """Least arithmetic of the lm_head for this result; 0 from given logits.

    2 NHV for every unmasked token, and 4 (2 with a frozen head) for each that has a gradient: in a
    loss those whose advantage is not 0 or that have a KL, in log-probs alone all of them.
    """
    if level == "logits":
        return 0.0
    every, active = tokens(case)
    with_gradient = every if case.beta or level == "logprob" else active
    per_gradient = (4.0 if case.trainable else 2.0) if backward else 0.0
    return (2.0 * every + per_gradient * with_gradient) * case.H * case.V


def floor_bytes(case: Case, level: str) -> float:
    """Least traffic from logits: read every unmasked row, write every row of the gradient."""
    rows = tokens(case)[0] + case.B * case.T
    return float(case.dtype.itemsize * case.V * rows) if level == "logits" else 0.0
