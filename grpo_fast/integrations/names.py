"""Errors in the words of the library whose arguments were given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from grpo_fast.checks import ArgumentError, fail, nearest
from grpo_fast.presets import OBJECTIVES, PRESETS

# the number of an objective that a field of LossConfig stands behind
_BEHIND = {
    "epsilon": ("ratio_low", "epsilon"),
    "epsilon_high": ("ratio_high", "upper_epsilon"),
    "delta": ("ratio_cap",),
}


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """An `ArgumentError` about one of our arguments names the caller's: names[ours] = theirs."""
    try:
        yield
    except ArgumentError as error:
        # "lora A" is a part of lora
        first, *part = error.argument.split(" ")
        raise error.about(" ".join((names.get(first, first), *part))) from error


def owned(loss_type: str, options: dict[str, object]) -> dict[str, object]:
    """The options without what belongs to another loss type: other libraries have one field for
    each at all times, and ours refuses one that would do nothing."""
    others = {"sapo", "vespo"} - {loss_type}
    return {name: value for name, value in options.items() if name.split("_")[0] not in others}


def check_options(loss_type: str, options: Iterable[str], allowed: tuple[str, ...]) -> None:
    """Refuse options that are not among the allowed ones, or that the loss type does not read.

    Raises:
        ValueError: it is named.
    """
    if loss_type not in PRESETS:
        known = nearest(loss_type, list(PRESETS))
        fail("loss_type", "a known loss type", repr(loss_type), known)
    preset = PRESETS[loss_type]
    numbers = set(OBJECTIVES[preset.objective].parameters)
    if "sequence_clipped" in preset.levels:
        numbers |= {"epsilon", "upper_epsilon"}
    for name in options:
        if name not in allowed:
            fail(name, "an option of this adapter", "none of that name", nearest(name, allowed))
        if not numbers & set(_BEHIND.get(name, numbers)) and name in _BEHIND:
            fail(name, f"no value with {loss_type}, which has no use for it", "one")
