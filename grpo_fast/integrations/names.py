"""Errors in the words of the library whose arguments were given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """A ValueError about one of our arguments names the caller's: names[ours] = theirs."""
    try:
        yield
    except ValueError as error:
        # every message of ours begins with the name of the argument
        text = re.sub(r"^\w+", lambda m: names.get(m[0], m[0]), str(error))
        raise ValueError(text) from error


def owned(loss_type: str, options: dict[str, object]) -> dict[str, object]:
    """The options without what belongs to another loss type: other libraries have one field for
    each at all times, and ours refuses one that would do nothing."""
    others = {"sapo", "vespo"} - {loss_type}
    return {name: value for name, value in options.items() if name.split("_")[0] not in others}
