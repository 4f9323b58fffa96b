"""Heads, memories and models of level (e), as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Model(NamedTuple):
    """A published model and the shape of its lm_head."""

    name: str
    parameters: int
    H: int
    V: int


# hidden_size and vocab_size of the published config.json; parameters counted from the same file,
# a tied lm_head once
SMOLLM2 = (
    Model("SmolLM2-135M", 134_515_008, 576, 49152),
    Model("SmolLM2-360M", 361_821_120, 960, 49152),
    Model("SmolLM2-1.7B", 1_711_376_384, 2048, 49152),
)
MODELS = (
    Model("Qwen2.5-0.5B", 494_032_768, 896, 151936),
    Model("Qwen3-0.6B", 596_049_920, 1024, 151936),
    Model("Llama-3.2-1B", 1_235_814_400, 2048, 128256),
    Model("Qwen2.5-1.5B", 1_543_714_304, 1536, 151936),
    Model("Qwen3-1.7B", 1_720_574_976, 2048, 151936),
    Model("Qwen2.5-3B", 3_085_938_688, 2048, 151936),
    Model("Llama-3.2-3B", 3_212_749_824, 3072, 128256),
    Model("Qwen3-4B", 4_022_468_096, 2560, 151936),
    Model("Qwen2.5-7B", 7_615_616_512, 3584, 152064),
    Model("Llama-3.1-8B", 8_030_261_248, 4096, 128256),
    Model("Qwen3-8B", 8_190_735_360, 4096, 151936),
    Model("Qwen3-14B", 14_768_307_200, 5120, 151936),
    Model("Qwen2.5-32B", 32_763_876_352, 5120, 152064),
    Model("Llama-3.1-70B", 70_553_706_496, 8192, 128256),
    Model("Qwen2.5-72B", 72_706_203_648, 8192, 152064),
    Model("Llama-3.1-405B", 405_853_388_800, 16384, 128256),
)


@dataclass(frozen=True)
class FitCase:
    """One sequence through a head of H by V: how long can it be; and models at N positions."""

    name: str
    H: int
    V: int
    points: tuple[int, ...]
    """Positions at which memory is measured, doubled each time since some chunk sizes are powers of
    two. From about H / 2 on logits outweigh what comes after them, the gradient of the weight."""
    budgets: dict[str, int]
    """Bytes by what they are called."""
    N: int
    models: tuple[Model, ...]
    dtype: torch.dtype = torch.float32
    reserve: int = 0
    """Bytes that were taken off a device's memory to get a budget."""
    points_of: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Other points, by contestant: its workspace has its full size from the first of them on."""
    far: tuple[int, int] = (0, 0)
    """Positions that are run with a vocabulary of far_V; beyond what workspaces hold of them."""
    far_V: int = 0
    far_only: tuple[str, ...] = ()
    """Contestants for which that says something: a smaller vocabulary makes no chunk of theirs
    larger in bytes."""
    narrow: int = 0
    """Another, smaller H to measure at, for the law in H; 0: there is no law."""
    verify_seconds: float = 20.0
    """An answer that would run longer than this is extrapolated."""
    model_seconds: float = 10.0
    """A model's head that would run longer than this is left to the law."""
    only: tuple[str, ...] = ()


_CARD_RESERVE = 4 * 10**9
FIT_CASES: dict[str, tuple[FitCase, ...]] = {
    "cpu": (
        FitCase(
            "smollm2",
            576,
            49152,
            (256, 512, 1024),
            {"1 GiB": 1 << 30, "4 GiB": 4 << 30},
            1024,
            SMOLLM2,
            # TRL's is full at 4,096 positions, which take 4 GiB: its answers lie before that
            points_of={
                "grpo_fast": (2048, 2112, 2240),
                "Liger": (2048, 2112, 2240),
                "verl": (1024, 1088, 1216),
            },
            far=(65536, 98304),
            far_V=128,
            far_only=("grpo_fast", "Liger", "verl"),
            narrow=288,
            verify_seconds=4.0,
            model_seconds=0.0,
            only=("grpo_fast", "torch", "torch LCE", "TRL", "Liger", "CCE torch", "verl"),
        ),
    ),
    "gpu": (
        FitCase(
            "qwen3-8b",
            4096,
            151936,
            (4096, 8192, 16384),
            # of cards; the reserve is for the CUDA context, libraries and gaps between tensors
            {f"{gb} GB": gb * 10**9 - _CARD_RESERVE for gb in (24, 80, 141)},
            32768,
            MODELS,
            torch.bfloat16,
            reserve=_CARD_RESERVE,
            far=(262144, 524288),
            far_V=1024,
            far_only=("grpo_fast", "Liger", "verl", "TRL"),
            only=(
                *("grpo_fast", "torch", "torch LCE", "TRL", "Liger", "Liger FLCE"),
                *("CCE", "CCE exact", "verl", "verl Triton"),
            ),
        ),
    ),
    "tiny": (
        FitCase(
            "tiny",
            32,
            515,
            (64, 128, 256),
            {"32 MiB": 32 << 20},
            512,
            (
                Model("toy of 16", 10_000, 16, 515),
                Model("toy of 48", 30_000, 48, 515),
                Model("toy of 4096", 5_000_000, 4096, 515),
            ),
            only=("grpo_fast", "torch", "TRL", "Liger"),
            # a test on a busy machine must not give up on it
            verify_seconds=600.0,
        ),
    ),
}
