"""How much fits in a given memory: contestants whose memory is known, and the driver end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.measure import fit
from benchmarks.measure.fit import Contestant, FitCase, Model, NoAnswer, Sample, line
from benchmarks.peers import PEERS, Peer
from benchmarks.report.records import read
from grpo_fast.engine.chunks import DEFAULT_WORKSPACE

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CASE = FitCase(
    "known", 8, 300, (64, 128, 256), {"1 MiB": 1 << 20}, 128, (), verify_seconds=60, narrow=4
)


class _Known(torch.autograd.Function):
    """A loss of 0 whose backward has both gradients and `scratch` more bytes at its worst."""

    @staticmethod
    def forward(ctx, hidden, weight, scratch):
        ctx.shapes, ctx.scratch = (hidden.shape, weight.shape), scratch
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        grads = tuple(torch.zeros(shape) for shape in ctx.shapes)
        torch.empty(ctx.scratch, dtype=torch.uint8)
        return *grads, None


def peer(scratch, name="known"):
    """A contestant that needs scratch(N, H, V) bytes above inputs and gradients."""

    def build(case):
        return lambda batch: _Known.apply(
            batch.hidden, batch.weight, int(scratch(case.T, case.H, case.V))
        )

    return Peer(name, "nothing", "what is known", {"linear": build})


def inputs(n, H, V):
    """Bytes of fp32 hidden states and weight, of their gradients, of ids, mask and advantage."""
    return 8 * H * (n + V) + 9 * n + 4


def one(scratch, **changes):
    return Contestant(replace(CASE, **changes), peer(scratch), CPU)


def most(scratch, budget, H=CASE.H, V=CASE.V):
    """The largest N whose bytes are within the budget, by trying."""
    n = 0
    while inputs(n + 1, H, V) + scratch(n + 1, H, V) <= budget:
        n += 1
    return n


def test_footprint_is_inputs_gradients_and_peak():
    for n, H in ((64, 8), (31, 5)):
        sample = one(lambda n, H, V: 1000 * n).run(n, H)
        assert sample.positions == n and sample.seconds > 0
        # the loss and the upstream gradient are tensors too
        assert 0 <= sample.bytes - inputs(n, H, CASE.V) - 1000 * n <= 256


def test_line_and_bend():
    straight = line(Sample(10, 130, 0), Sample(20, 160, 0), Sample(40, 220, 0))
    assert (straight.fixed, straight.slope, straight.bend) == (100, 3, 0)
    assert straight.at(1000) == 3100
    assert line(Sample(10, 130, 0), Sample(20, 178, 0), Sample(40, 220, 0)).bend == 0.2


@pytest.mark.parametrize(
    "scratch",
    [
        lambda n, H, V: 4 * n * V,
        lambda n, H, V: 50_000,
        # a workspace that has its full size only beyond the points
        lambda n, H, V: min(n, 400) * V,
        # another moment is the worst from 500 positions on
        lambda n, H, V: max(60_000 + n, 1200 * (n - 450)),
    ],
    ids=["all logits", "constant", "capped", "second moment"],
)
def test_longest_context_is_the_most_that_fits(scratch):
    budget = 1 << 20
    found = one(scratch).longest(budget)
    want = most(scratch, budget)
    assert found["verified"] and found["run_bytes"] <= budget
    assert 0.95 * want <= found["fits"] <= 1.05 * want
    assert 0.9 * found["fits"] <= found["run_positions"] <= found["fits"]


def test_what_takes_too_long_is_extrapolated_and_not_run():
    asked = one(lambda n, H, V: 4 * n * V, verify_seconds=0)
    found = asked.longest(1 << 20)
    assert not found["verified"] and "run_positions" not in found
    assert [n for n, _ in found["points"]] == [64, 128, 256] and len(asked.taken) == 3
    assert abs(found["fits"] - most(lambda n, H, V: 4 * n * V, 1 << 20)) <= 2


def test_a_later_moment_bounds_what_is_extrapolated():
    def scratch(n, H, V):
        return max(60_000 + n, 1200 * (n - 450))

    alone = one(scratch, verify_seconds=0).longest(1 << 20)["fits"]
    asked = one(scratch, verify_seconds=0, far=(2000, 4000), far_V=8, far_only=("known",))
    found, want = asked.longest(1 << 20), most(scratch, 1 << 20)
    assert want < found["fits"] < 1.02 * want and alone > 5 * want and not found["verified"]
    # what is within reach of the long runs is left to the line
    out_of_reach = {"far": (10**6, 2 * 10**6), "far_V": 8, "far_only": ("known",)}
    assert one(scratch, verify_seconds=0, **out_of_reach).longest(1 << 20)["fits"] == alone


def test_nothing_fits():
    found = one(lambda n, H, V: 1 << 20).longest(1 << 20)
    assert found["fits"] == 0 and found["run_positions"] == 64 and found["run_bytes"] > 1 << 20


def test_memory_that_is_no_line_has_no_answer():
    with pytest.raises(NoAnswer, match="no line in the number of positions: .* bytes at 64, "):
        one(lambda n, H, V: n * n * 10).longest(1 << 20)


def test_points_of_a_contestant_are_its_own():
    asked = one(lambda n, H, V: 0, points_of={"known": (70, 80, 90)})
    assert [s.positions for s in asked.line.samples] == [70, 80, 90]


def test_answer_that_runs_out_of_memory_is_lowered(monkeypatch):
    scratch = lambda n, H, V: 4 * n * V  # noqa: E731
    limit = 0.9 * most(scratch, 1 << 20)
    run = Contestant.run

    def refuse(self, n, *head, budget=None):
        if budget is not None and n > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, n, *head, budget=budget)

    monkeypatch.setattr(Contestant, "run", refuse)
    found = one(scratch).longest(1 << 20)
    assert found["verified"] and found["fits"] == found["run_positions"] <= limit
    limit = 0
    with pytest.raises(NoAnswer, match="no run of nearly as many confirmed it"):
        one(scratch).longest(1 << 20)


MODELS = (Model("small", 10, 16, 300), Model("middle", 20, 64, 300), Model("large", 30, 256, 300))


@pytest.mark.parametrize(("seconds", "how"), [(60, "run"), (0, "law")])
def test_largest_model(seconds, how):
    def scratch(n, H, V):
        return 4 * n * V + 12 * H * V

    asked = one(scratch, models=MODELS, model_seconds=seconds)
    for model in MODELS:
        need = inputs(CASE.N, model.H, model.V) + scratch(CASE.N, model.H, model.V)
        found = asked.largest(need + 1000)
        assert (found["fits"], found["model"], found["how"]) == (model.parameters, model.name, how)
        assert abs(found["need_bytes"] - need) <= 1000
    assert asked.largest(100_000)["fits"] == 0


def test_no_law_for_another_vocabulary():
    asked = one(lambda n, H, V: 0, models=(Model("other", 9, 8, 301),), model_seconds=0)
    with pytest.raises(NoAnswer, match="head of other would take .* there is no law for it"):
        asked.largest(1 << 20)


def test_records_and_reasons(monkeypatch):
    case = replace(CASE, models=MODELS, only=("known", "broken"))
    records, skipped = fit.measure(case, peer(lambda n, H, V: 0), CPU)
    assert skipped == [] and [r["pass"] for r in records] == list(fit.PASSES)
    assert all(r["durations"] and r["case"]["budget_bytes"] == 1 << 20 for r in records)
    json.dumps(records)

    records, skipped = fit.measure(case, peer(lambda n, H, V: 1 / 0, "broken"), CPU)
    assert records == [] and len(skipped) == 2
    assert all("ZeroDivisionError after " in s["reason"] for s in skipped)
    records, skipped = fit.measure(case, peer(lambda n, H, V: 0, "other"), CPU)
    assert records == [] and "Left out of this level" in skipped[0]["reason"]
    # what goes wrong in ours is no result
    ours = peer(lambda n, H, V: 1 / 0, "broken")
    monkeypatch.setattr(fit, "PEERS", (ours,))
    with pytest.raises(ZeroDivisionError):
        fit.measure(case, ours, CPU)


def test_cases_are_sound():
    names = {one.name for one in PEERS}
    for case in (case for cases in fit.FIT_CASES.values() for case in cases):
        assert {*case.only, *case.points_of, *case.far_only} <= names and "grpo_fast" in case.only
        assert len({model.name for model in case.models}) == len(case.models)
        assert min(case.budgets.values()) > 0 and case.narrow < case.H
    # beyond what the default workspace holds, so that the slope is the true one
    for name, device in (("cpu", "cpu"), ("gpu", "cuda")):
        (case,) = fit.FIT_CASES[name]
        first = case.points_of.get("grpo_fast", case.points)[0]
        assert first * case.V * 4 >= DEFAULT_WORKSPACE[device]
        assert case.far[0] * 4 * (case.far_V + 3 * case.H) >= DEFAULT_WORKSPACE[device]


def test_driver_end_to_end(tmp_path):
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "fit.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_fit.py", "-q", "-p"]
    command += ["no:cacheprovider", "--cases=tiny", f"--benchmark-json={file}"]
    done = subprocess.run(
        [*command, f"--partial={tmp_path / 'partial.jsonl'}"],
        cwd=ROOT,
        env={**os.environ, "GRPO_FAST_BACKEND": "torch"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = read(file)
    fits = {one.direction: one for one in result.fits}
    assert fits.keys() == set(fit.PASSES) and result.contests == ()
    longest, largest = (fits[name] for name in fit.PASSES)
    for record in longest.records:
        assert record.info["verified"] and record.info["run_bytes"] <= 32 << 20
    assert {"grpo_fast", "torch"} <= {r.peer for r in longest.records}
    assert {r.info["model"] for r in largest.records} <= {"toy of 16", "toy of 48", None}
    assert any("Triton" in s["reason"] for s in result.skipped)
