"""The rules of CONTRIBUTING.md that ruff does not know."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("grpo_fast", "kernels", "tests", "benchmarks", "requirements")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in SOURCES if "tests" not in path.relative_to(ROOT).parts]
# These know the mathematics alone, so that nothing above them can leak into it.
LEAVES = ("config", "objectives", "weights", "advantages")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def ours(path: Path) -> set[str]:
    """Modules of grpo_fast that a file imports, by their last name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("grpo_fast.")}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.split(".")[0] != "grpo_fast":
                continue
            inner = module if node.level else module.partition(".")[2]
            found |= {inner.split(".")[0]} if inner else {a.name for a in node.names}
    return found


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


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_nothing_of_ours_but_config(leaf):
    assert ours(ROOT / "grpo_fast" / f"{leaf}.py") <= {"config"} - {leaf}


def test_kernels_import_only_kernels():
    for path in (ROOT / "kernels").glob("*.py"):
        assert ours(path) <= {"kernels"}, name(path)


def test_no_utils():
    assert [name(path) for path in SOURCES if path.stem in ("utils", "helpers", "misc")] == []
