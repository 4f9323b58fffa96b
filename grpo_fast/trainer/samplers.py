"""How the trainer samples: the sampler that its options name, a user's function, all ranks
together, and how far the sampler's log-probs are from the trainer's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_fast.checks import fail
from grpo_fast.rollout.failure import SamplerFailed
from grpo_fast.rollout.hf import HFSampler
from grpo_fast.rollout.rollouts import Rollouts, Sampler, joined

from .metrics import Metrics
from .sampler import is_conversational

logger = logging.getLogger(__name__)
T = TypeVar("T")

_REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
ALARM = (
    "the sampler's log-probs are %.3g nats per token from the trainer's (sampler_tolerance %g): "
    "stale weights, another temperature or top_p, or another precision. The loss corrects by "
    "rollout_correction=%r."
)


def make_sampler(trainer: Any) -> Sampler:
    """The sampler of `trainer.args`, for its model."""
    args = trainer.args
    more = {"generation_config": trainer.generation_config, "eos_ids": trainer.eos_ids}
    here = {**more, "pad_id": trainer.processing_class.pad_token_id}
    if args.sampler == "hf":
        return HFSampler(trainer.model, **here)
    if args.sampler == "continuous":
        from grpo_fast.rollout.continuous import ContinuousSampler

        return ContinuousSampler(trainer.model, **here, settings=args.sampler_kwargs)
    from grpo_fast.rollout.engines import SGLangSampler, VLLMSampler

    folder = args.sampler_weights_dir or Path(args.output_dir) / "sampler_weights"
    kind = {"vllm": VLLMSampler, "sglang": SGLangSampler}[args.sampler]
    known = ("timeout", "patience", "concurrency")
    for name in args.sampler_kwargs or {}:
        if name not in known:
            fail("sampler_kwargs", f"none but {', '.join(known)} of a server", name)
    return kind(
        args.sampler_url,
        **more,
        folder=folder,
        version=lambda: trainer.state.global_step,
        main=trainer.accelerator.is_main_process,
        client=args.sampler_kwargs,
    )


def together(accelerator: Any, work: Callable[[], T]) -> T:
    """work() on every rank; where it fails on one, it fails on all, and nobody waits for ever.

    Raises:
        SamplerFailed: on the ranks whose own work went well.
    """
    error, result = None, None
    # Boundary: whatever it is, it is raised again below, after the others have heard of it.
    try:
        result = work()
    except Exception as failure:
        error = failure
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        said = None if error is None else f"{type(error).__name__}: {error}"
        texts = gather_object([(accelerator.process_index, said)])
        if error is None:
            for rank, text in texts:
                if text is not None:
                    raise SamplerFailed(f"rank {rank} could not sample: {text}")
    if error is not None:
        raise error
    return result


def in_parts(
    sampler: Sampler, prompts: list[list[int]], num_generations: int, most: int | None
) -> Rollouts:
    """Sample at most so many completions at once: the cache of keys and values is as long as all
    that are sampled together."""
    size = len(prompts) if most is None else max(1, most // num_generations)
    parts = [
        sampler.sample(prompts[start : start + size], num_generations)
        for start in range(0, len(prompts), size)
    ]
    return parts[0] if len(parts) == 1 else joined(parts)


def from_function(
    function: Callable[[list[Any], Any], dict[str, Any]],
    prompts: list[Any],
    trainer: Any,
    eos_ids: set[int],
) -> Rollouts:
    """Rollouts of a user's function, in TRL's convention.

    Args:
        function: (prompts, trainer) -> {"prompt_ids", "completion_ids", "logprobs"}: one completion
            for each entry of prompts, in which each prompt stands G times. "logprobs" may be None.
            "env_mask" has 1 for each token that the policy wrote and 0 for those of an environment.
            All other fields go to the rewards.

    Raises:
        ValueError: a field is missing or has another length.
    """
    found = function(prompts, trainer)
    if not isinstance(found, dict):
        fail("rollout_func", f"a dict with {', '.join(_REQUIRED)}", type(found).__name__)
    missing = [name for name in _REQUIRED if name not in found]
    if missing:
        fail("rollout_func", f"a dict with {', '.join(_REQUIRED)}", f"none of {missing}")
    count = len(found["completion_ids"])
    if count != len(prompts):
        expected = f"{len(prompts)} completions, one for each entry of prompts"
        fail("rollout_func", expected, count)
    extras = {k: v for k, v in found.items() if k not in (*_REQUIRED, "env_mask")}
    mask = found.get("env_mask")
    completions = [list(map(int, row)) for row in found["completion_ids"]]
    return Rollouts(
        prompt_ids=[list(map(int, row)) for row in found["prompt_ids"]],
        completion_ids=completions,
        truncated=[not (row and row[-1] in eos_ids) for row in completions],
        logp=None if found["logprobs"] is None else [list(row) for row in found["logprobs"]],
        mask=None if mask is None else [[bool(x) for x in row] for row in mask],
        extras=extras or None,
    )


def raw_prompts(examples: list[dict[str, Any]]) -> list[Any]:
    """Copies of the prompts of examples, text or messages."""
    prompts = [example["prompt"] for example in examples]
    return [[dict(m) for m in p] if is_conversational(p) else p for p in prompts]


def agreement(ours: Tensor, theirs: Tensor, mask: Tensor | None, metrics: Metrics) -> float:
    """Mean |log p(trainer) - log p(sampler)| over the tokens of a micro-batch, nats; logged with
    the largest under TRL's names. Tokens that the sampler said nothing of are left out."""
    gap = (ours - theirs).abs()
    known = ~theirs.isnan()
    gap = gap[known if mask is None else known & mask]
    if gap.numel() == 0:
        return 0.0
    mean, most = gap.mean().item(), gap.max().item()
    metrics.add("sampling/sampling_logp_difference/mean", mean)
    metrics.add("sampling/sampling_logp_difference/max", most, "max")
    return mean


def agrees(gap: float, args: Any) -> bool:
    """Whether the sampler is near enough; an alarm where it is not."""
    # NaN is not near
    near = gap <= args.sampler_tolerance
    if not near:
        logger.warning(ALARM, gap, args.sampler_tolerance, args.rollout_correction)
    return near


@contextlib.contextmanager
def saved_on_failure(trainer: Any, at_boundary: bool) -> Iterator[None]:
    """Inside, a sampler that fails ends the run with a checkpoint of the last whole step.

    at_boundary: nothing of the coming step has been used yet: this is a state to go on from.
    """
    state = torch.get_rng_state()
    try:
        yield
    except SamplerFailed as error:
        step = trainer.state.global_step
        folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        if step and at_boundary and not folder.exists():
            torch.set_rng_state(state)
            trainer._save_checkpoint(trainer.model, trial=None)
        saved = f" Step {step} is saved: resume from {folder}." if folder.exists() else ""
        raise SamplerFailed(f"{error}{saved}") from error
