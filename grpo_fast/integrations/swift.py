"""ms-swift: the log-probs of its GRPO trainer by `linear_logprob`, without logits, and our loss in
its slot for Liger's. `patch_swift` installs both; docs/swift.md has the flag that does."""

from __future__ import annotations

import contextlib
import warnings
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from grpo_fast import linear_logprob
from grpo_fast.checks import fail
from grpo_fast.models.head import find_head
from grpo_fast.models.policy import attach, is_attached

from .liger.linear import LigerFusedLinearGRPOLoss

__all__ = ["TESTED", "patch_swift", "unpatch_swift"]

TESTED = ("4.6.0",)
_WORKS = f"grpo_fast.integrations.swift works with ms-swift {' and '.join(TESTED)}"
_NAMES = ("__init__", "_get_logps_via_local_forward", "_get_per_token_logps_and_entropies_single")
_NAMES += ("_prepare_liger_loss", "_get_train_sampler")
try:
    import swift
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

    _THEIRS = {name: vars(GRPOTrainer)[name] for name in _NAMES}
except (ImportError, AttributeError, KeyError, RuntimeError) as error:
    raise ImportError(f"{_WORKS} (pip install ms-swift=={TESTED[-1]}): {error}") from error
if swift.__version__ not in TESTED:
    warnings.warn(f"{_WORKS}; {swift.__version__} is installed and untested.", stacklevel=2)

# what the rows of the forward under way are masked with
_MASK: ContextVar[Tensor | None] = ContextVar("grpo_fast_swift_mask", default=None)


def _init(self: Any, model: Any = None, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
    refused = {
        "sequence_parallel_size > 1": kwargs["template"].sequence_parallel_size > 1,
        "a multimodal model": model.model_meta.is_multimodal,
    }
    if names := [name for name, given in refused.items() if given]:
        raise ValueError(f"patch_swift cannot honour {', nor '.join(names)}.")
    # under the autocast of a prepared model the check of the head would see rounded logits
    for each in (model, ref_model, kwargs.get("teacher_model")):
        if each is not None:
            attach(each)
    head = find_head(model)
    plain = head.softcap is None and head.logit_scale == 1.0 and head.lora is None
    if kwargs["args"].use_liger_kernel and not plain:
        raise ValueError(
            "patch_swift cannot honour use_liger_kernel with a soft cap, a logit scale or a LoRA "
            "adapter of lm_head, which swift does not hand over: set it to false."
        )
    _THEIRS["__init__"](self, model, ref_model, *args, **kwargs)


def _get_train_sampler(self: Any, *args: Any, **kwargs: Any) -> Any:
    # between Liger's kernels, which replace the forward, and Accelerate, whose autocast wraps it
    attach(self.model)
    return _THEIRS["_get_train_sampler"](self, *args, **kwargs)


def _single(
    self: Any, model: Any, model_inputs: dict, grpo_batch: Any, compute_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    mask = grpo_batch.completion_mask
    if self.template.padding_free:
        # (B, T), filled from the right, to the rows that are packed one after the other
        place = torch.arange(mask.size(1), device=mask.device)
        mask = mask[place >= mask.size(1) - grpo_batch.seq_lengths[:, None]][None]
    token = _MASK.set(mask)
    try:
        return _THEIRS["_get_per_token_logps_and_entropies_single"](
            self, model, model_inputs, grpo_batch, compute_entropy
        )
    finally:
        _MASK.reset(token)


def _local_forward(
    self: Any,
    model: Any,
    model_inputs: dict,
    logits_to_keep: int,
    input_ids: Tensor,
    compute_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if not is_attached(model):
        hint = "call patch_swift before the trainer is built, and replace no forward after that."
        fail("model", "one whose forward takes head_fn", "another", hint)
    ids, mask = input_ids[:, -logits_to_keep:], _MASK.get()

    def head_fn(hidden: Tensor, head: Any) -> tuple[Tensor, Tensor | None]:
        rows = hidden[:, -logits_to_keep - 1 : -1]
        options = {"temperature": self.temperature, "entropy": compute_entropy, "mask": mask}
        out = linear_logprob(rows, head, ids, **options)
        return out.logp, out.entropy

    given = {n: v for n, v in model_inputs.items() if n not in ("logits_to_keep", "use_cache")}
    return model(**given, head_fn=head_fn)


def _prepare_liger_loss(self: Any) -> None:
    with contextlib.ExitStack() as stack:
        if self.args.use_liger_kernel:
            import liger_kernel.chunked_loss as module

            name = LigerFusedLinearGRPOLoss.__name__
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, LigerFusedLinearGRPOLoss)
        _THEIRS["_prepare_liger_loss"](self)


_OURS = (_init, _local_forward, _single, _prepare_liger_loss, _get_train_sampler)
_OURS = dict(zip(_NAMES, _OURS, strict=True))


def patch_swift() -> contextlib.ExitStack:
    """Let ms-swift's GRPOTrainer compute its log-probs with `linear_logprob`, and its
    `use_liger_kernel` with ours.

    It holds for trainers that are built from now on. A second call changes nothing.

    Returns:
        A context manager whose end is `unpatch_swift`, unless swift was patched before.
    """
    stack = contextlib.ExitStack()
    if GRPOTrainer.__init__ is not _init:
        for name, ours in _OURS.items():
            setattr(GRPOTrainer, name, ours)
        stack.callback(unpatch_swift)
    return stack


def unpatch_swift() -> None:
    """Give swift its own methods back; nothing happens when it has them.

    Raises:
        ValueError: something else has replaced one of them since.
    """
    for name in _NAMES:
        if vars(GRPOTrainer)[name] not in (_OURS[name], _THEIRS[name]):
            raise ValueError(f"GRPOTrainer.{name} has been replaced since patch_swift; undo that.")
    for name, theirs in _THEIRS.items():
        setattr(GRPOTrainer, name, theirs)
