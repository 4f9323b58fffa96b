"""prime-rl: a custom loss, and the head behind its chunked lm_head.

    [trainer.loss]
    type = "custom"
    import_path = "grpo_fast.integrations.prime_rl.policy_loss"
    kwargs = { loss_type = "cispo", epsilon_high = 5.0 }

prime-rl imports the module where it builds the loss, and importing it is `patch_prime_rl()`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor

from grpo_fast.checks import check_tensor, fail
from grpo_fast.config import LossConfig
from grpo_fast.engine.logprob import linear_logprob
from grpo_fast.objective.token_losses import token_losses

from .names import check_options, renamed

__all__ = ["patch_prime_rl", "policy_loss", "unpatch_prime_rl"]

_WORKS = "grpo_fast.integrations.prime_rl works with prime-rl 0.8"
try:
    from prime_rl.trainer.models.layers import lm_head as _lm_head
    from prime_rl.trainer.rl.loss import LossInputs, LossOutputs

    _Theirs = _lm_head._SequenceChunkedLogProbEntropyFn
except (ImportError, AttributeError, RuntimeError) as error:
    raise ImportError(f"{_WORKS}, which is installed from its repository: {error}") from error

_NAMES = {"logp": "trainer_logprobs", "old_logp": "inference_logprobs", "mask": "loss_mask"}
_NAMES |= {"ids": "labels"}
_ARGUMENTS = ("hidden", "weight", "labels", "inv_temperature", "chunk_size")
# the rest of LossConfig is prime-rl's own business
_OPTIONS = ("importance_sampling_level", "epsilon", "epsilon_high", "delta", "cispo_ratio_min")
_OPTIONS += ("beta", "kl_estimator", "kl_gradient", "use_bias_correction_kl", "vespo_lambda_neg")
_OPTIONS += ("off_policy_mask_threshold", "sapo_temperature_pos", "sapo_temperature_neg")
_OPTIONS += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg")


@functools.cache
def _config(loss_type: str, options: tuple[tuple[str, Any], ...]) -> LossConfig:
    # once for all samples; prime-rl divides the sum over tokens by their number
    check_options(loss_type, dict(options), _OPTIONS)
    return LossConfig(loss_type, aggregation="token_mean", **dict(options))


def policy_loss(
    inputs: LossInputs, loss_type: str = "dapo", kl_against: str = "reference", **options: Any
) -> LossOutputs:
    """Sum of the token losses of one sample, for prime-rl to divide by its `loss_scale`.

    The ratio is that of the trainer to the sampler, exp(trainer_logprobs - inference_logprobs).

    Args:
        inputs: log-probs (T,) of one sample, nats, with its advantages (T,), loss_mask (T,) and
            loss_weights (T,) or None.
        loss_type: row of `PRESETS`.
        kl_against: with beta, "reference" (ref_logprobs, or teacher_logprobs in older versions) or
            "inference": the log-probs of the sampler.
        options: fields of `LossConfig`, e.g. epsilon_high. dppo_tv with epsilon 0.2, beta 0.002,
            kl_estimator k2, use_bias_correction_kl false and kl_against inference has the gradient
            of the loss that was v0.8.0's default (whose kl_tau is beta / 2).

    Raises:
        ValueError: an option or a tensor that is wrong, or a beta without what it needs; named.
    """
    for name, value in options.items():
        if not isinstance(value, (int, float, str, type(None))):
            fail(name, "a number, a string or a bool", repr(value))
    config = _config(loss_type, tuple(sorted(options.items())))
    mask, weights = inputs.loss_mask, getattr(inputs, "loss_weights", None)
    ref = _reference(inputs, kl_against, config.beta > 0)
    given = {"mask": mask, "old_logp": inputs.inference_logprobs, "ref_logp": ref}
    rows = {name: None if t is None else t.detach()[None] for name, t in given.items()}
    with renamed(_NAMES):
        logp, advantages = inputs.trainer_logprobs[None], inputs.advantages[None]
        out = token_losses(logp, advantages, config=config, **rows)
    tokens = out.loss[0]
    if weights is not None:
        check_tensor("loss_weights", weights, tuple(tokens.shape), tokens.device)
        tokens = tokens * torch.where(mask, weights, 0.0)
    count = mask.sum().clamp(min=1)
    values = {"importance_ratio": out.ratio, "is_clipped": out.clipped}
    if config.beta > 0:
        values["kl"] = out.kl
    means = {name: (x.sum() / count).detach() for name, x in values.items()}
    return LossOutputs(loss=tokens.sum(), metrics=means)


def _reference(inputs: LossInputs, against: str, needed: bool) -> Tensor | None:
    if against not in ("reference", "inference"):
        fail("kl_against", "'reference' or 'inference'", repr(against))
    if not needed or against == "inference":
        return inputs.inference_logprobs if needed else None
    # its name before 0.8
    found = inputs.ref_logprobs if hasattr(inputs, "ref_logprobs") else inputs.teacher_logprobs
    if found is None:
        fail("ref_logprobs", "them with beta > 0 (or set kl_against)", None)
    return found


class _FastLogProb:
    """In the place of prime-rl's function behind `FusedOutputLinear`."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, labels: Tensor, inv_temperature: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        with renamed(_NAMES):
            temperature = inv_temperature.detach().reciprocal()
            out = linear_logprob(hidden, weight, labels, temperature=temperature, entropy=True)
        return out.logp, out.entropy


def patch_prime_rl() -> contextlib.ExitStack:
    """Let `FusedOutputLinear` compute its log-probs and entropies with `linear_logprob`.

    It holds for models that exist already; a second call changes nothing. A head of other arguments
    than v0.8.0's (those of a sampling mask, since) keeps its own function, with a warning.

    Returns:
        A context manager whose end is `unpatch_prime_rl`.
    """
    if tuple(inspect.signature(_Theirs.forward).parameters)[1:] == _ARGUMENTS:
        _lm_head._SequenceChunkedLogProbEntropyFn = _FastLogProb
    else:
        warnings.warn(f"{_WORKS}.0's head; this one has other arguments and stays.", stacklevel=2)
    stack = contextlib.ExitStack()
    stack.callback(unpatch_prime_rl)
    return stack


def unpatch_prime_rl() -> None:
    """Give prime-rl its own function back; a ValueError where a third one is in its place."""
    if _lm_head._SequenceChunkedLogProbEntropyFn not in (_FastLogProb, _Theirs):
        raise ValueError("prime-rl's head has been replaced since patch_prime_rl; undo that.")
    _lm_head._SequenceChunkedLogProbEntropyFn = _Theirs


patch_prime_rl()
