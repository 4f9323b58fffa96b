"""The benchmark block of README.md: where its numbers come from, and that it is up to date."""

from __future__ import annotations

import functools
import shutil
import subprocess

import pytest
from result_files import entry, save

from benchmarks.report import page as report
from benchmarks.report import readme
from benchmarks.report.records import read


@pytest.fixture
def saved(tmp_path):
    """Writes a result file and returns its path."""
    return functools.partial(save, tmp_path)


def test_readme_block_says_where_numbers_come_from(saved):
    forward = {"pass": "forward"}
    path = saved(
        entry("grpo_fast", 0.1),
        entry("torch", 0.3, peak_bytes=12 << 20),
        entry("grpo_fast", 0.1, **forward),
        entry("torch", 0.3, **forward),
    )
    block = readme.readme_block([read(path)])
    assert "from [`cpu.json`](cpu.json)" in block and "[report](cpu.md)" in block
    assert "**Abacus 2**, 2 threads, torch 2.13.0, 2026-11-21, commit 0123456789 with" in block
    assert (
        "| linear small | N 16, H 4, V 100, float32, active 0.5 | 100 ms, 4.00 MiB"
        " | torch 3.00x | torch 3.00x | 3.00x, 3.00x | - | - |" in block
    )
    assert "none lost: 1 case of a forward pass" in block and "(forward only)" not in block
    assert block.endswith("**no GPU figure exists yet.**")
    gpu = saved(entry("grpo_fast", 0.1), name="gpu", device="cuda")
    both = readme.readme_block([read(path), read(gpu)])
    assert "no GPU figure" not in both and "`gpu.json`" in both and "`cpu.json`" in both


def test_readme_shows_a_forward_pass_that_is_lost(saved):
    forward = {"pass": "forward"}
    path = saved(entry("grpo_fast", 0.1, **forward), entry("torch", 0.05, **forward))
    block = readme.readme_block([read(path)])
    assert "| linear small (forward only) |" in block and "torch **0.50x**" in block


def test_readme_without_results_claims_nothing():
    block = readme.readme_block([])
    assert "claims no speed and no memory figure" in block and "GPU" in block


def test_readme_block_is_replaced_and_nothing_else(saved, monkeypatch, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.MARKS[0]}\nold\n{readme.MARKS[1]}\nafter\n", encoding="utf-8")
    path = saved(entry("grpo_fast", 0.1), entry("TRL", 0.2))
    monkeypatch.setattr(report, "README", page)
    monkeypatch.setattr(report, "committed", lambda: [path])
    report.main([str(path), "--readme"])
    once = page.read_text(encoding="utf-8")
    block = readme.readme_block([read(path)])
    assert once == f"before\n{readme.MARKS[0]}\n{block}\n{readme.MARKS[1]}\nafter\n"
    report.main([str(path), "--readme"])
    assert page.read_text(encoding="utf-8") == once


@pytest.mark.parametrize(
    "text", ["", readme.MARKS[0], readme.MARKS[1] + readme.MARKS[0], "".join(readme.MARKS * 2)]
)
def test_readme_without_its_marks_is_refused(text):
    with pytest.raises(ValueError, match="README.md: expected the two lines"):
        readme.replaced(text, "block")


def test_only_committed_results_count(saved, monkeypatch, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        shutil.copy(saved(entry("grpo_fast", 0.1)), folder / f"{name}.json")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", folder)
    # what surrounds the folder of the test must not count as its repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert [path.name for path in readme.committed()] == ["a.json", "b.json"]
    for command in (["init", "-q"], ["add", "benchmarks/results/b.json"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert [path.name for path in readme.committed()] == ["b.json"]


def test_readme_is_what_the_committed_results_say():
    text = readme.README.read_text(encoding="utf-8")
    if readme.MARKS[0] not in text:
        pytest.skip("the README has no benchmark block yet")
    block = readme.readme_block([read(path) for path in readme.committed()])
    assert readme.replaced(text, block) == text
