"""The fields of `GRPOConfig` that describe sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig

from .kl import option as _option


@dataclass
class SamplingOptions:
    """How completions are sampled, and how many."""

    num_generations: int = _option(8, "Completions per prompt: the group. At least 2.")
    num_generations_eval: int | None = _option(
        None, "Completions per prompt in evaluation; default: num_generations."
    )
    max_completion_length: int = _option(512, "Tokens sampled at most.")
    generation_batch_size: int | None = _option(
        None, "Completions sampled at once over all ranks; excludes steps_per_generation."
    )
    steps_per_generation: int | None = _option(
        None, "Micro-batches sampled at once; default: gradient_accumulation_steps."
    )
    temperature: float = _option(
        LossConfig.temperature, "Sampling temperature; the loss uses it too."
    )
    top_p: float = _option(1.0, "Nucleus sampling; 1.0 switches it off.")
    top_k: int = _option(0, "Sample among the k likeliest tokens; 0 switches it off.")
    min_p: float | None = _option(None, "Smallest share of the top token's probability.")
    repetition_penalty: float = _option(1.0, "Penalty of repeated tokens; 1.0 switches it off.")
    generation_kwargs: dict | str | None = _option(
        None, "Further fields of GenerationConfig (dict or JSON)."
    )

    ds3_gather_for_generation: bool = _option(
        True,
        "FSDP2 and ZeRO-3: hold all weights on every rank while sampling. False gathers each layer "
        "for each token: less memory, and an all-gather of the model for every token.",
    )

    def check_sampling(self) -> None:
        """Refuse numbers out of range and what other fields own."""
        # (name, largest value, whether 0 is allowed)
        for name, high, zero in (
            ("top_p", 1.0, False),
            ("min_p", 1.0, True),
            ("repetition_penalty", math.inf, False),
            ("ref_model_mixup_alpha", 1.0, False),
        ):
            value = getattr(self, name)
            if name == "min_p" and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (
                not number
                or not 0 <= value <= high
                or value == math.inf
                or (value == 0 and not zero)
            ):
                bounds = f"{'[' if zero else '('}0, {high:g}{']' if high < math.inf else ')'}"
                fail(name, f"a number in {bounds}", repr(value))
        owned = {"max_new_tokens", "do_sample", "num_return_sequences", "temperature"}
        clash = sorted(owned & set(self.generation_kwargs or {}))
        if clash:
            hint = (
                "set max_completion_length, num_generations and temperature of GRPOConfig, which "
                "the loss uses too."
            )
            fail("generation_kwargs", f"none of {', '.join(sorted(owned))}", clash, hint)
