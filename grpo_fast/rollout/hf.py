"""Sampling completions from the policy with Hugging Face `generate`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode

from grpo_fast.checks import fail
from grpo_fast.models.head import backbone, evaluating, innermost

from .rollouts import Rollouts

# `generate` replaces an unset field by the checkpoint's own generation_config, and an unset top_k
# by 50. Either samples from another distribution than the loss assumes.
_SAMPLING_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}


class HFSampler:
    """`generate` with the policy itself, in this process: there are no weights to move.

    Args:
        model, generation_config, pad_id, eos_ids: see `generate`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        generation_config: GenerationConfig,
        pad_id: int,
        eos_ids: set[int],
    ) -> None:
        self.model = model
        self.settings = {
            "generation_config": generation_config,
            "pad_id": pad_id,
            "eos_ids": eos_ids,
        }

    def sample(self, prompts: list[list[int]], num_generations: int) -> Rollouts:
        """`num_generations` completions of every prompt, from the global torch RNG."""
        return generate(self.model, prompts, num_generations, **self.settings)

    def sync(self, model: nn.Module) -> None:
        """Sample from this model from now on."""
        self.model = model


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    num_generations: int,
    *,
    generation_config: GenerationConfig,
    pad_id: int,
    eos_ids: set[int],
    shared_prefill: bool = True,
) -> Rollouts:
    """Sample `num_generations` completions of every prompt, from the global torch RNG.

    Runs in eval mode on the causal language model inside `model`, with its adapters. A field of
    `generation_config` that is None is off: the checkpoint's own sampling settings are not read.
    So `do_sample` must be True for sampling, as in transformers.

    Args:
        model: the policy, its parameters whole (not sharded) on this rank.
        prompts: P prompts as token ids.
        num_generations: G.
        generation_config: `max_new_tokens` and the sampling settings; one sequence, no beams.
        pad_id: the padding token; may be an EOS token.
        eos_ids: tokens that end a completion; may be empty.
        shared_prefill: run each prompt through the model once and repeat its cache G times, where
            the model has a plain key-value cache. The completions are the same either way.

    Raises:
        ValueError: an empty prompt, a prompt token outside the vocabulary, a prompt that leaves no
            room for `max_new_tokens` in the context (with the row and the two lengths), or a
            setting that this function does not support.
    """
    lm = innermost(model)
    config = resolve(generation_config, pad_id, eos_ids)
    check_prompts(lm, prompts, num_generations, config)
    ids, mask = _left_pad(prompts, lm.device)
    repeated = {
        "input_ids": ids.repeat_interleave(num_generations, 0),
        "attention_mask": mask.repeat_interleave(num_generations, 0),
    }
    own = lm.generation_config
    with evaluating(lm):
        if shared_prefill and num_generations > 1 and ids.shape[1] > 1:
            repeated.update(_prefill(lm, ids, mask, num_generations, config))
        lm.generation_config = GenerationConfig()
        try:
            out = lm.generate(**repeated, generation_config=config)
        finally:
            lm.generation_config = own
    completions = [_until_eos(row, eos_ids) for row in out[:, ids.shape[1] :].tolist()]
    return Rollouts(
        prompt_ids=[list(prompt) for prompt in prompts for _ in range(num_generations)],
        completion_ids=completions,
        truncated=[not (row and row[-1] in eos_ids) for row in completions],
    )


def resolve(config: GenerationConfig, pad_id: int, eos_ids: set[int]) -> GenerationConfig:
    """Return a copy with every unset field off, after refusing what is not supported."""
    config = copy.deepcopy(config)
    for name, value in _SAMPLING_OFF.items() if config.do_sample else ():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        fail("generation_config", "sampling or greedy search", mode.value)
    if not config.max_new_tokens or config.max_new_tokens < 1:
        fail("generation_config", "max_new_tokens >= 1", config.max_new_tokens)
    if (config.num_return_sequences or 1) != 1:
        got, hint = config.num_return_sequences, "num_generations says how many."
        fail("generation_config", "num_return_sequences=1", got, hint)
    for name in ("stop_strings", "max_time"):
        if getattr(config, name, None) is not None:
            hint = "it ends a completion without an EOS token, which would look truncated."
            fail("generation_config", f"{name}=None", repr(getattr(config, name)), hint)
    if config.no_repeat_ngram_size:
        hint = "it looks at the padding too, so a completion would depend on its neighbours."
        fail("generation_config", "no_repeat_ngram_size=None", config.no_repeat_ngram_size, hint)
    config.pad_token_id = pad_id
    config.eos_token_id = sorted(eos_ids) or None
    config.return_dict_in_generate = False
    return config


def check_prompts(
    lm: PreTrainedModel, prompts: list[list[int]], num_generations: int, config: GenerationConfig
) -> None:
    """Refuse prompts that are empty, hold foreign tokens or leave no room in the context."""
    if not prompts:
        fail("prompts", "at least one prompt", "none")
    if num_generations < 1:
        fail("num_generations", "an integer >= 1", num_generations)
    vocab = lm.get_input_embeddings().num_embeddings
    context = getattr(lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for row, prompt in enumerate(prompts):
        if not prompt:
            fail("prompts", "at least one token", f"none in row {row}")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(token for token in prompt if not 0 <= token < vocab)
            fail("prompts", f"ids in [0, {vocab})", f"{bad} in row {row}")
        if context is not None and len(prompt) + config.max_new_tokens > context:
            room = context - config.max_new_tokens
            expected = f"at most {room} tokens (context {context} less max_new_tokens)"
            fail("prompts", expected, f"{len(prompt)} in row {row}")


def _left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (P, L) int64.

    The filler is the first token of the row itself. The mask hides it from the model, but the
    repetition penalty of older transformers (5.5) looks at the ids only, and would punish a pad
    token, often the EOS, in exactly those rows whose neighbours are longer.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _prefill(
    lm: PreTrainedModel, ids: Tensor, mask: Tensor, repeats: int, config: GenerationConfig
) -> dict[str, Any]:
    """Run all tokens of each prompt but the last, and return the cache repeated for its group.

    Empty when the model has another kind of cache: recurrent states, or one of its own.
    """
    if config.use_cache is False or config.cache_implementation not in (None, "dynamic"):
        return {}
    if not lm._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=lm.config.get_text_config(decoder=True))
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return {}
    prefix, seen = ids[:, :-1], mask[:, :-1]
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    backbone(lm)(
        input_ids=prefix,
        attention_mask=seen,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_repeat_interleave(repeats)
    return {"past_key_values": cache}


def _until_eos(row: list[int], eos_ids: set[int]) -> list[int]:
    end = next((t for t, token in enumerate(row) if token in eos_ids), len(row) - 1)
    return row[: end + 1]
