"""Compares what a program returned with what was expected, outside the sandbox.

What comes from the sandbox is never hashed and none of its methods is called: containers are lists,
tuples and `Unordered`, and two sets are compared by sorting the encodings of their items. Integers
chosen to collide would make a set of 60,000 of them cost minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .child import decode, encode

TYPES = ("strict", "json")


@dataclass(frozen=True)
class Unordered:
    """A set, frozenset or dict as its items or pairs, in the order in which they came."""

    tag: bytes
    items: list[Any]


def read(data: bytes) -> Any:
    """The value that `data` encodes, its sets and dicts as `Unordered`.

    Raises:
        NotPlain: for bytes that encode none.
    """
    return decode(data, _make)


def neutral(value: Any) -> Any:
    """`value` as `read` would give it.

    Raises:
        NotPlain: for a value that is no plain data.
    """
    return read(encode(value))


def same(got: Any, expected: Any, *, types: str = "strict", tolerance: float = 0.0) -> bool:
    """Whether two values of `read` or `neutral` are equal.

    Args:
        got: what the program returned.
        expected: what it should have returned.
        types: "strict" asks for the same type at every level, so that neither True nor 1.0 is 1.
            "json" compares numbers by value and a tuple as a list, for data sets that went through
            JSON; True is still not 1.
        tolerance: floats a, b, and the parts of complex numbers, are equal when
            |a - b| <= tolerance * max(1, |b|), but for those inside a set and as keys. NaN equals
            NaN.
    """
    if types == "json":
        got, expected = _as_json(got), _as_json(expected)
    number = type(got) in (int, float) and type(expected) in (int, float)
    if number and (types == "json" or type(got) is type(expected)):
        return _close(got, expected, tolerance)
    if type(got) is not type(expected):
        return False
    if isinstance(got, (list, tuple)):
        if len(got) != len(expected):
            return False
        pairs = zip(got, expected, strict=True)
        return all(same(*pair, types=types, tolerance=tolerance) for pair in pairs)
    if isinstance(got, Unordered):
        return _same_unordered(got, expected, types, tolerance)
    if isinstance(got, complex):
        parts = ((got.real, expected.real), (got.imag, expected.imag))
        return all(_close(*pair, tolerance) for pair in parts)
    return got == expected


def _make(tag: bytes, items: list[Any]) -> Any:
    if tag == b"l":
        return items
    return tuple(items) if tag == b"t" else Unordered(tag, items)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _close(got: float, expected: float, tolerance: float) -> bool:
    if got == expected or (got != got and expected != expected):
        return True
    if not tolerance or type(got) is type(expected) is int:
        return False
    try:
        return abs(got - expected) <= tolerance * max(1.0, abs(expected)) < math.inf
    # an integer beyond the largest float
    except OverflowError:
        return False


def _same_unordered(got: Unordered, expected: Unordered, types: str, tolerance: float) -> bool:
    if got.tag != expected.tag or len(got.items) != len(expected.items):
        return False
    if got.tag != b"d":
        return _keys(got.items, types) == _keys(expected.items, types)
    left = sorted((_key(key, types), index) for index, (key, _) in enumerate(got.items))
    right = sorted((_key(key, types), index) for index, (key, _) in enumerate(expected.items))
    return all(
        one == other
        and same(got.items[i][1], expected.items[j][1], types=types, tolerance=tolerance)
        for (one, i), (other, j) in zip(left, right, strict=True)
    )


def _keys(items: list[Any], types: str) -> list[bytes]:
    return sorted(_key(item, types) for item in items)


def _key(value: Any, types: str) -> bytes:
    """Bytes that are equal for equal values."""
    if isinstance(value, Unordered):
        return value.tag + encode(_keys(value.items, types))
    if isinstance(value, (list, tuple)):
        tag = b"l" if types == "json" or isinstance(value, list) else b"t"
        return tag + encode([_key(item, types) for item in value])
    if isinstance(value, float):
        # -0.0 equals 0.0
        value += 0.0
        if types == "json" and value.is_integer():
            value = int(value)
    return encode(value)
