"""Padded (B, L, ...) to packed (N, ...) and back, as in flash-attn 2.8."""

import torch
from torch import Tensor


def rearrange(tensor: Tensor, pattern: str) -> Tensor:
    """einops.rearrange for the one pattern there is."""
    assert pattern == "b s ... -> (b s) ...", pattern
    return tensor.flatten(0, 1)


def index_first_axis(tensor: Tensor, indices: Tensor) -> Tensor:
    """Rows of (B L, ...)."""
    return tensor[indices]


def unpad_input(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(B, L, ...) -> rows (N, ...), their indices, cu_seqlens (B+1,), the longest, lengths."""
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden.flatten(0, 1)[indices], indices, ends, int(lengths.max()), lengths


def pad_input(rows: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """Rows (N, ...) -> (B, L, ...), zeros elsewhere."""
    whole = rows.new_zeros(batch * length, *rows.shape[1:])
    return whole.index_copy(0, indices, rows).view(batch, length, *rows.shape[1:])
