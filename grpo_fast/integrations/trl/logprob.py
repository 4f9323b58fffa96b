"""The log-probs of all of TRL's trainers by `linear_logprob`, and the check of TRL's version."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor

from grpo_fast import linear_logprob

__all__ = ["TESTED", "GRPOTrainer", "patch_trl", "unpatch_trl"]

TESTED = ("1.16.0",)
_WORKS = f"grpo_fast.integrations.trl works with trl {' and '.join(TESTED)}"
try:
    import trl
    from trl import GRPOTrainer
    from trl.trainer import utils as _utils

    _Theirs = _utils._ChunkedLogProbFunction
except (ImportError, AttributeError, RuntimeError) as error:
    raise ImportError(f"{_WORKS} (pip install trl=={TESTED[-1]}): {error}") from error
if trl.__version__ not in TESTED:
    warnings.warn(f"{_WORKS}; {trl.__version__} is installed and untested.", stacklevel=2)


class _FastLogProb:
    """In the place of TRL's ChunkedLogProbFunction."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        if hasattr(weight, "ds_id"):
            raise ValueError("patch_trl cannot honour DeepSpeed ZeRO-3, which partitions lm_head.")
        given = (temperature, chunk_size, softcap, logit_scale)
        rest = tuple(n for n in ("log_sum_sq_probs", "mean_logits", "is_top1") if n in outputs)
        others = (None, None, None)
        if rest:
            # one more forward product: these are not what the log-prob op keeps
            with torch.no_grad():
                others = _Theirs.apply(hidden, weight, bias, targets, *given, rest)[2:]
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        head = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
        out = linear_logprob(
            hidden, weight, targets, temperature=temperature, entropy="entropy" in outputs, **head
        )
        return (out.logp, out.entropy, *others)


def patch_trl() -> contextlib.ExitStack:
    """Let every trainer of TRL compute its log-probs with `linear_logprob`.

    GRPO, RLOO, DPO, KTO, SFT and AsyncGRPO read the function anew in each forward, so it holds for
    trainers that exist already. A second call changes nothing.

    Returns:
        A context manager whose end is `unpatch_trl`, unless TRL was patched before.
    """
    stack = contextlib.ExitStack()
    if _utils._ChunkedLogProbFunction is not _FastLogProb:
        _utils._ChunkedLogProbFunction = _FastLogProb
        stack.callback(unpatch_trl)
    return stack


def unpatch_trl() -> None:
    """Give TRL its own function back; nothing happens when it has it.

    Raises:
        ValueError: something else has replaced it since.
    """
    current = _utils._ChunkedLogProbFunction
    if current is not _FastLogProb and current is not _Theirs:
        raise ValueError("TRL's log-prob function has been replaced since patch_trl; undo that.")
    _utils._ChunkedLogProbFunction = _Theirs
