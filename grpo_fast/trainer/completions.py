"""Completions of a run: a table in the terminal and one parquet file for each log."""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

# characters of a cell in the table; the parquet files hold all
_LONGEST = 200

_ESCAPES = re.compile(
    r"\x1b[P\]^_X].*?(?:\x07|\x1b\\|\x9c)"  # strings: title, clipboard, device control
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # cursor, colour, erase
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Model text without terminal control sequences, control characters and direction overrides.

    New lines and tabs stay; lone surrogates, which no file can hold, become question marks.
    """
    text = _CONTROLS.sub("", _ESCAPES.sub("", text))
    return text.encode("utf-8", "replace").decode("utf-8")


class CompletionLog:
    """Completions between two logs: a table in the terminal and one parquet file for each log."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the rows."""
        self.rows: list[dict[str, Any]] = []

    def state_dict(self) -> list[dict[str, Any]]:
        """The rows that are still to be written, JSON-able."""
        return self.rows

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        self.rows = state

    def flush(
        self,
        accelerator: Any,
        folder: Path,
        step: int,
        limit: int | None,
        kind: str = "completions",
    ) -> None:
        """Print and write the rows of all ranks on the main process, then forget them; a limit of 0
        prints none. kind: how the name of the file begins."""
        rows = self.rows
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rows = gather_object(rows)
        self.rows = []
        if rows and accelerator.is_main_process:
            write_parquet(rows, folder / f"{kind}_{step:05d}.parquet")
            if limit != 0:
                print_table(rows, step, limit)


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows (prompt, completion, rewards, ...) as one parquet file, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    columns = {name: None for row in rows for name in row}
    table = pyarrow.table({name: [_storable(row.get(name)) for row in rows] for name in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    pyarrow.parquet.write_table(table, part)
    os.replace(part, path)


def _storable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def print_table(rows: list[dict[str, Any]], step: int, limit: int | None = None) -> None:
    """Print completions with their rewards, each prompt once above those of its group.

    Model text is stripped of control sequences and shortened in its middle. It is written above
    the progress bar, which stays whole.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from tqdm import tqdm

    shown = rows if limit is None else rows[:limit]
    names = {name: None for row in shown for name in row}
    columns = [name for name in names if name not in ("step", "prompt")]
    more = "" if len(shown) == len(rows) else f", {len(shown)} of {len(rows)}"
    table = Table(title=f"Completions, step {step}{more}", expand=False)
    for name in columns:
        number = name != "completion"
        table.add_column(Text(plain(name)), justify="right" if number else "left", overflow="fold")
    last = None
    for row in shown:
        if row.get("prompt") != last:
            last = row.get("prompt")
            table.add_section()
            heading = Text(_cell(last), style="bold")
            table.add_row(*(heading if name == "completion" else Text("") for name in columns))
        table.add_row(*(Text(_cell(row.get(name))) for name in columns))
    text = io.StringIO()
    width = shutil.get_terminal_size((100, 24)).columns
    Console(file=text, width=width).print(table)
    tqdm.write(text.getvalue().rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else shortened(plain(str(value)))


def shortened(text: str, most: int = _LONGEST) -> str:
    """text with its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    head = (most - 3) * 2 // 3
    return f"{text[:head]}...{text[len(text) - (most - 3 - head) :]}"
