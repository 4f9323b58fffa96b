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
