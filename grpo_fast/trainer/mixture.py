"""How much of which iteration a reward model is retrained on.

    share of D_t = 1 - beta,   share of D_k = beta gamma^(t-k) / sum over j < t of gamma^(t-j)

The sum makes a distribution of it: without it the shares add up to more than 1 from the third
iteration on. In the first iteration all is new.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from grpo_fast.checks import fail, is_number

T = TypeVar("T")


def mixture_shares(iterations: int, beta: float, gamma: float) -> list[float]:
    """Shares of D_1 ... D_t; they add up to 1.

    Args:
        iterations: t.
        beta: share of all older ones together, in [0, 1).
        gamma: discount for each iteration that one is older, in (0, 1].

    Raises:
        ValueError: a number out of range.
    """
    if not is_number(beta) or not 0 <= beta < 1:
        fail("history_share", "a number in [0, 1)", repr(beta))
    if not is_number(gamma) or not 0 < gamma <= 1:
        fail("history_discount", "a number in (0, 1]", repr(gamma))
    if iterations < 1:
        fail("iterations", "an integer >= 1", iterations)
    if iterations == 1:
        return [1.0]
    weights = [gamma ** (iterations - k) for k in range(1, iterations)]
    return [*(beta * w / sum(weights) for w in weights), 1 - beta]


def mixture_counts(sizes: Sequence[int], size: int, beta: float, gamma: float) -> list[int]:
    """How many of each iteration's sets make a mixture of `size`, by largest remainders.

    An iteration with fewer sets than its share gives all; what it lacks is taken from the newest,
    and from older ones where that has no more.

    Raises:
        ValueError: a number out of range.
    """
    exact = [share * size for share in mixture_shares(len(sizes), beta, gamma)]
    # 0.1 * 10 is 1.0000000000000002 in some orders
    counts = [int(value + 1e-9) for value in exact]
    order = sorted(range(len(sizes)), key=lambda k: (-(exact[k] - counts[k]), -k))
    for k in order[: size - sum(counts)]:
        counts[k] += 1
    counts = [min(count, have) for count, have in zip(counts, sizes, strict=True)]
    for k in reversed(range(len(sizes))):
        counts[k] += min(size - sum(counts), sizes[k] - counts[k])
    return counts


def mixture(
    data: Sequence[Sequence[T]], beta: float, gamma: float, seed: str, size: int | None = None
) -> list[T]:
    """A mixture of D_1 ... D_t, drawn without replacement by the seed, oldest first.

    Args:
        data: the sets of each iteration, the newest last.
        beta, gamma: see `mixture_shares`.
        seed: of the drawing.
        size: None: as many as the newest iteration has.

    Raises:
        ValueError: a number out of range.
    """
    sizes = [len(part) for part in data]
    counts = mixture_counts(sizes, sizes[-1] if size is None else size, beta, gamma)
    rng = random.Random(seed)
    drawn = []
    for part, count in zip(data, counts, strict=True):
        chosen = sorted(rng.sample(range(len(part)), count))
        drawn += [part[i] for i in chosen]
    return drawn
