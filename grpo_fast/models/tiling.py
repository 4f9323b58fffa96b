"""An MLP computed a part of the tokens at a time, so that its widest tensors are never whole.

    y = cat([mlp(x_i) for x_i in x.split(tile)])            x (R, L, H)

Each part is checkpointed: it keeps its input, which is a view of x, and runs again in backward.
An MLP looks at one token at a time, so the outputs are the same numbers; the gradients of its
weights are sums over parts instead of one product, which moved them by 1.5e-7 of their size in
fp32. The idea is that of "Arctic Long Sequence Training" (2025), there called TiledMLP.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grpo_fast.checks import fail


def tile_mlp(model: nn.Module, tile: int) -> int:
    """Let the MLP of every decoder layer compute at most `tile` tokens at a time, in training.

    The forward of the module named `mlp` of each layer is replaced on the instance; parameters and
    their names stay. Without a gradient nothing is kept, and parts run one after the other without
    a checkpoint. Tiling a second time sets the new number.

    Args:
        model: the model, wrapped or not.
        tile: tokens of a part, at least 1.

    Returns:
        How many MLPs there are.

    Raises:
        ValueError: tile < 1, no layer has an `mlp`, or one of them is a mixture of experts, which
            may return more than a tensor and balances over all tokens.
    """
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < 1:
        fail("mlp_tile", "None or an integer >= 1", repr(tile))
    found = [m.mlp for m in model.modules() if isinstance(getattr(m, "mlp", None), nn.Module)]
    if not found:
        got = f"none in {type(model).__name__}"
        fail("mlp_tile", "a model whose layers have a module `mlp`", got, "leave mlp_tile out.")
    for mlp in found:
        if any("expert" in name or name.endswith("gate") for name, _ in mlp.named_children()):
            hint = "a mixture of experts chooses over all tokens."
            fail("mlp_tile", "dense MLPs", type(mlp).__name__, hint)
    for mlp in found:
        mlp._grpo_fast_tile = tile
        if "forward" not in mlp.__dict__ or getattr(mlp.forward, "__func__", None) is not _tiled:
            mlp._grpo_fast_whole = mlp.__dict__.get("forward")
            mlp.forward = MethodType(_tiled, mlp)
    return len(found)


def _tiled(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # looked up at each call, so that a deepcopy runs its own weights
    own = self._grpo_fast_whole
    whole = own if own is not None else MethodType(type(self).forward, self)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= self._grpo_fast_tile:
        return whole(x, *args, **kwargs)
    parts = rows.split(self._grpo_fast_tile)
    if torch.is_grad_enabled():
        done = [checkpoint(whole, p, *args, use_reentrant=False, **kwargs) for p in parts]
    else:
        done = [whole(p, *args, **kwargs) for p in parts]
    return torch.cat(done).view(x.shape)
