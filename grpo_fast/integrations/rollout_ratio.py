"""What other libraries hand over finished: the ratio p(old) / p(rollout) as a number, and the
token count of a whole window."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.checks import describe, fail
from grpo_fast.config import LossConfig


def fold(
    config: LossConfig,
    mask: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ratio: Tensor | None,
    score: Callable[[], Tensor],
) -> dict[str, Tensor | None]:
    """Arguments of the loss in which a given rollout ratio is contained.

    The ratio multiplies the objective and not the KL: it is a factor of the advantage, in which
    every objective is homogeneous. In vespo it is one of the weight w of the sequence, which is
    p / p(rollout): log p(rollout) = old_logp - log(ratio), each within [1e-8, exp(20)].

    Args:
        mask: (B, T). advantages: (B,) or (B, T). old_logp: (B, T) or None.
        ratio: (B,) or (B, 1), which counts once for the sequence, or (B, T); None: 1.
        score: log-probs of the policy, for a vespo without old_logp.
    """
    given = {"advantages": advantages.contiguous(), "old_logp": old_logp}
    if ratio is None:
        return given
    B, T = mask.shape
    allowed = ((B,), (B, 1), (B, T))
    if tuple(ratio.shape) not in allowed or ratio.device != mask.device:
        fail("ratio", f"tensor ({B},), ({B}, 1) or ({B}, {T}) on {mask.device}", describe(ratio))
    ratio = ratio.detach().to(torch.promote_types(ratio.dtype, torch.float32))
    ratio = ratio[:, None] if ratio.dim() == 1 else ratio
    if config.loss_type != "vespo":
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        return {**given, "advantages": (advantages * ratio).expand(B, T).contiguous()}
    log_ratio = ratio.log().clamp(math.log(1e-8), 20.0)
    if ratio.shape[1] == 1:
        log_ratio = log_ratio / (mask != 0).sum(1, keepdim=True).clamp(min=1)
    if old_logp is None:
        with torch.no_grad():
            given["old_logp"] = old_logp = score()
    return {**given, "rollout_logp": old_logp - log_ratio}


def tokens_per_rank(mask: Tensor, num_items: Tensor | float | None) -> Tensor | None:
    """`denominator` of a token mean: num_items of a whole window and all ranks, or else the tokens
    of this call summed over the ranks, divided by their number; None where this call's own count is
    meant."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is None and ranks == 1:
        return None
    if num_items is None:
        num_items = (mask != 0).sum().float()
        dist.all_reduce(num_items)
    tokens = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device)
    return (tokens / ranks).clamp(min=1.0)
