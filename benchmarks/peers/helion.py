"""Helion: listed with the reason why it cannot take part."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.peers.peer import Peer, unavailable


def _helion_example(case: Case, level: str, device: torch.device) -> str | None:
    return (
        "Helion's GRPO loss is an example in its repository and not in the package, and has to be"
        " autotuned for each shape first."
    )


CONTESTANTS: tuple[Peer, ...] = (
    Peer("Helion", "helion", "examples/grpo_loss.py", {"logits": unavailable}, _helion_example),
)
