"""Who counts how much: `loss = sum(weight * token_loss)`. No collectives: whoever knows the ranks
passes `denominator`."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.checks import fail
from grpo_fast.config import LossConfig
from grpo_fast.presets import AGGREGATIONS


def boundaries(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sequence boundaries (S+1,) int64 of a padded (B, T) or a packed (N,) batch."""
    if cu_seqlens is not None:
        return cu_seqlens.to(device=mask.device, dtype=torch.int64)
    if mask.dim() == 2:
        rows, length = mask.shape
        return torch.arange(rows + 1, device=mask.device) * length
    if mask.dim() != 1:
        fail("mask", "(B, T), or packed (N,)", tuple(mask.shape))
    fail("cu_seqlens", "the (S+1,) boundaries of a packed (N,) batch", None)


def sequence_sum(values: Tensor, bounds: Tensor) -> Tensor:
    """Sum of values (N,) over each sequence -> (S,), in a fixed order, accumulated in float64 and
    rounded once to the dtype of values."""
    if values.numel() == 0:
        return values.new_zeros(bounds.numel() - 1)
    # On a CPU the addends come one after the other. In fp32 that loses 1.6e-4 of a gradient at
    # 65k tokens, since equal addends are rounded the same way; in float64 what is left is the
    # rounding of the addends.
    # MPS has nothing wider than fp32.
    # unsafe: nothing of the boundaries, which `rows` has checked, is read back from the device
    wide = values if values.device.type == "mps" else values.double()
    total = torch.segment_reduce(wide, "sum", offsets=bounds, axis=0, unsafe=True, initial=0.0)
    return total.to(values.dtype)


def spread(values: Tensor, bounds: Tensor, n: int) -> Tensor:
    """Repeat values (S,) over the tokens of each sequence -> (N,)."""
    return torch.repeat_interleave(values, bounds.diff(), output_size=n)


def count(config: LossConfig, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """What this batch adds to the denominator: tokens (token_mean) or sequences (the others).

    Args:
        mask: (B, T), or packed (N,) with cu_seqlens; non-zero where a token counts.
        cu_seqlens: (S+1,) int boundaries of a packed batch.

    Returns:
        0-d int64 tensor on the device of mask. Fully masked sequences count as sequences.
    """
    if AGGREGATIONS[config.weights] == "tokens":
        return (mask != 0).sum()
    # a fill, not a copy from the host: nothing waits
    return torch.full((), boundaries(mask, cu_seqlens).numel() - 1, device=mask.device)


def token_weights(
    config: LossConfig,
    mask: Tensor,
    bounds: Tensor,
    denominator: Tensor | float | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight (N,) of every token; exactly 0 where mask is False.

    sequence_mean (grpo): 1 / (length_i * denominator); token_mean (dapo) and sequence_sum (luspo):
    1 / denominator, of tokens and of sequences; constant_length (dr_grpo): 1 / (denominator *
    max_completion_length).

    Args:
        mask: (N,) bool.
        bounds: (S+1,) int64 from `boundaries`.
        denominator: count over the accumulation window (and ranks / world size); None: this
            batch's.
    """
    scheme = config.weights
    if denominator is None:
        denominator = mask.sum() if AGGREGATIONS[scheme] == "tokens" else bounds.numel() - 1
    if isinstance(denominator, Tensor) and denominator.device.type == "cpu":
        # a copy of it to an accelerator would wait
        denominator = denominator.item()
    if not isinstance(denominator, Tensor):
        denominator = torch.full((), denominator, device=mask.device, dtype=dtype)
    total = denominator.to(mask.device, dtype).reshape(())
    if scheme == "sequence_mean":
        lengths = sequence_sum(mask.to(dtype), bounds).clamp(min=1.0)
        weight = spread(1.0 / (lengths * total), bounds, mask.numel())
    elif scheme == "constant_length":
        weight = (1.0 / (total * config.max_completion_length)).expand(mask.shape)
    else:
        weight = (1.0 / total).expand(mask.shape)
    # with nothing unmasked the total may be 0, and 1 / 0 is selected away here
    return torch.where(mask, weight, torch.zeros_like(weight))
