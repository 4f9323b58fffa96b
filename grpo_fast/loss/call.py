"""One call of a loss as an object: the flat public functions make it, nobody inside passes 27 names
on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.checks import check_tensor, describe, fail, is_number
from grpo_fast.config import LossConfig
from grpo_fast.engine.head import Head
from grpo_fast.objective.tokens import Tokens, Totals

DEFAULT = LossConfig()


@dataclass(frozen=True)
class Execution:
    """How a loss is computed, never what."""

    skip_inactive_forward: bool = False
    max_rows: int | None = None
    workspace_bytes: int | None = None
    main_grad: Tensor | None = None
    grad_scale: float = 1.0


@dataclass(frozen=True)
class Call:
    """A call of `linear_policy_loss`, or of `policy_loss`, where head is None."""

    source: Tensor
    """Hidden states, or logits."""
    head: Head | None
    tokens: Tokens
    config: LossConfig
    totals: Totals = Totals()
    execution: Execution = Execution()
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, T) or (N,)."""
        return tuple(self.source.shape[:-1])


def needs_gradient(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of them want a gradient from this call."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t is not None and t.requires_grad for t in tensors)


def recomputed() -> bool:
    """Whether torch.utils.checkpoint(use_reentrant=False) runs this call a second time, in backward
    and for its saved tensors alone: what a call adds up by itself was added the first time.

    Raises:
        ValueError: this is a backward, and other saved-tensor hooks hide whose.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    # a reentrant checkpoint comes here for the first time: its forward ran without gradients
    if hooks is None:
        return False
    if hooks[0].__qualname__.startswith("_recomputation_hook."):
        return True
    expected = "None where saved-tensor hooks are set inside of a checkpointed function"
    fail("main_grad", expected, "a tensor")


def check_main_grad(execution: Execution, weight: Tensor, gathered: bool) -> None:
    """fp32 (V, H), contiguous, for a weight that is trained and whole (or a shard) here."""
    main_grad, grad_scale = execution.main_grad, execution.grad_scale
    if not is_number(grad_scale) or not 0 < abs(grad_scale) < float("inf"):
        fail("grad_scale", "a finite number other than 0", repr(grad_scale))
    if main_grad is None:
        if grad_scale != 1.0:
            fail("grad_scale", "1.0 without main_grad", grad_scale)
        return
    if gathered:
        fail("main_grad", "None for a weight that is gathered", describe(main_grad))
    if not weight.requires_grad:
        fail("main_grad", "None for a frozen weight", describe(main_grad))
    check_tensor("main_grad", main_grad, tuple(weight.shape), weight.device)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if main_grad.dtype != dtype or not main_grad.is_contiguous() or main_grad.requires_grad:
        expected = f"a contiguous {dtype} tensor that needs no gradient"
        fail("main_grad", expected, describe(main_grad))
