"""A forward pass over rows of hidden states, and a backward one: chunks of logits and what the row
functions make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.rows import Rows

from . import gemm
from .chunks import LinearHead, Needs
from .gradients import HeadGradients, fp16_scale


def head_stats(
    head: LinearHead, ids: Tensor, index: Tensor | None, n: int, *, entropy: bool = True
) -> Tensor:
    """Forward over n listed rows: (4, N) logp, entropy, max, log-sum; zeros elsewhere, and for the
    entropy where nobody wants it. 2nHV FLOPs."""
    stats = torch.zeros(4, ids.numel(), dtype=head.dtype, device=ids.device)
    compact = stats if index is None else torch.empty_like(stats[:, :n])
    for chunk in head.chunks(index, n):
        # a slice of (4, n) keeps its row stride, which the kernels take
        head.backend.logprob_fwd(
            chunk.logits,
            ids[chunk.place],
            compact[:, chunk.rows],
            entropy=entropy,
            **chunk.transform,
        )
    if index is not None:
        stats[:, index] = compact
    return stats


def head_gradients(
    head: LinearHead,
    ids: Tensor,
    stats: Tensor,
    upstream: tuple[Tensor, Tensor | None, Tensor | None],
    needs: Needs,
    *,
    index: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> list[Tensor | None]:
    """Backward from (dlogp, dlse, dentropy), each (N,): gradients of hidden, weight, bias, A, B.

    Recomputes the logits of the rows in index, or, None, of those whose derivative is not exactly
    0 (one host sync), and of no other. 6nHV FLOPs over those n rows; 4nHV when the weight is
    frozen.
    """
    size = sum(g.abs() for g in upstream if g is not None)
    if index is None:
        # NaN is not 0: a poisoned row stays in
        index = (size != 0).nonzero()[:, 0]
    n = index.numel()
    index = None if n == ids.numel() and head.mask is None else index
    scale = fp16_scale(head.narrow, size)
    if scale is not None:
        upstream = tuple(None if g is None else g * scale for g in upstream)
    grads = HeadGradients(head, needs, n, main_grad, scale)
    by_columns = grads.held is None and head.by_columns(needs, n)
    visit = _by_columns if by_columns else _by_rows
    visit(head, ids, stats, upstream, grads, index, n)
    return grads.finish()


def _by_rows(head, ids, stats, upstream, grads, index, n) -> None:
    """The logits of a chunk of rows at a time, all products of them."""
    for chunk in head.chunks(index, n):
        place = chunk.place
        out = grads.room(chunk.logits)
        dlogp, dlse, dentropy = (None if g is None else g[place] for g in upstream)
        head.backend.logprob_bwd(
            chunk.logits,
            ids[place],
            stats[:, place],
            dlogp,
            out,
            dlse=dlse,
            dentropy=dentropy,
            **chunk.transform,
        )
        grads.add(chunk.hidden, out[0], place)


def _by_columns(head, ids, stats, upstream, grads, index, n) -> None:
    """The logits of a slice of the vocabulary at a time, for all rows: dweight is written once,
    and dhidden is what adds up."""
    hidden, place = head.gather(index, 0, n)
    rows = slice(0, n) if index is None else index
    ids, stats = ids[rows], stats[:, rows]
    dlogp, dlse, dentropy = (None if g is None else g[rows] for g in upstream)
    transform = head.transform(place)
    V, padded = head.weight.shape[0], hidden.shape[0]
    width = max(1, head.budget // (padded * head.dtype.itemsize))
    # 128-bit loads of a slice's rows need its width to be a multiple of 4
    width = min(V, max(16, width // 16 * 16))
    for start in range(0, V, width):
        part = slice(start, min(start + width, V))
        logits = head.logits_buffer(padded, part.stop - start)
        bias = None if head.bias is None else head.bias[part]
        gemm.project(hidden, head.weight[part], bias, logits)
        own = torch.where((ids >= start) & (ids < part.stop), ids - start, -1)
        view = logits[None, :n]
        out = head.gradient_view(view)
        head.backend.logprob_bwd(
            view, own, stats, dlogp, out, dlse=dlse, dentropy=dentropy, **transform
        )
        grads.add_columns(hidden[:n], out[0], part)
    grads.finish_columns(hidden[:n], place)


def stats_and_slope(
    head: LinearHead, ids: Tensor, rows: Rows, needs: Needs, *, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """Statistics (4, N) and u = dlogp / dhidden (N, H) fp32, with which a frozen head needs no
    product in backward."""
    stats = torch.zeros(4, ids.numel(), dtype=head.dtype, device=ids.device)
    grads = HeadGradients(head, needs, rows.n_unmasked)
    for chunk in head.chunks(rows.unmasked_index, rows.n_unmasked):
        own = stats.new_empty(4, chunk.hidden.shape[0])
        args = (chunk.logits, ids[chunk.place], own)
        head.backend.logprob_fwd(*args, entropy=entropy, **chunk.transform)
        stats[:, chunk.place] = own
        out = head.gradient_view(chunk.logits)
        head.backend.logprob_bwd(*args, torch.ones_like(own[0]), out, **chunk.transform)
        grads.add(chunk.hidden, out[0], chunk.place)
    return stats, grads.finish()[0]
