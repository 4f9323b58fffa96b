"""What every file of the package imports of the package, also inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Import(NamedTuple):
    """A file, by its path from the root, and a name of ours that it imports, written in full."""

    path: str
    line: int
    name: str


def parts_of(path: Path) -> list[str]:
    """grpo_fast/loss/linear.py -> [grpo_fast, loss, linear]; a package is its folder."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: Path) -> Iterator[Import]:
    """Every import statement of a file that reaches into grpo_fast, relative ones written out."""
    parts = parts_of(path)
    package = parts if path.name == "__init__.py" else parts[:-1]
    name = str(path.relative_to(ROOT))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            found = [".".join([*base, alias.name]) for alias in node.names]
        for full in found:
            if full.split(".")[0] == "grpo_fast":
                yield Import(name, node.lineno, full)


def public_homes() -> dict[str, str]:
    """Where the names of `grpo_fast` come from: LossConfig -> grpo_fast.config.LossConfig."""
    known = imports_of(ROOT / "grpo_fast" / "__init__.py")
    return {found.name.split(".")[-1]: found.name for found in known}


def package_imports() -> list[Import]:
    """Of all files below grpo_fast/; a name of the front page is given as that of its module."""
    homes = public_homes()
    out = []
    for path in sorted((ROOT / "grpo_fast").rglob("*.py")):
        for found in imports_of(path):
            parts = found.name.split(".")
            if len(parts) == 2 and parts[1] in homes:
                found = found._replace(name=homes[parts[1]])
            out.append(found)
    return out
