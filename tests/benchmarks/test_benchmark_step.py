"""The benchmark of a whole step: that both libraries do the same one, and that a difference shows.

A tiny model, and TRL where it is installed.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from tiny_trainer import model, tokenizer
from torch import nn

from benchmarks.measure import step
from benchmarks.measure.clock import Recorded
from benchmarks.measure.turns import Turns, peak_memory

CPU = torch.device("cpu")
needs_trl = pytest.mark.usefixtures("trl")
# enough for a KL and for clipped tokens in the second step, not enough for chaos
BASE = step.StepCase(
    "tiny", P=2, G=4, T=12, prompt=5, micro=4, lengths="rollout", learning_rate=1e-3
)
CASES = {
    "rollout": BASE,
    "uniform, one micro-batch": replace(BASE, lengths="full", micro=8),
    "reference": replace(BASE, beta=0.1),
    "old": replace(BASE, num_iterations=2),
    "everything": replace(BASE, beta=0.1, num_iterations=2, active=0.5),
}


@pytest.fixture(scope="module")
def trl():
    if why := step.reason("TRL"):
        pytest.skip(why)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@contextlib.contextmanager
def contest(checkpoint, case, windows=2, **overrides):
    """Contestants after `windows` windows in turn, each with the case or its own override of it."""
    text = step.sample(case, checkpoint, CPU)
    cases = {"grpo_fast": case, "TRL": case, **overrides}
    cases = {name: given for name, given in cases.items() if given is not None}
    built = [step.trainer(n, c, text, checkpoint, CPU, 20) for n, c in cases.items()]
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(contextlib.closing(Turns(one, CPU))) for one in built]
        for _ in range(windows):
            for run in runs:
                run.window()
        yield runs


@needs_trl
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_do_the_same_step(checkpoint, case):
    with contest(checkpoint, case) as (ours, theirs):
        error = step.differences(ours, theirs, model())
        assert len(ours.losses) == len(ours.grad_norms) == 2 * case.num_iterations
    assert error["loss"] < 1e-5 and error["grad_norm"] < 1e-5 and error["update"] < 1e-3
    assert step.agrees(error, case)


@needs_trl
@pytest.mark.parametrize(
    "change", [{"beta": 0.2}, {"active": 0.5}, {"learning_rate": 9e-4}], ids=str
)
def test_another_step_is_noticed(checkpoint, change):
    case = CASES["reference"]
    with contest(checkpoint, case, TRL=replace(case, **change)) as (ours, theirs):
        assert not step.agrees(step.differences(ours, theirs, model()), case)


@needs_trl
def test_records(checkpoint):
    records, skipped = step.measure(BASE, CPU, 0.0, checkpoint=checkpoint)
    assert skipped == [] and [r["peer"] for r in records] == ["grpo_fast", "TRL"]
    for record in records:
        assert record["exact"] and record["peak_bytes"] > 0
        assert len(record["durations"]) == step.ROUNDS[0] and min(record["durations"]) > 0
        assert record["tokens"] == sum(BASE.completion_lengths())
        assert record["sequence_tokens"] == record["tokens"] + 8 * 5
        assert record["padded_tokens"] == 8 * (5 + 12)


def test_absent_library_is_listed(checkpoint, monkeypatch):
    absent = step.CONTESTANTS["TRL"]._replace(package="not_there")
    monkeypatch.setitem(step.CONTESTANTS, "TRL", absent)
    (record,), (entry,) = step.measure(BASE, CPU, 0.0, checkpoint=checkpoint)
    assert record["exact"] is None and record["error"] == {}
    assert entry["peer"] == "TRL" and "not_there" in entry["reason"]


@needs_trl
def test_turns_change_nothing(checkpoint):
    with contest(checkpoint, CASES["everything"]) as (ours, _):
        together = {n: p.detach().clone() for n, p in ours.trainer.model.named_parameters()}
    with contest(checkpoint, CASES["everything"], TRL=None) as (alone,):
        for name, weight in alone.trainer.model.named_parameters():
            assert torch.equal(weight, together[name]), name


def test_text(checkpoint):
    text = step.sample(BASE, checkpoint, CPU)
    encode, end = tokenizer(), tokenizer().eos_token_id
    assert len(set(text.prompts)) == 2
    assert all(len(encode(prompt)["input_ids"]) == 5 for prompt in text.prompts)
    completions = [ids for group in text.completions for ids in group]
    assert [len(ids) for ids in completions] == BASE.completion_lengths()
    assert max(BASE.completion_lengths()) == 12 > min(BASE.completion_lengths()) >= 1
    assert all((ids[-1] == end) == (len(ids) < 12) for ids in completions)


def test_what_fails_in_the_thread_is_raised(checkpoint, monkeypatch):
    with contest(checkpoint, BASE, windows=1, TRL=None) as (run,):
        monkeypatch.setattr(run.trainer, "batch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.window()


def test_peak_memory():
    seen = []
    with peak_memory(CPU, seen.append):
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        c = nn.functional.relu(b)
        del b
    assert c.nbytes == 4_000_000 and 8_000_000 <= seen[0] < 9_000_000


def test_recorded_clock():
    durations = [0.1, 1e-9, 30.0]
    clock = Recorded(durations)
    for duration in durations:
        clock.rewind()
        start = clock()
        clock.advance()
        assert clock() - start == duration
