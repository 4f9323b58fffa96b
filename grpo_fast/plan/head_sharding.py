"""Whether an lm_head that stays split by the vocabulary moves less than a gathered one.

For n tokens of a micro-batch over all W ranks, with elements of `itemsize` bytes, each rank moves

    gathered     (W - 1) / W * V * H * (itemsize + gradient)     all-gather, reduce-scatter
    vocabulary   (W - 1) / W * n * H * (itemsize + 4)            all-gather, reduce-scatter in fp32
                 + (W - 1) / W * n * 16                          four statistics of each token

and holds, of the weight and its gradient, V * H of each against V * H / W. Products are the same:
2NHV and 4NHV over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_fast.checks import fail


@dataclass(frozen=True)
class HeadTraffic:
    """What one micro-batch moves and holds for the lm_head, on each of the ranks."""

    tokens: int
    """Over all ranks."""
    H: int
    V: int
    ranks: int
    gathered_bytes: int
    """Moved when the head is gathered (FSDP2, ZeRO-3)."""
    vocabulary_bytes: int
    """Moved when it stays split by the vocabulary."""
    gathered_held: int
    """Of the weight and its fp32 gradient, at most at one time."""
    vocabulary_held: int
    break_even: int
    """Tokens over all ranks below which `head_sharding="vocabulary"` moves less."""

    @property
    def wins(self) -> bool:
        """True when the split head moves less."""
        return self.vocabulary_bytes < self.gathered_bytes

    def __str__(self) -> str:
        better = "vocabulary" if self.wins else None
        return "\n".join(
            (
                f"head on {self.ranks} ranks, {self.tokens} tokens over all of them:",
                f"  gathered     moves {_mib(self.gathered_bytes)}, "
                f"holds {_mib(self.gathered_held)}",
                f"  vocabulary   moves {_mib(self.vocabulary_bytes)}, "
                f"holds {_mib(self.vocabulary_held)}",
                f"  head_sharding={better!r} moves less; break-even at {self.break_even} tokens",
            )
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def head_traffic(
    tokens: int, H: int, V: int, ranks: int, *, itemsize: int = 2, gradient: int = 4
) -> HeadTraffic:
    """Bytes that one micro-batch moves for the lm_head on each rank, gathered and split.

    Args:
        tokens: of a micro-batch over all ranks.
        H, V: width and vocabulary.
        ranks: W >= 2.
        itemsize: bytes of an element of the weight and of the hidden states as they travel.
        gradient: bytes of an element of the gradient as it is reduced.

    Raises:
        ValueError: a number below its least.
    """
    for name, value, low in (("tokens", tokens, 1), ("H", H, 1), ("V", V, 1), ("ranks", ranks, 2)):
        if value < low:
            fail(name, f"at least {low}", value)
    share = (ranks - 1) / ranks
    per_token = H * (itemsize + 4) + 16
    per_row = H * (itemsize + gradient)
    held = V * H * (itemsize + 4)
    return HeadTraffic(
        tokens=tokens,
        H=H,
        V=V,
        ranks=ranks,
        gathered_bytes=round(share * V * per_row),
        vocabulary_bytes=round(share * tokens * per_token),
        gathered_held=held,
        vocabulary_held=-(-held // ranks),
        break_even=V * per_row // per_token,
    )
