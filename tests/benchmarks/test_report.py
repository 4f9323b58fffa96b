"""What benchmarks/report/ makes of result files: pages and charts."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
from result_files import CASE, entry, save

from benchmarks.report import charts, readme
from benchmarks.report import page as report
from benchmarks.report.records import read
from benchmarks.report.wording import number

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def saved(tmp_path):
    """Writes a result file and returns its path."""
    return functools.partial(save, tmp_path)


def page(path: Path) -> str:
    return report.page(read(path), {})


def rows(text: str, contestant: str) -> list[dict[str, str]]:
    """The rows of a contestant in all tables of times, by column."""
    out, header = [], []
    for line in text.splitlines():
        cells = [c.strip() for c in line.replace("\\|", "/").strip("|").split("|")]
        if cells[0] == "contestant":
            header = cells
        elif cells[0] == contestant and "median ms" in header:
            out.append(dict(zip(header, cells, strict=True)))
    return out


def test_header_names_machine_commit_and_ceilings(saved):
    text = page(saved(entry("grpo_fast", 0.1)))
    for line in (
        "# Benchmarks: Abacus 2, 2026-11-21",
        "| device | Abacus 2 (cpu) |",
        "| driver | none |",
        "| threads | 2 |",
        "| versions | torch 2.13.0 |",
        "| commit | 0123456789abcdef **with uncommitted changes**, sources feedbeef |",
        "| date | 2026-11-21 06:54 UTC |",
        "| measured ceilings | matrix product float32 0.100 TFLOP/s; copy 10.0 GB/s"
        " (read and written) |",
        "| grpo_fast | 1.0 | grpo_fast.loss \\| compiled |",
    ):
        assert line in text


def test_table_of_a_case_that_is_won(saved):
    text = page(saved(entry("TRL", 0.25, peak_bytes=8 << 20), entry("grpo_fast", 0.1)))
    assert rows(text, "grpo_fast") == [
        {
            "contestant": "grpo_fast",
            "median ms": "100",
            "IQR ms": "1.00",
            "rounds": "7",
            "vs grpo_fast": "1.00",
            "peak MiB": "4.00",
            "useful TFLOP/s": "0.0500",
            "of GEMM ceiling": "50.0 %",
            "error of loss": "1.0e-07",
            "error of dhidden": "2.5e-07",
            "error of dweight": "3.0e-07",
            "right": "yes",
        }
    ]
    (theirs,) = rows(text, "TRL")
    assert theirs["vs grpo_fast"] == "2.50x slower" and theirs["of GEMM ceiling"] == "20.0 %"
    assert theirs["peak MiB"] == "8.00"
    assert "N = 2 x 8 = 16, H 4, V 100, float32, active 0.5; 16 tokens unmasked, 8 of" in text
    assert "Won: the next, TRL, is 2.50x slower." in text
    assert "In 1 of 1 case grpo_fast is the fastest" in text and "Lost" not in text
    assert text.index("| grpo_fast | 100") < text.index("| TRL | 250")


def test_lost_case_is_shown_as_lost(saved):
    path = saved(entry("grpo_fast", 0.1), entry("TRL", 0.08, peak_bytes=1 << 20))
    text = page(path)
    (theirs,) = rows(text, "TRL")
    assert theirs["vs grpo_fast"] == "**1.25x faster**" and theirs["peak MiB"] == "**1.00**"
    assert "In 0 of 1 case grpo_fast is the fastest" in text
    assert "in 1 it is not; in 1 another needs less memory" in text
    assert text.count("**Lost**: TRL is 1.25x faster.") == 2
    assert text.count("**Lost on memory**: TRL needs 1.00 MiB, grpo_fast 4.00 MiB.") == 2
    block = readme.tables([read(path)])
    assert "| TRL **0.80x** | TRL **0.25x** | - | **0.80x**, **0.25x** | - |" in block


def test_difference_within_the_spread_says_so(saved):
    assert "1.01x faster (within the spread)." in page(
        saved(entry("grpo_fast", 0.1009), entry("TRL", 0.1))
    )
    assert "1.01x slower (within the spread)." in page(
        saved(entry("grpo_fast", 0.1), entry("TRL", 0.1009))
    )


def test_inexact_is_marked_and_never_ranked(saved):
    fast = entry("CCE", 0.01, exact=False, peak_bytes=1, error={"loss": 0.5})
    path = saved(fast, entry("grpo_fast", 0.1), entry("TRL", 0.2))
    text = page(path)
    (theirs,) = rows(text, "CCE")
    assert theirs["vs grpo_fast"] == "10.00x faster (inexact, not ranked)"
    assert theirs["right"] == "*inexact*" and theirs["peak MiB"] == "0.00000095"
    assert theirs["error of dhidden"] == "-"
    assert "Won: the next, TRL, is 2.00x slower." in text and "Lost" not in text
    assert text.index("| TRL | 200") < text.index("| CCE | 10.0")
    assert "CCE" not in readme.tables([read(path)])


def test_ours_inexact_is_no_win(saved):
    path = saved(entry("grpo_fast", 0.1, exact=False), entry("TRL", 0.2))
    text = page(path)
    assert rows(text, "grpo_fast")[0]["vs grpo_fast"] == "1.00 (inexact)"
    assert text.count("**Lost**: grpo_fast is inexact here") == 2
    assert "In 0 of 1 case" in text and "in 1 it is not" in text
    assert "100 ms, 4.00 MiB (inexact) | TRL **2.00x**" in readme.tables([read(path)])


def test_alone_is_no_win(saved):
    text = page(saved(entry("grpo_fast", 0.1), entry("CCE", 0.2, exact=False)))
    assert "In 0 of 1 case" in text and "in 0 it is not" in text
    assert "grpo_fast has nobody to beat" in text


def test_logits_are_measured_against_the_copy(saved):
    changes = {"level": "logits", "floor_flops": 0.0, "floor_bytes": 8e8}
    text = page(saved(entry("grpo_fast", 0.1, **changes), entry("torch", 0.4, **changes)))
    (ours,) = rows(text, "grpo_fast")
    assert ours["GB/s"] == "8.00" and ours["of copy ceiling"] == "80.0 %"
    assert "useful TFLOP/s" not in ours and "of GEMM ceiling" not in ours


def test_share_needs_the_ceiling_of_the_dtype(saved):
    half = CASE | {"dtype": "bfloat16"}
    (ours,) = rows(page(saved(entry("grpo_fast", 0.1, case=half))), "grpo_fast")
    assert ours["useful TFLOP/s"] == "0.0500" and "of GEMM ceiling" not in ours


def test_step_is_ranked_by_tokens_per_second(saved):
    step = {"level": "step", "pass": "step", "error": {"loss": 1e-6}}
    path = saved(entry("grpo_fast", 2.0, **step), entry("TRL", 1.0, **step | {"tokens": 4}))
    text = page(path)
    assert rows(text, "grpo_fast")[0]["tokens/s"] == "8.00"
    assert rows(text, "TRL")[0]["vs grpo_fast"] == "2.00x slower"
    assert rows(text, "TRL")[0]["difference of loss"] == "1.0e-06"
    assert "## step: a whole optimizer step\n\n### small\n" in text
    assert "| step small | N 16, " in readme.tables([read(path)])


def test_steps_that_differ_are_not_ranked(saved):
    step = {"level": "step", "pass": "step", "error": {"loss": 0.1}, "exact": False}
    text = page(saved(entry("grpo_fast", 1.0, **step), entry("TRL", 2.0, **step)))
    assert text.count("**Not ranked**: the contestants' steps differ") == 2
    assert "In 0 of 1 case" in text and "in 0 it is not" in text


def test_step_without_comparison_is_ranked(saved):
    bare = {"level": "step", "peer": "grpo_fast", "case": {"name": "bare"}, "tokens": 16}
    ours, theirs = entry("grpo_fast", 1.0), entry("TRL", 2.0)
    ours["extra_info"], theirs["extra_info"] = bare, bare | {"peer": "TRL", "exact": None}
    text = page(saved(ours, theirs))
    assert list(rows(text, "TRL")[0]) == [
        "contestant",
        "median ms",
        "IQR ms",
        "rounds",
        "vs grpo_fast",
        "tokens/s",
    ]
    assert "\n16 tokens unmasked. Won: the next, TRL, is 2.00x slower." in text


def test_levels_and_passes_have_their_own_tables(saved):
    entries = [
        entry("grpo_fast", 0.1, level=level, **{"pass": name})
        for name in ("forward", "forward+backward")
        for level in ("linear", "logprob", "unheard-of")
    ]
    text = page(saved(*entries))
    heads = [line for line in text.splitlines() if line.startswith("##")]
    assert heads == [
        "## How to read the tables",
        "## Contestants",
        "## linear: the loss from hidden states and the lm_head",
        "### small, forward",
        "### small, forward+backward",
        "## logprob: log-probs from hidden states and the lm_head",
        "### small, forward",
        "### small, forward+backward",
        "## unheard-of",
        "### small, forward",
        "### small, forward+backward",
        "## Not run",
    ]


def test_what_did_not_run_is_listed_with_its_reason(saved):
    skipped = [
        {"level": "linear", "case": case, "peer": "Helion", "reason": "no\n a|b"}
        for case in (CASE, {"name": "large"}, "large")
    ]
    text = page(saved(entry("grpo_fast", 0.1), skipped=skipped))
    assert text.endswith("| Helion | linear: small, large | no a\\|b |\n")
    assert "Nothing: every contestant ran" in page(saved(entry("grpo_fast", 0.1)))


@pytest.mark.parametrize(
    "field", ["case", "tokens", "peer", "level", "pass", "error", "exact", "peak_bytes"]
)
def test_missing_field_is_named(saved, field):
    broken = entry("TRL", 0.1)
    del broken["extra_info"][field]
    with pytest.raises(ValueError, match=rf"cpu.json: test_linear\[TRL\]: .*lacks .*{field}"):
        read(saved(entry("grpo_fast", 0.1), broken))


def changed(part: str, key: str, value: object) -> dict:
    broken = copy.deepcopy(entry("TRL", 0.1))
    broken[part][key] = value
    return broken


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "other", "stats": {}}], "other: extra_info lacks level, case, peer, tokens"),
        ([entry("TRL", 0.1) | {"stats": {"median": 1}}], "stats lack iqr, rounds"),
        ([changed("extra_info", "case", "small")], "case: expected a mapping with a name"),
        ([changed("extra_info", "tokens", 0)], "tokens: expected a number above 0, got 0"),
        ([changed("stats", "median", float("nan"))], "median: expected a number above 0, got nan"),
        ([entry("TRL", 0.1)] * 2, "linear small forward.backward: two records of TRL"),
    ],
)
def test_broken_record_is_named(saved, entries, message):
    with pytest.raises(ValueError, match=message):
        read(saved(*entries))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("]", "not a result file: it is no JSON"),
        ("[]", "not a result file: expected pytest-benchmark's JSON"),
        ('{"benchmarks": []}', "with benchmarks, machine_info, datetime"),
        (
            '{"benchmarks": [], "machine_info": {"device": "cpu"}, "datetime": ""}',
            "machine_info lacks device_name, driver, threads, versions",
        ),
    ],
)
def test_command_line_names_a_file_it_cannot_use(tmp_path, content, message):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=f"^error: .*other.json: .*{message}"):
        report.main([str(path)])


def test_skipped_entry_without_reason_is_named(saved):
    entries = [{"level": "linear", "case": "small", "peer": "TRL"}]
    with pytest.raises(ValueError, match="an entry of skipped lacks reason"):
        read(saved(entry("grpo_fast", 0.1), skipped=entries))


def test_command_line_without_files(monkeypatch, tmp_path, saved, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="error: no result file given"):
        report.main([])
    saved(entry("grpo_fast", 0.1), entry("TRL", 0.2))
    report.main([])
    written = capsys.readouterr().out.split()
    assert written == ["cpu.md", "cpu-ceiling.png", "cpu-error.png"]
    assert {p.name for p in tmp_path.iterdir()} == {*written, "cpu.json"}
    text = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    for name in written[1:]:
        assert f"]({name})" in text
    assert "Nothing is drawn by N" in text and str(tmp_path) not in text


def test_charts(saved, tmp_path):
    sizes = [CASE | {"name": f"n{t}", "T": t} for t in (1024, 2048)]
    entries = [
        entry(peer, k * case["T"], case=case, exact=peer != "CCE", error={"loss": k * 1e-7})
        for case in sizes
        for k, peer in enumerate(["grpo_fast", "TRL", "CCE", "torch"], 1)
    ]
    # an error of exactly 0, one that is not finite, a share far above the ceiling
    entries[1]["extra_info"] |= {"error": {"loss": 0.0}, "floor_flops": 1e16}
    entries[3]["extra_info"]["error"] = {"loss": float("nan")}
    result = read(saved(*entries))
    folder = tmp_path / "charts"
    folder.mkdir()
    drawn = charts.draw(result, "results/cpu.json", folder, "cpu")
    assert [path.name for path in drawn.values()] == [
        "cpu-time.png",
        "cpu-memory.png",
        "cpu-ceiling.png",
        "cpu-error.png",
    ]
    for path in drawn.values():
        data = path.read_bytes()
        assert data.startswith(PNG) and len(data) > 10_000
    assert "Nothing is drawn by N" not in report.page(result, drawn)


def test_errors_that_have_no_place_on_a_log_axis(saved):
    errors = {"grpo_fast": 1e-7, "TRL": 0.0, "CCE": float("nan"), "torch": float("inf")}
    result = read(saved(*(entry(p, 1.0, error={"loss": e}) for p, e in errors.items())))
    figure = charts._error(result, charts._styles(result.peers))
    (axes,) = figure.axes
    points = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "None"]
    assert sorted(points) == [charts.NO_ERROR, 1e-7]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["grpo_fast", "TRL", "at 1e-10: exactly 0"]


def test_no_chart_without_its_data(saved, tmp_path):
    bare = entry("grpo_fast", 1.0)
    bare["extra_info"] = {"level": "step", "peer": "grpo_fast", "case": {"name": "a"}, "tokens": 9}
    assert charts.draw(read(saved(bare)), "", tmp_path, "cpu") == {}
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.00"), (0.01234, "0.0123"), (99.94, "99.9"), (99.96, "100")]
    + [(1234.5, "1,234"), (0.0000123, "0.0000123"), (1.0, "1.00")],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert number(value) == text
