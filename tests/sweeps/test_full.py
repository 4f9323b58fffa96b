"""The runner of `make test-full`, with sweeps that take no time."""

import json

import full
import pytest
from full import ROOT, Sweep

GOOD = Sweep("It is fine.", ("-c", "open(r'{numbers}', 'w').write('{\"share\": 0.97}')"))
BAD = Sweep("It is not.", ("-c", "raise SystemExit(3)"))
SILENT = Sweep("It forgets its figures.", ("-c", "r'{numbers}'"))
FIELDS = {"name", "passed", "numbers", "seconds", "versions", "commit", "date", "exit_status"}


@pytest.fixture
def sweeps(monkeypatch):
    table = {"good": GOOD, "bad": BAD, "silent": SILENT}
    monkeypatch.setattr(full, "SWEEPS", table)
    return table


def entries(folder):
    data = json.loads((folder / "full.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in data["sweeps"]}


def test_a_failing_sweep_is_recorded_and_the_rest_still_runs(sweeps, tmp_path, capsys):
    assert full.main(["--results", str(tmp_path)]) == 1
    found = entries(tmp_path)
    assert list(found) == ["good", "bad", "silent"]
    assert [e["passed"] for e in found.values()] == [True, False, False]
    assert found["good"]["numbers"] == {"share": 0.97} and found["bad"]["exit_status"] == 3
    assert all(set(entry) >= FIELDS for entry in found.values())
    assert found["good"]["versions"]["torch"]
    shown = capsys.readouterr().out
    assert "[2/3] bad: FAILED, exit status 3" in shown and "1 of 3 sweeps passed" in shown
    page = (tmp_path / "full.md").read_text(encoding="utf-8")
    assert "## good: passed" in page and "## bad: FAILED" in page and "| share | 0.97 |" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.json", "full.md"]


def test_only_keeps_the_other_results(sweeps, tmp_path):
    full.main(["--results", str(tmp_path)])
    before = entries(tmp_path)
    sweeps["bad"] = GOOD
    assert full.main(["--only", "bad", "--results", str(tmp_path)]) == 0
    after = entries(tmp_path)
    assert after["bad"]["passed"] and after["good"] == before["good"]
    del sweeps["silent"]
    assert full.main(["--only", "good", "--only", "bad", "--results", str(tmp_path)]) == 0
    assert list(entries(tmp_path)) == ["good", "bad"]


def test_an_unknown_name_is_an_error_and_writes_nothing(sweeps, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        full.main(["--only", "godo", "--results", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no sweep is called 'godo'. Known: good, bad, silent." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_git_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert full.provenance()["commit"] is None


def test_the_committed_result_is_of_every_sweep():
    found = entries(ROOT / "tests" / "results")
    assert list(found) == list(full.SWEEPS)
    assert [name for name, entry in found.items() if not entry["passed"]] == []
    page = (ROOT / "tests" / "results" / "full.md").read_text(encoding="utf-8")
    assert page == full.table(list(found.values()))


def test_every_command_names_a_file_that_exists():
    for sweep in full.SWEEPS.values():
        files = [part for part in sweep.command if part.endswith(".py")]
        assert files and all((ROOT / name).is_file() for name in files)
