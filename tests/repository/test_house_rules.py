"""The rules of CONTRIBUTING.md that ruff does not know."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("grpo_fast", "kernels", "tests", "benchmarks", "requirements")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in SOURCES if "tests" not in path.relative_to(ROOT).parts]
# more than 12 parameters, and why that is right
MANY_PARAMETERS = {
    "grpo_fast/loss/linear.py:linear_policy_loss": "the flat call that users write",
    "grpo_fast/loss/logits.py:policy_loss": "the flat call that users write",
    "grpo_fast/integrations/liger/linear.py:forward": "stands in for Liger's",
    "grpo_fast/integrations/liger/logits.py:triton_grpo_loss": "stands in for Liger's",
    "grpo_fast/engine/torch_backend.py:policy": "stands in for the kernels' launcher",
    "grpo_fast/engine/torch_backend.py:token_terms": "stands in for the kernels' row",
    "grpo_fast/objective/objectives.py:token_loss": "a kernel compiles it",
    "tests/support/sharded_worker.py:train": "one keyword for each option of a run",
    "grpo_fast/rewards/code.py:code_reward": "one keyword for each option of rule:code",
    "grpo_fast/rewards/judge.py:judge_reward": "one keyword for each option of rule:judge",
    "grpo_fast/trainer/grpo.py:__init__": "the arguments of TRL's trainer, in its order",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Length without the signature and the docstring: long ones of those are no fault."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_file_and_function_length(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    lengths = [(f.name, body_lines(f)) for f in functions(path)]
    assert [(f, n) for f, n in lengths if n > 60] == []


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_public_functions_are_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    public = [f for f in tree.body if isinstance(f, kinds) and not f.name.startswith("_")]
    # what a reader calls `main` or pytest calls by its own names says nothing new
    known = ("main", "test_", "pytest_")
    bare = [f.name for f in public if not ast.get_docstring(f) and not f.name.startswith(known)]
    assert bare == []


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many names a caller can pass."""
    given = function.args
    names = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len([n for n in names if n.arg not in ("self", "cls")])


def test_at_most_twelve_parameters():
    """A kernel has one for each pointer, stride and flag, and is launched by keyword."""
    long = {
        f"{name(path)}:{function.name}"
        for path in SOURCES
        if path.parent != ROOT / "kernels"
        for function in functions(path)
        if parameters(function) > 12
    }
    assert long == set(MANY_PARAMETERS)


def test_no_utils():
    assert [name(path) for path in SOURCES if path.stem in ("utils", "helpers", "misc")] == []
