"""What the report and docs/benchmarks.md say of level fit: who fits more, and what was not run."""

from __future__ import annotations

import functools

import pytest
from result_files import entry, save

from benchmarks.report import page as report
from benchmarks.report import readme
from benchmarks.report.records import read

CONTEXT = {"H": 4, "V": 100, "name": "small-1GiB", "budget": "1 GiB", "budget_bytes": 1 << 30}
MODEL = {"B": 1, "T": 64, "name": "small-1GiB", "budget": "1 GiB", "budget_bytes": 1 << 30}


@pytest.fixture
def saved(tmp_path):
    """Writes a result file and returns its path."""
    return functools.partial(save, tmp_path)


def context(peer: str, fits: int, **changes) -> dict:
    """A record of the longest context; run, if nothing else is said. The time says nothing."""
    given = {
        "case": CONTEXT | {"dtype": "float32", "reserve_bytes": 0},
        "fits": fits,
        "verified": True,
        "run_positions": fits * 95 // 100 or 64,
        "run_bytes": 1020 << 20,
        "fixed_bytes": 32 << 20,
        "bytes_per_position": 1234.5,
        "points": [[64, 1], [128, 2], [256, 3]],
    }
    return fitted(peer, "longest context", given | changes)


def model(peer: str, fits: int, name: str | None, how: str = "run") -> dict:
    """A record of the largest model."""
    given = {"case": MODEL | {"dtype": "float32"}, "fits": fits, "model": name, "how": how}
    return fitted(peer, "largest model", given | {"need_bytes": (512 << 20) if fits else None})


def fitted(peer: str, question: str, given: dict) -> dict:
    one = entry(peer, 1.0 if peer == "grpo_fast" else 0.1)
    kept = {key: one["extra_info"][key] for key in ("peer", "version", "what", "tokens")}
    return one | {"extra_info": kept | {"level": "fit", "pass": question} | given}


def page(path) -> str:
    return report.page(read(path), {})


def test_more_positions_win_whatever_the_time(saved):
    path = saved(context("TRL", 1000), context("grpo_fast", 25_000), context("Liger", 500))
    text = page(path)
    assert "## fit: what fits in a given memory" in text and "are not counted" in text
    assert "### small-1GiB, longest context\n" in text
    assert (
        "Longest context in 1 GiB, H 4, V 100, float32. Won: 25.00x the positions of the next, TRL."
        in text
    )
    table = [line for line in text.splitlines() if line.endswith("run with 1,020 MiB |")]
    assert table == [
        "| grpo_fast | 25,000 | 1.00x | 32.0 | 1,234 | 23,750 run with 1,020 MiB |",
        "| TRL | 1,000 | 0.04x | 32.0 | 1,234 | 950 run with 1,020 MiB |",
        "| Liger | 500 | 0.02x | 32.0 | 1,234 | 475 run with 1,020 MiB |",
    ]
    assert "fits more than every other contestant in 1 and less than another in 0" in text
    assert "| TRL | 1.0 | TRL.loss \\| compiled |" in text and "In 0 of 0 cases" in text


def test_lost_and_extrapolated_are_said(saved):
    far = context("LCE", 30_000, verified=False, run_positions=None)
    path = saved(context("grpo_fast", 20_000), far)
    text = page(path)
    assert text.count("**Lost**: LCE fits 1.50x as many positions (computed, not run).") == 2
    assert "| LCE | **30,000\\*** | **1.50x** | 32.0 | 1,234 | extrapolated from 256" in text
    assert "more than every other contestant in 0 and less than another in 1" in text
    block = readme.tables([read(path)])
    assert (
        "| longest context in 1 GiB, H 4, V 100, float32 | 20,000 | LCE **30,000\\*** | - | - | - |"
        in block
    )


def test_what_does_not_fit_at_all_is_last(saved):
    text = page(saved(context("TRL", 0), context("grpo_fast", 100)))
    assert "Won: grpo_fast fits 100 positions, TRL fewer than 64." in text
    assert "| TRL | fewer than 64 | 0.00x | 32.0 | 1,234 | 64 run with 1,020 MiB, which is" in text
    text = page(saved(context("TRL", 100), context("grpo_fast", 0)))
    assert "**Lost**: TRL fits 100 positions, grpo_fast fewer than 64." in text
    assert "| TRL | **100** | - | 32.0 |" in text
    text = page(saved(context("TRL", 0), context("grpo_fast", 0)))
    assert "Level: nothing, as TRL." in text and "in 0 and less than another in 0" in text


def test_largest_model(saved):
    entries = [model("grpo_fast", 2_000_000_000, "two"), model("TRL", 500_000_000, "half", "law")]
    path = saved(*entries, model("torch", 0, None))
    text = page(path)
    assert (
        "Largest model in 1 GiB, a context of 64, float32."
        " Won: two; the next, TRL, fits half (computed, not run)." in text
    )
    assert "| grpo_fast | two | 2 billion | 512 | run |" in text
    assert "| TRL | half\\* | 0.5 billion | 512 | by its law |" in text
    assert "| torch | none | - | - | run |" in text
    block = readme.tables([read(path)])
    assert (
        "| largest model in 1 GiB, a context of 64, float32 | two | TRL half\\* | none | half\\* |"
        in block
    )


def test_a_draw_is_neither_won_nor_lost(saved):
    text = page(saved(*(model(p, 2_000_000_000, "two") for p in ("TRL", "grpo_fast", "verl"))))
    assert text.count("Level: two, as TRL, verl.") == 2
    assert "in 0 and less than another in 0" in text


def test_alone_and_absent(saved):
    assert "grpo_fast has nobody to beat" in page(saved(context("grpo_fast", 5)))
    path = saved(context("TRL", 5))
    assert "grpo_fast was not measured here" in page(path)
    assert "What fits" not in readme.tables([read(path)])


def test_reserve_is_named(saved):
    card = {"budget": "80 GB", "budget_bytes": 76 * 10**9, "reserve_bytes": 4 * 10**9}
    text = page(saved(context("grpo_fast", 5, case=CONTEXT | card)))
    assert "Longest context in 80 GB less 4 GB, H 4, V 100." in text


def test_timed_levels_know_nothing_of_it(saved):
    path = saved(entry("grpo_fast", 0.1), entry("TRL", 0.2), context("grpo_fast", 5))
    result = read(path)
    assert len(result.contests) == len(result.fits) == 1
    assert "In 1 of 1 case grpo_fast is the fastest" in page(path)
    plain = page(saved(entry("grpo_fast", 0.1), entry("TRL", 0.2)))
    assert "what fits" not in plain and "fits in a given memory" not in plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pass": "widest"}, "pass: expected one of longest context, largest model, got 'widest'"),
        ({"fits": -1}, "fits: expected a whole number, 0 or more, got -1"),
        ({"fits": 1.5}, "fits: expected a whole number, 0 or more, got 1.5"),
        ({"case": {"name": "small"}}, "case: lacks budget"),
    ],
)
def test_broken_record_is_named(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        read(saved(context(**{"peer": "grpo_fast", "fits": 5, **changes})))


@pytest.mark.parametrize("field", ["pass", "fits", "verified", "fixed_bytes", "points"])
def test_missing_field_is_named(saved, field):
    broken = context("grpo_fast", 5)
    del broken["extra_info"][field]
    with pytest.raises(ValueError, match=rf"extra_info lacks .*{field}"):
        read(saved(broken))
