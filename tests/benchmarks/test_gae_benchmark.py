"""The benchmark of GAE: its truth, its gate and its page, without verl and with a wrong result."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gae as bench


def test_the_cases_are_as_long_as_they_say():
    for case in bench.CASES:
        assert sum(case.lengths) == bench.TOKENS and case.padded >= bench.TOKENS
    given = bench.window(bench.CASES[2])
    padded = given.padded(given.rewards)
    assert padded.shape == given.mask.shape and torch.equal(padded[given.mask], given.rewards)
    assert not padded[~given.mask].any()


@pytest.mark.parametrize("place", [0, 2, 4])
def test_ours_passes_its_gate(place):
    given = bench.window(bench.CASES[place])
    assert bench.error(given, bench.ours(given), bench.exact(given)) < 1e-6


def test_a_wrong_result_fails_and_a_missing_one_is_named(tmp_path, monkeypatch, capsys):
    def missing(given):
        raise ImportError("No module named 'verl'")

    monkeypatch.setattr(bench, "CASES", bench.CASES[:1])
    monkeypatch.setitem(bench.CONTESTANTS, "verl", missing)
    assert bench.main(["--rounds", "1", "--write", str(tmp_path)]) == 0
    assert "No module named 'verl'" in (tmp_path / "gae.md").read_text()
    monkeypatch.setattr(bench, "LAM", 0.9)
    wrong = bench.ours
    monkeypatch.setitem(
        bench.CONTESTANTS, "grpo_fast", lambda given: lambda: (given.values, wrong(given)()[1])
    )
    assert bench.main(["--rounds", "1"]) == 1
    assert "wrong: 256 of 64: grpo_fast" in capsys.readouterr().out


def test_the_committed_result():
    folder = bench.Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "gae"
    result = json.loads((folder / "gae.json").read_text())
    assert (folder / "gae.md").read_text() == bench.page(result)
    for case in result["cases"].values():
        assert all(entry["error"] < bench.BOUND for entry in case["contestants"].values())
