"""The fields of `GRPOConfig` that describe sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_fast.checks import fail, is_number
from grpo_fast.config import LossConfig

from .kl import option as _option

SAMPLERS = ("hf", "continuous", "vllm", "sglang")


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

    sampler: str = _option(
        "hf",
        "Where completions come from: hf (generate), continuous (transformers' continuous "
        "batching), or a server that runs already: vllm, sglang.",
    )
    sampler_url: str | None = _option(None, "Address of that server, such as http://host:8000.")
    sampler_kwargs: dict | str | None = _option(
        None,
        "Further settings (dict or JSON): of ContinuousBatchingConfig, or timeout, patience and "
        "concurrency of the requests to a server.",
    )
    sampler_weights_dir: str | None = _option(
        None,
        "Folder through which a server gets the weights of each step; default: in output_dir.",
    )
    sampling_batch_size: int | None = _option(
        None, "Completions that one process samples at once at most; default: all of its window."
    )
    sampler_tolerance: float = _option(
        0.05, "Mean nats per token between sampler and trainer above which an alarm is given."
    )
    old_logp_source: str = _option(
        "trainer",
        "Who says the old log-probs: trainer, or sampler where its own agree with the trainer's.",
    )

    def check_sampler(self) -> None:
        """Refuse samplers that are unknown, and what the chosen one has no use for."""
        if self.sampler not in SAMPLERS:
            hint = "assign any object with sample and sync to trainer.sampler for another one."
            fail("sampler", f"one of {', '.join(SAMPLERS)}", repr(self.sampler), hint)
        server = self.sampler in ("vllm", "sglang")
        for name in ("sampler_url", "sampler_weights_dir"):
            if not server and getattr(self, name) is not None:
                expected = f"None with sampler={self.sampler!r}, which is no server"
                fail(name, expected, repr(getattr(self, name)))
        if server and not self.sampler_url:
            fail("sampler_url", f"the address of the {self.sampler} server", repr(self.sampler_url))
        if self.sampler == "hf" and self.sampler_kwargs:
            expected = "None with sampler='hf', which takes generation_kwargs"
            fail("sampler_kwargs", expected, self.sampler_kwargs)
        if self.old_logp_source not in ("trainer", "sampler"):
            fail("old_logp_source", "'trainer' or 'sampler'", repr(self.old_logp_source))
        if self.sampler != "hf" and self.sampling_batch_size is not None:
            expected = f"None with sampler={self.sampler!r}, which schedules by itself"
            fail("sampling_batch_size", expected, self.sampling_batch_size)
        if not is_number(self.sampler_tolerance) or not self.sampler_tolerance > 0:
            fail("sampler_tolerance", "nats per token > 0", repr(self.sampler_tolerance))

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
