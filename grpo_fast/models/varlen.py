"""Rows of segments for flash attention and flex attention.

flash attention's `flash_attn_varlen_func` takes queries and keys of other lengths, and aligns its
causal triangle at the bottom right: the queries of a segment see all keys of its root, which stand
before its own. The root's keys are gathered once for each segment; the copies are made again in
backward instead of being kept. flex attention gets a block mask of who sees whom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .segments import Segments

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
FLEX = "flex_attention"


def _bounds(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def varlen_arguments(segments: Segments, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """The keys that each segment reads, (M,) int64 into the row, and where which one's begin."""
    keys, key_lengths = [], []
    for start, length, root in segments.rows:
        first, before = segments.rows[root][:2] if root >= 0 else (0, 0)
        keys += [torch.arange(first, first + before), torch.arange(start, start + length)]
        key_lengths.append(before + length)
    lengths = [n for _, n, _ in segments.rows]
    return torch.cat(keys).to(device), {
        "cu_seqlens_q": _bounds(lengths, device),
        "cu_seqlens_k": _bounds(key_lengths, device),
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(key_lengths),
    }


class _Again(torch.autograd.Function):
    """f(q, k, v) of which only q, k and v are kept: it is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, f: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.f = f
        return f(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.f(*leaves)
        return *torch.autograd.grad(out, leaves, grad), None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    kernel: Callable[..., Tensor],
) -> Tensor:
    """Attention over segments by a kernel with the signature of `flash_attn_varlen_func`.

    Args:
        query: (1, heads, T, D).
        key, value: (1, kv heads, T, D).
        segments: how the T tokens are divided.
        scale: of the scores; None: 1 / sqrt(D).
        kernel: (T, heads, D), (M, kv heads, D), (M, kv heads, D), cu_seqlens_q, cu_seqlens_k,
            max_seqlen_q, max_seqlen_k, softmax_scale, causal -> (T, heads, D), and its causal mask
            is aligned at the bottom right.

    Returns:
        (1, T, heads, D).
    """
    keys, bounds = segments.cached(
        ("varlen", query.device), lambda: varlen_arguments(segments, query.device)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.index_select(0, keys) for x in (k, v))
        out = kernel(q, k, v, softmax_scale=scale, causal=True, **bounds)
        # some versions return their logsumexp too
        return out[0] if isinstance(out, tuple) else out

    tokens_first = [x[0].transpose(0, 1) for x in (query, key, value)]
    # only what is rooted is copied
    rooted = any(root >= 0 for _, _, root in segments.rows)
    out = _Again.apply(*tokens_first, attend) if rooted else attend(*tokens_first)
    return out[None]


def with_flash(
    module: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    """`varlen_attention` by the flash attention that transformers has loaded for the model."""
    from transformers.integrations.flash_attention import get_target_dtype
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    (_, kernel, *_), _ = lazy_import_flash_attention(module.config._attn_implementation)
    # layers in fp32 under PEFT, and fp32 rotary embeddings
    dtype = get_target_dtype(q, module)
    if dtype is not None:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    return varlen_attention(q, k, v, segments, scale, kernel)


def block_mask(segments: Segments, device: Any) -> Any:
    """The mask of flex attention for a row of segments."""
    from torch.nn.attention.flex_attention import create_block_mask

    where = torch.device("cpu" if device is None else device)
    lengths = torch.tensor([n for _, n, _ in segments.rows], device=where)
    own = torch.arange(len(segments.rows), device=where).repeat_interleave(lengths)
    roots = torch.tensor([root for _, _, root in segments.rows], device=where)[own]

    def sees(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((own[q] == own[k]) & (k <= q)) | (roots[q] == own[k])

    n = segments.tokens
    return create_block_mask(sees, None, None, n, n, device=where)
