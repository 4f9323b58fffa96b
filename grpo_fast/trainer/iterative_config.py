"""IterativeConfig: what the loop of policy and reward model needs beside their own arguments."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_fast.checks import fail, is_number

from .kl import option as _option
from .mixture import mixture_shares


@dataclass
class IterativeConfig:
    """Arguments of `IterativeGRPO`.

    Raises:
        ValueError: for any value out of range.
    """

    output_dir: str = _option("iterative-output", "Folder of the run.")
    iterations: int = _option(3, "Rounds of collect, label, reward, policy and report.")
    collect_prompts: int = _option(64, "Prompts that are answered and labelled in an iteration.")
    validation_split: float = _option(
        0.2, "Share of all prompts that are held out: of the reward model and of the policy."
    )
    held_out_prompts: int = _option(32, "Held-out prompts answered in an iteration at most.")
    history_share: float = _option(0.1, "beta: share of older iterations in the retraining.")
    history_discount: float = _option(0.9, "gamma: weight for each iteration that one is older.")
    mixture_size: int | None = _option(
        None, "Ranked sets that a reward model is retrained on; default: those of the iteration."
    )
    min_pairs: int = _option(16, "Ordered pairs below which a notice says that a judge ties.")
    retrain: bool = _option(True, "Retrain the reward model; False keeps the first one: a control.")
    patience: int = _option(0, "Iterations without a better judge score to stop after; 0: never.")
    min_delta: float = _option(0.0, "What counts as better.")
    seed: int = _option(42, "Of everything that is drawn.")

    def __post_init__(self) -> None:
        for name in ("iterations", "collect_prompts", "held_out_prompts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                fail(name, "an integer >= 1", repr(getattr(self, name)))
        for name in ("min_pairs", "patience"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                fail(name, "an integer >= 0", repr(getattr(self, name)))
        if self.mixture_size is not None and self.mixture_size < 1:
            fail("mixture_size", "None or an integer >= 1", self.mixture_size)
        if not is_number(self.validation_split) or not 0 < self.validation_split < 1:
            fail("validation_split", "a number in (0, 1)", repr(self.validation_split))
        if not is_number(self.min_delta) or self.min_delta < 0:
            fail("min_delta", "a number >= 0", repr(self.min_delta))
        mixture_shares(2, self.history_share, self.history_discount)
