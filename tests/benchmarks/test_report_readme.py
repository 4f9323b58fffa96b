"""Results and pictures of README.md and docs/: where they come from, that they are up to date."""

from __future__ import annotations

import functools
import shutil
import subprocess

import pytest
from result_files import CASE, entry, save

from benchmarks.report import page as report
from benchmarks.report import pictures, readme
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
    block = readme.tables([read(path)])
    assert "from [`cpu.json`](../cpu.json)" in block and "[report](../cpu.md)" in block
    assert "**Abacus 2**, 2 threads, torch 2.13.0, 2026-11-21, commit 0123456789 with" in block
    assert (
        "| linear small | N 16, H 4, V 100, float32, active 0.5 | 100 ms, 4.00 MiB"
        " | torch 3.00x | torch 3.00x | 3.00x, 3.00x | - | - |" in block
    )
    assert "none lost: 1 case of a forward pass" in block and "(forward only)" not in block
    assert block.endswith("**no GPU figure exists yet.**")
    gpu = saved(entry("grpo_fast", 0.1), name="gpu", device="cuda")
    both = readme.tables([read(path), read(gpu)])
    assert "no GPU figure" not in both and "`gpu.json`" in both and "`cpu.json`" in both


def test_readme_shows_a_forward_pass_that_is_lost(saved):
    forward = {"pass": "forward"}
    path = saved(entry("grpo_fast", 0.1, **forward), entry("torch", 0.05, **forward))
    block = readme.tables([read(path)])
    assert "| linear small (forward only) |" in block and "torch **0.50x**" in block


def test_readme_without_results_claims_nothing():
    block = readme.tables([])
    assert "claims no speed and no memory figure" in block and "GPU" in block


def page_of(folder, block):
    """A page in `folder` with this block's marks and nothing between them yet."""
    path = folder / block.page.name
    start, end = block.marks
    path.write_text(f"before\n{start}\nold\n{end}\nafter\n", encoding="utf-8")
    return block._replace(page=path)


def test_blocks_are_replaced_and_nothing_else(saved, monkeypatch, tmp_path):
    blocks = [page_of(tmp_path, block) for block in readme.BLOCKS]
    path = saved(entry("grpo_fast", 0.1), entry("TRL", 0.2))
    monkeypatch.setattr(report, "BLOCKS", blocks)
    monkeypatch.setattr(report, "committed", lambda: [path])
    for _ in range(2):
        report.main([str(path), "--readme"])
        for block in blocks:
            start, end = block.marks
            written = f"before\n{start}\n{block.text([read(path)])}\n{end}\nafter\n"
            assert block.page.read_text(encoding="utf-8") == written


@pytest.mark.parametrize("block", readme.BLOCKS, ids=lambda block: block.page.name)
def test_a_page_without_its_marks_is_refused(block):
    start, end = block.marks
    for text in ("", start, end + start, (start + end) * 2):
        with pytest.raises(ValueError, match=f"{block.page.name}: expected the two lines"):
            readme.replaced(text, block, [])


def test_the_front_page_keeps_the_rows_that_are_lost(saved):
    """The row of a case stays when another is faster and smaller, and the losses are counted."""
    level, name = readme.FRONT[1]
    case = {**CASE, "name": name}
    path = saved(
        entry("grpo_fast", 0.2, level=level, case=case),
        entry("TRL", 0.1, level=level, case=case, peak_bytes=2 << 20),
    )
    text = readme.front([read(path)])
    row = "| 200 ms, 4.00 MiB | TRL **0.50x** | TRL **0.50x** | [Abacus 2, 2026-11-21](cpu.md) |"
    assert row in text
    assert "Of 1 timed case grpo_fast is the fastest in 0 and is beaten in 1; in 1" in text
    assert text.endswith("**no GPU figure exists yet.**")
    assert "claimed" in readme.front([])


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


@pytest.mark.parametrize("block", readme.BLOCKS, ids=lambda block: block.page.name)
def test_pages_are_what_the_committed_results_say(block):
    text = block.page.read_text(encoding="utf-8")
    results = [read(path) for path in readme.committed()]
    assert readme.replaced(text, block, results) == text


def test_every_row_of_the_front_page_is_measured():
    found = {(c.level, c.case["name"]) for path in readme.committed() for c in read(path).contests}
    assert set(readme.FRONT) <= found


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_what_their_script_draws(name):
    assert (pictures.IMAGES / name).read_text(encoding="utf-8") == pictures.PICTURES[name]()
