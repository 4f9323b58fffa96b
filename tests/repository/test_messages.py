"""Errors of the library have one form: `x: expected A, got B`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "grpo_fast"
ROOMS = ("advantages", "cli", "integrations", "models", "plan", "rollout", "trainer")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def messages(path: Path) -> list[str]:
    """The texts inside a `raise` or a call of `fail`."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    raised = [
        node
        for node in nodes
        if isinstance(node, ast.Raise)
        or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fail")
    ]
    parts = [part for node in raised for part in ast.walk(node)]
    return [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_says_must_be(path):
    assert [text for text in messages(path) if "must be" in text] == []


def test_messages_are_found():
    assert any(
        "map-style" in text or "rows that are" in text for f in FILES for text in messages(f)
    )
