"""Level (e): the longest context and the largest model that fit in a given memory."""

import pytest

from benchmarks.measure.clock import recorded, replay
from benchmarks.measure.fit import FIT_CASES, LEVEL, PASSES, measure
from benchmarks.peers import PEERS


def pytest_generate_tests(metafunc):
    entries = [
        pytest.param(case, peer, name, label, id=f"{case.name}-{peer.name}-{name}-{label}")
        for case in FIT_CASES.get(metafunc.config.grpo_fast.set, ())
        for peer in PEERS
        if "linear" in peer.build
        for name in PASSES
        for label in case.budgets
    ]
    metafunc.parametrize(("case", "peer", "name", "label"), entries)


@recorded
def test_fit(benchmark, request, case, peer, name, label):
    session = request.config.grpo_fast
    records, skipped = session.once(
        LEVEL, f"{case.name} {peer.name}", [peer.name], lambda: measure(case, peer, session.device)
    )
    for record in records:
        if (record["pass"], record["case"]["budget"]) == (name, label):
            break
    else:
        # after the time limit there is one reason for all of a contestant's questions
        here = [s for s in skipped if (s.get("pass"), s["case"].get("budget")) == (name, label)]
        pytest.skip((here or skipped)[0]["reason"])
    benchmark.group = f"{LEVEL} {record['case']['name']} {name}"
    benchmark.extra_info.update({k: v for k, v in record.items() if k != "durations"})
    replay(benchmark, record["durations"])
