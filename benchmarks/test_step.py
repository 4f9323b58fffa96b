"""Level (d): a whole optimizer step of GRPOTrainer against TRL's, in tokens per second."""

import statistics

import pytest

from benchmarks.measure.clock import recorded, replay
from benchmarks.measure.step import CASES, CONTESTANTS, LEVEL, measure


def pytest_generate_tests(metafunc):
    cases = CASES.get(metafunc.config.grpo_fast.set, ())
    metafunc.parametrize("case", cases, ids=lambda case: case.name)
    metafunc.parametrize("peer", CONTESTANTS)


@recorded
def test_step(benchmark, request, case, peer):
    session = request.config.grpo_fast
    records, skipped = session.once(
        LEVEL, case.name, list(CONTESTANTS), lambda: measure(case, session.device, session.seconds)
    )
    found = [record for record in records if record["peer"] == peer]
    if not found:
        pytest.skip(next(s["reason"] for s in skipped if s["peer"] == peer))
    durations = found[0]["durations"]
    assert found[0]["exact"] is not False, (case.name, found[0]["error"])
    benchmark.group = f"{LEVEL} {case.name}"
    benchmark.extra_info.update({k: v for k, v in found[0].items() if k != "durations"})
    benchmark.extra_info["tokens_per_s"] = found[0]["tokens"] / statistics.median(durations)
    replay(benchmark, durations)
