"""The accelerators that a plan can be made for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from grpo_fast.checks import fail, nearest

GIB = 1 << 30

# name -> (GiB that the driver reports or the vendor's data sheet names, spellings). Where a card
# was never at hand the figure is the data sheet's, whose GB are GiB on these cards less what ECC
# and firmware take; _RESERVED covers that.
DEVICES: dict[str, tuple[float, str]] = {
    "B200-180": (178.0, "NVIDIA B200, 180 GB HBM3e"),
    "H200-141": (139.8, "NVIDIA H200, 141 GB HBM3e"),
    "H100-80": (79.1, "NVIDIA H100, 80 GB HBM2e/HBM3"),
    "H100-94": (93.1, "NVIDIA H100 NVL, 94 GB HBM3"),
    "A100-80": (79.1, "NVIDIA A100, 80 GB HBM2e"),
    "A100-40": (39.4, "NVIDIA A100, 40 GB HBM2"),
    "L40S-48": (44.4, "NVIDIA L40S, 48 GB GDDR6 with ECC"),
    "A6000-48": (47.4, "NVIDIA RTX A6000, 48 GB GDDR6"),
    "RTX6000-96": (94.9, "NVIDIA RTX PRO 6000 Blackwell, 96 GB GDDR7"),
    "L4-24": (22.0, "NVIDIA L4, 24 GB GDDR6 with ECC"),
    "A10G-24": (22.0, "NVIDIA A10G, 24 GB GDDR6 with ECC"),
    "5090-32": (31.4, "NVIDIA RTX 5090, 32 GB GDDR7"),
    "4090-24": (23.5, "NVIDIA RTX 4090, 24 GB GDDR6X"),
    "3090-24": (23.5, "NVIDIA RTX 3090, 24 GB GDDR6X"),
    "T4-16": (14.6, "NVIDIA T4, 16 GB GDDR6 with ECC; no bf16"),
    "MI300X-192": (191.0, "AMD Instinct MI300X, 192 GB HBM3"),
    "MI250-64": (63.5, "AMD Instinct MI250, 64 GB HBM2e for each of its two dies"),
}
_SHORT = {"H200": "H200-141", "MI300X": "MI300X-192", "H100": "H100-80", "B200": "B200-180"}
_FORM = re.compile(r"^(?:(\d+)x)?(.+)$", re.IGNORECASE)

# CUDA context, NCCL buffers, cuBLAS workspaces: never measured by us, hence a round number
CONTEXT_BYTES = int(1.2 * GIB)
# share of the rest that a caching allocator loses between blocks: an allowance, not a measurement
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Devices:
    """So many accelerators of one kind."""

    count: int
    name: str
    memory_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What tensors of one rank may take: less the context, and 5 % for fragmentation."""
        return int((self.memory_bytes - CONTEXT_BYTES) * (1 - FRAGMENTATION))

    def __str__(self) -> str:
        return f"{self.count}x{self.name}"


def devices(text: str) -> Devices:
    """`8xH100-80`, `H100-80` or, for a card without a name here, `2x48GiB`.

    Args:
        text: how many, and which.

    Raises:
        ValueError: an unknown name (the nearest is suggested), or a count below 1.
    """
    match = _FORM.match(text.strip())
    expected = f"COUNTxNAME with a NAME of {', '.join(DEVICES)}, or COUNTx48GiB"
    if match is None:
        fail("--gpus", expected, repr(text))
    count, name = int(match[1] or 1), match[2]
    if count < 1:
        fail("--gpus", "at least one", repr(text))
    own = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gi?b", name, re.IGNORECASE)
    if own is not None and float(own[1]) > 0:
        return Devices(count, name, int(float(own[1]) * GIB))
    known = {spelling.upper(): spelling for spelling in DEVICES}
    known |= {short.upper(): long for short, long in _SHORT.items()}
    if name.upper() not in known:
        fail("--gpus", expected, repr(text), nearest(name, list(DEVICES)))
    name = known[name.upper()]
    return Devices(count, name, int(DEVICES[name][0] * GIB))
