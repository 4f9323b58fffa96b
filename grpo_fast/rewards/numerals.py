"""Numbers and fractions in texts, as exact fractions: no rounding, and no parser to attack."""

from __future__ import annotations

import re
from fractions import Fraction

# digits of one number; a fraction of integers this long is still compared in microseconds
_DIGITS = 400
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"([+-]?)({_INTEGER})?(?:\.(\d*))?")
_TAIL = 400
# a number in running text, from its sign or first digit on; every part is bounded
_NUMBER = re.compile(
    r"(?<![\w.])[+-]?(?:\d{1,3}(?:,\d{3}){1,60}(?![\d,])|\d{1,400})(?:\.\d{1,400})?"
    r"(?:/\d{1,400})?|(?<![\w.])[+-]?\.\d{1,400}"
)
_FRACTION = re.compile(r"([+-]?)\\[dtc]?frac\{(-?[\d.,]{1,400})\}\{(-?[\d.,]{1,400})\}")
_SHORT_FRACTION = re.compile(r"([+-]?)\\[dtc]?frac(\d)(\d)")
# what may stand between an equals sign and its number
_BEFORE = re.compile(r"^[\s$({\\]+")
_SPACED = re.compile(r"\s{0,9}([/{}]|^[+-])\s{0,9}")
# what surrounds a number without changing it
_AROUND = ("\\left", "\\right", "\\!", "\\,", "\\;", "\\ ", "\\$", "$", "\\(", "\\)", "\\[", "\\]")


def parse_number(text: str) -> Fraction | None:
    r"""The number that the whole text is, or None.

    Integers with or without thousands' commas, decimals, `a/b` and `\frac{a}{b}` (`\dfrac`,
    `\tfrac`), each with a sign; dollars, spaces and a full stop at the end do not count. Percent,
    powers and units are left to a parser of expressions.
    """
    text = text.strip()
    if len(text) > 3 * _DIGITS:
        return None
    for mark in _AROUND:
        text = text.replace(mark, "")
    # a space inside a number separates two
    text = _SPACED.sub(r"\1", text.replace("\u2212", "-").strip()).removesuffix(".")
    match = _FRACTION.fullmatch(text) or _SHORT_FRACTION.fullmatch(text)
    if match:
        return _ratio(match[1], _plain(match[2]), _plain(match[3]))
    top, slash, bottom = text.partition("/")
    if slash:
        return _ratio("", _plain(top), _plain(bottom))
    return _plain(text)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, looked for in its last 4,000 characters."""
    numbers = numbers_in(text[-10 * _TAIL :])
    return numbers[-1] if numbers else None


def numbers_in(text: str) -> list[Fraction]:
    """The numbers in running text, in order."""
    found = (parse_number(match) for match in _NUMBER.findall(text.replace("\u2212", "-")))
    return [number for number in found if number is not None]


def results_in(text: str, limit: int) -> set[Fraction]:
    """The numbers that stand right after an equals sign; empty when there are more than `limit`."""
    parts = text.split("=", limit + 1)[1:]
    if len(parts) > limit:
        return set()
    found = set()
    for part in parts:
        match = _NUMBER.match(_BEFORE.sub("", part[:_DIGITS], count=1))
        number = parse_number(match[0]) if match else None
        if number is not None:
            found.add(number)
    return found


def _plain(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if not match or len(text) > _DIGITS or not (match[2] or match[3]):
        return None
    # ascii: int() also reads digits of other scripts
    if not text.isascii():
        return None
    whole, part = (match[2] or "0").replace(",", ""), match[3] or ""
    value = Fraction(int(whole + part), 10 ** len(part))
    return -value if match[1] == "-" else value


def _ratio(sign: str, top: Fraction | None, bottom: Fraction | None) -> Fraction | None:
    if top is None or bottom is None or bottom == 0:
        return None
    return -top / bottom if sign == "-" else top / bottom
