"""What tells two runs apart beside their options: columns of the data, and the rewards' code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from types import CodeType
from typing import Any


def columns_digest(dataset: Any) -> str:
    """Hash of every column of a dataset but `prompt`: answers that rewards read, in their order.

    What JSON does not know counts by its type, bytes by their hash.
    """
    digest = hashlib.sha256()
    for row in dataset:
        others = {name: value for name, value in row.items() if name != "prompt"}
        digest.update(json.dumps(others, sort_keys=True, default=_named).encode())
    return digest.hexdigest()[:16]


def code_digest(functions: Iterable[Any]) -> str:
    """Hash of what reward functions compute: their code and constants, not what they call."""
    digest = hashlib.sha256()
    for function in functions:
        inner = getattr(function, "__func__", function)
        # of an object it is that of its class
        own = getattr(inner, "__code__", None)
        code = own or getattr(vars(type(inner)).get("__call__"), "__code__", None)
        digest.update(_said(code).encode() if code is not None else type(inner).__name__.encode())
    return digest.hexdigest()[:16]


def _named(value: Any) -> str:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return type(value).__name__


def _said(value: Any) -> str:
    # a constant may be a tuple, or a set whose order is another one in each process
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()}{value.co_names}{_said(value.co_consts)}"
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(_said, value)))
    if isinstance(value, tuple):
        return repr([_said(item) for item in value])
    return repr(value)
