"""verl: its policy losses and the fused head of its FSDP engine, by configuration alone.

    actor_rollout_ref.model.external_lib=grpo_fast.integrations.verl
    actor_rollout_ref.actor.policy_loss.loss_mode=fast_dapo
    actor_rollout_ref.model.use_fused_kernels=True

verl imports the module in every worker, and importing it is `patch_verl()`.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from torch import nn

from grpo_fast.checks import fail
from grpo_fast.models.head import check_head, find_head
from grpo_fast.presets import PRESETS

from .head import FusedLinearForPPO, fused_forward, linear_cross_entropy
from .losses import WORKS, register, registered, unregister

__all__ = ["patch_verl", "register", "registered", "unpatch_verl"]

# forward of a model class before verl replaced it
_BEFORE: dict[type, Any] = {}


def _patch_forward_with_backends(
    model: nn.Module, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
) -> None:
    """verl's function of that name, and then the check of the head against the model's logits.

    Raises:
        ValueError: the head does something unknown, or the router loss of a mixture of experts,
            which the forward does not return, is asked for.
    """
    kind = type(model)
    before = kind.forward
    theirs = _THEIRS["verl.models.transformers.monkey_patch", "patch_forward_with_backends"]
    theirs(model, use_fused_kernels, fused_kernels_backend)
    if not use_fused_kernels or kind.forward is not fused_forward:
        return
    if before is fused_forward:
        before = next(_BEFORE[each] for each in kind.__mro__ if each in _BEFORE)
    kind.forward = _BEFORE[kind] = before
    if before in _THEIRS.values():
        raise ValueError(
            f"use_fused_kernels: verl has replaced the forward of {kind.__name__} already; import "
            "grpo_fast.integrations.verl before the first model of that class is built"
        )
    if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
        hint = "the auxiliary router loss would be dropped."
        fail("use_fused_kernels", "output_router_logits=False", True, hint)
    # without its layers: their attention may need a GPU, and the model is not there yet. Ranks
    # that wait for the weights of the first one have nothing to compare.
    if not any(p.is_meta for p in model.parameters()):
        check_head(model, find_head(model), run_backbone=False)
    kind.forward = fused_forward


# read anew when the FSDP engine builds a model or runs a forward
_DENSE = "verl.models.transformers.dense_common"
_OURS = {
    (_DENSE, "forward_with_torch_backend"): fused_forward,
    (_DENSE, "forward_with_triton_backend"): fused_forward,
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"): FusedLinearForPPO,
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"): linear_cross_entropy,
    ("verl.models.transformers.monkey_patch", "patch_forward_with_backends"): (
        _patch_forward_with_backends
    ),
}
try:
    _MODULES = {module: importlib.import_module(module) for module, _ in _OURS}
    _THEIRS = {(module, name): getattr(_MODULES[module], name) for module, name in _OURS}
except (ImportError, AttributeError, RuntimeError) as error:
    raise ImportError(f"{WORKS}: {error}") from error


def patch_verl() -> contextlib.ExitStack:
    """Register `fast_<loss type>` for every preset and put our head where verl has its own.

    A second call changes nothing.

    Returns:
        A context manager whose end is `unpatch_verl`.
    """
    for loss_type in PRESETS:
        if f"fast_{loss_type}" not in registered():
            register(f"fast_{loss_type}", loss_type)
    for (module, name), ours in _OURS.items():
        setattr(_MODULES[module], name, ours)
    stack = contextlib.ExitStack()
    stack.callback(unpatch_verl)
    return stack


def unpatch_verl() -> None:
    """Give verl its own functions back and take our losses out of its table.

    A model class whose forward verl has replaced stays as it is, as with verl's own kernels.

    Raises:
        ValueError: something else has replaced one of the functions since.
    """
    for (module, name), theirs in _THEIRS.items():
        if getattr(_MODULES[module], name) not in (theirs, _OURS[module, name]):
            raise ValueError(f"{name} of verl has been replaced since patch_verl; undo that.")
    for (module, name), theirs in _THEIRS.items():
        setattr(_MODULES[module], name, theirs)
    unregister()


patch_verl()
