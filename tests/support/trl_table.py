"""What becomes of TRL's fields and arguments, printed from its real dataclass into docs/trl.md.

`PYTHONPATH=.:tests/support:.trl python tests/support/trl_table.py` writes the table anew.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.trainer.trl_options import HONOURED, OTHER_DEFAULTS, REFUSED, REFUSED_ARGUMENTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trl.md"
BLOCK = re.compile(r"(<!-- trl fields -->\n).*?(<!-- end -->)", re.DOTALL)


def default_of(field: dataclasses.Field) -> Any:
    """Its default, made where it is a factory."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def fields_of_trl() -> dict[str, Any]:
    """{name: default} of TRL's own fields, and of those of Trainer that it gives another one."""
    from trl import GRPOConfig as TRLConfig

    known = {f.name: default_of(f) for f in dataclasses.fields(TrainingArguments)}
    found = {f.name: default_of(f) for f in dataclasses.fields(TRLConfig)}
    missing = object()
    return {n: d for n, d in found.items() if n not in known or known.get(n, missing) != d}


def row_of(name: str, default: Any) -> str:
    """One row of the table: the name, TRL's default, and what this trainer makes of it."""
    ours = {f.name: default_of(f) for f in dataclasses.fields(GRPOConfig)}
    if name in REFUSED:
        text = f"refused: {REFUSED[name][1]}"
    elif name in OTHER_DEFAULTS:
        assert ours[name] != default, name
        text = f"default `{ours[name]!r}`: {OTHER_DEFAULTS[name]}"
    else:
        assert ours[name] == default, name
        text = "same"
    if name in HONOURED:
        text = f"{text}; {HONOURED[name]}"
    return f"| `{name}` | `{default!r}` | {text} |"


def arguments() -> list[str]:
    """Rows of the constructor's arguments."""
    from trl import GRPOTrainer as TRLTrainer

    theirs = list(inspect.signature(TRLTrainer.__init__).parameters)[1:]
    ours = list(inspect.signature(GRPOTrainer.__init__).parameters)[1:]
    assert ours[: len(theirs)] == theirs, "arguments of another order"
    rows = []
    for name in theirs:
        refused = REFUSED_ARGUMENTS.get(name)
        rows.append(f"| `{name}` | {'same' if refused is None else f'refused: {refused}'} |")
    return rows


def table() -> str:
    """Both tables as docs/trl.md has them."""
    rows = [row_of(name, default) for name, default in fields_of_trl().items()]
    head = "| field | TRL's default | here |\n|---|---|---|\n"
    second = "\n\n| argument | here |\n|---|---|\n"
    return head + "\n".join(rows) + second + "\n".join(arguments()) + "\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda m: m[1] + table() + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
