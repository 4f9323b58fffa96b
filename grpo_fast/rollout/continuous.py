"""Sampling with transformers' continuous batching: a finished completion makes room for the next
one, so short ones do not wait for the longest."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from grpo_fast.checks import fail
from grpo_fast.models.head import evaluating, innermost

from .failure import SamplerFailed
from .hf import check_prompts, resolve
from .rollouts import Rollouts


class ContinuousSampler:
    """`generate_batch` with the policy itself, in this process, with a paged cache.

    It gives the log-prob of each token under the distribution that was sampled from, in fp32 nats
    at the sampling temperature. The seed of each call is drawn from the global torch RNG.

    Args:
        model: the policy, its parameters whole on this rank.
        generation_config, pad_id, eos_ids: as for `generate`.
        settings: fields of transformers' `ContinuousBatchingConfig`, such as `num_blocks` and
            `max_batch_tokens`; what is left out it sizes itself.

    Raises:
        ValueError: a setting that is ours to set (`seed`, `return_logprobs`) or unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        generation_config: GenerationConfig,
        pad_id: int,
        eos_ids: set[int],
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.eos_ids = model, eos_ids
        self.config = resolve(generation_config, pad_id, eos_ids)
        self.settings = dict(settings or {})
        owned = sorted({"seed", "return_logprobs"} & set(self.settings))
        if owned:
            fail("sampler_kwargs", "none of seed and return_logprobs, which are set here", owned)
        known = ContinuousBatchingConfig.__dataclass_fields__
        for name in self.settings:
            if name not in known:
                fail("sampler_kwargs", f"fields of ContinuousBatchingConfig: {list(known)}", name)

    def sync(self, model: nn.Module) -> None:
        """Sample from this model from now on."""
        self.model = model

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], num_generations: int) -> Rollouts:
        """`num_generations` completions of every prompt.

        Raises:
            SamplerFailed: a request ended without an answer.
        """
        lm = innermost(self.model)
        check_prompts(lm, prompts, num_generations, self.config)
        repeated = [list(prompt) for prompt in prompts for _ in range(num_generations)]
        seed = int(torch.randint(2**31, ()))
        batching = ContinuousBatchingConfig(seed=seed, return_logprobs=True, **self.settings)
        own, config = lm.generation_config, copy.deepcopy(self.config)
        with evaluating(lm), torch.random.fork_rng(enabled=True):
            lm.generation_config = GenerationConfig()
            try:
                found = lm.generate_batch(
                    repeated, generation_config=config, continuous_batching_config=batching
                )
            finally:
                lm.generation_config = own
        outputs = list(found.values())
        wrong = next((o.error for o in outputs if o.error is not None), None)
        if wrong is not None or len(outputs) != len(repeated):
            got = wrong or f"{len(outputs)} of {len(repeated)} requests were answered"
            raise SamplerFailed(f"continuous batching: {got}.")
        tokens = [list(output.generated_tokens) for output in outputs]
        return Rollouts(
            prompt_ids=repeated,
            completion_ids=tokens,
            truncated=[not (row and row[-1] in self.eos_ids) for row in tokens],
            logp=[list(output.logprobs)[: len(output.generated_tokens)] for output in outputs],
        )
