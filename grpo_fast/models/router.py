"""The router loss of a mixture of experts, beside a head that never computes logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.checks import fail

from .head import innermost
from .packing import PackedBatch


def router_coefficient(model: nn.Module, coef: float | None) -> float:
    """Coefficient of the router loss: `coef`, or for None that of the model's config; 0 for models
    without experts.

    Raises:
        ValueError: a coefficient above 0 for a model whose router loss is not known.
    """
    lm = innermost(model)
    config = lm.config.get_text_config(decoder=True)
    known = hasattr(config, "output_router_logits") and _family_loss(lm) is not None
    if coef is None:
        found = getattr(config, "router_aux_loss_coef", None)
        return float(found or 0.0) if known else 0.0
    if coef and not known:
        expected = "None or 0 with a model that has no router loss"
        fail("router_aux_loss_coef", expected, coef)
    return float(coef)


def router_loss_of(model: nn.Module, packed: PackedBatch) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """A function of the router logits of all layers of a packed forward -> the family's own loss.

    Padding at the end of a row is left out. The last token of a completion is no input, so that its
    routing, which nothing reads, has no part in it.
    """
    lm = innermost(model)
    config = lm.config.get_text_config(decoder=True)
    experts = next(
        getattr(config, name)
        for name in ("num_experts", "num_local_experts", "n_routed_experts")
        if hasattr(config, name)
    )
    width = packed.input_ids.shape[1]
    # the last input of a row is the one that predicts its last completion token
    last = torch.full((len(packed.input_ids),), -1, device=packed.rows.device)
    last = last.scatter_reduce(0, packed.rows // width, packed.rows % width, "amax")
    used = torch.arange(width, device=last.device)[None] <= last[:, None]

    def loss(router_logits: tuple[Tensor, ...]) -> Tensor:
        return _family_loss(lm)(router_logits, experts, config.num_experts_per_tok, used)

    return loss


def _family_loss(lm: Any) -> Callable[..., Tensor] | None:
    for kind in type(lm).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "load_balancing_loss_func", None)
        if found is not None:
            return found
    return None
