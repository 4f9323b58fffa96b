"""The table of mutants stays true to the source; `full_mutants.py` runs them."""

from collections import Counter
from pathlib import Path

from full_mutants import SUITES, killed, misplaced
from kernel_mutants import Mutant
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]


def test_every_mutant_has_its_place():
    assert misplaced() == []


def test_the_table_covers_the_loss():
    assert len(MUTANTS) >= 40
    files = Counter(mutant.file for mutant in MUTANTS)
    kernels = sum(n for file, n in files.items() if file.startswith("kernels/row_"))
    assert kernels >= 5 and files["grpo_fast/engine/torch_backend.py"] >= 4
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
    for suite in SUITES.values():
        files = [name for name in suite.arguments if name.endswith(".py")]
        assert files and all((ROOT / name).is_file() for name in files)


def test_a_mutant_is_made_and_taken_back(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("answer = 42\n")
    suite = SUITES["rows"]._replace(arguments=("test_one.py",))
    monkeypatch.setitem(SUITES, "own", suite)
    for check, dead in (("assert answer == 42", True), ("assert answer > 0", False)):
        (tmp_path / "test_one.py").write_text(
            f"from one import answer\n\n\ndef test():\n    {check}\n"
        )
        assert killed(tmp_path, Mutant("one.py", "42", "43", "the answer", "own")) == dead
        assert (tmp_path / "one.py").read_text() == "answer = 42\n"
