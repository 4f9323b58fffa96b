"""Log-probs of sampled tokens, from logits or from hidden states and the lm_head. The only
vocabulary-sized work of the library; everything behind it is (N,)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import gemm, inputs
from .backend import select
from .chunks import LinearHead, Lora, Needs, autocast_dtype, no_autocast
from .gradients import HeadGradients, fp16_scale
from .handover import apply, compilable, once
from .inputs import Rows
from .parallel import place


class LogProbs(NamedTuple):
    """Per-token results, fp32, shaped like ids, 0 where masked; in nats."""

    logp: Tensor
    """log softmax(z)[id], never above 0."""
    entropy: Tensor | None
    """-sum(p log p) of softmax(z); None unless asked for."""
    lse: Tensor
    """log sum exp(z)."""


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
    grads = HeadGradients(head, needs, main_grad, scale)
    columns_first = head.columns_first and needs.weight and n > head.chunk_rows
    visit = _by_columns if columns_first else _by_rows
    visit(head, ids, stats, upstream, grads, index, n)
    return grads.finish()


def _by_rows(head, ids, stats, upstream, grads, index, n) -> None:
    """The logits of a chunk of rows at a time, all products of them."""
    for chunk in head.chunks(index, n):
        place = chunk.place
        out = head.gradient_view(chunk.logits)
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


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_A, lora_B, ids, rows, options):
        tensors = (hidden, weight, bias, lora_A, lora_B)
        needs = Needs(*ctx.needs_input_grad[:5])
        u = None
        with no_autocast(hidden.device):
            head = _head(tensors, options)
            listed, n = rows.unmasked_index, rows.n_unmasked
            if needs == (True, False, False, False, False):
                stats, u = _stats_and_slope(head, ids, rows, needs, options["entropy"])
            else:
                stats = head_stats(head, ids, listed, n, entropy=options["entropy"])
        ctx.save_for_backward(*tensors, ids, stats, u)
        ctx.options, ctx.mask, ctx.needs = options, rows.mask, needs
        ctx.set_materialize_grads(False)
        # copies: the saved statistics must not change with what the caller does to its results
        return stats[0].clone(), stats[1].clone(), stats[2] + stats[3]

    @staticmethod
    @once
    def backward(ctx, dlogp, dentropy, dlse):
        *tensors, ids, stats, u = ctx.saved_tensors
        if dlogp is None and dentropy is None and dlse is None:
            return (None,) * 8
        upstream = _select((dlogp, dlse, dentropy), ctx.mask, stats[0])
        if u is not None and dentropy is None and dlse is None:
            dlogp = upstream[0][:, None]
            dhidden = (u * dlogp).masked_fill_(dlogp == 0, 0.0)
            return (dhidden.to(tensors[0].dtype), *(None,) * 7)
        with no_autocast(tensors[0].device):
            grads = head_gradients(_head(tensors, ctx.options), ids, stats, upstream, ctx.needs)
        cast = [None if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)]
        return (*cast, None, None, None)


def _head(tensors: tuple[Tensor | None, ...], options: dict) -> LinearHead:
    hidden, weight, bias, lora_A, lora_B = tensors
    options = {name: value for name, value in options.items() if name != "entropy"}
    scale = options.pop("lora_scale")
    lora = None if lora_A is None else Lora(lora_A, lora_B, scale)
    return LinearHead(hidden, weight, bias, lora=lora, **options)


def _stats_and_slope(head: LinearHead, ids: Tensor, rows: Rows, needs: Needs, entropy: bool):
    """Statistics (4, N) and u = dlogp / dhidden (N, H) fp32, with which a frozen head needs no
    product in backward."""
    stats = torch.zeros(4, ids.numel(), dtype=head.dtype, device=ids.device)
    grads = HeadGradients(head, needs)
    for chunk in head.chunks(rows.unmasked_index, rows.n_unmasked):
        own = stats.new_empty(4, chunk.hidden.shape[0])
        args = (chunk.logits, ids[chunk.place], own)
        head.backend.logprob_fwd(*args, entropy=entropy, **chunk.transform)
        stats[:, chunk.place] = own
        out = head.gradient_view(chunk.logits)
        head.backend.logprob_bwd(*args, torch.ones_like(own[0]), out, **chunk.transform)
        grads.add(chunk.hidden, out[0], chunk.place)
    return stats, grads.finish()[0]


def _select(upstream, mask: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Upstream gradients as (N,), 0 where masked; dlogp made when it is missing."""
    zero = torch.zeros_like(like)
    dlogp, *others = (
        None if g is None else torch.where(mask, g.to(like.dtype), zero) for g in upstream
    )
    return (zero if dlogp is None else dlogp, *others)


@compilable
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    workspace_bytes: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> LogProbs:
    """Log-probs of ids under an lm_head, without ever holding the (N, V) logits.

        z = softcap * tanh(logit_scale * (hidden @ (weight + s * B @ A).T + bias) / softcap)
        logp = log_softmax(z / temperature)[ids]

    Logits are fp32 from the product, and statistics and the accumulators of every gradient are
    fp32; each is downcast once. Differentiable in logp, entropy and lse. Backward recomputes the
    logits of the rows whose upstream gradient is not 0. With a frozen head the forward keeps
    dlogp / dhidden (N, H) fp32 instead, and backward through logp has no product: 4NHV in all.
    Under `torch.no_grad` only the forward runs: 2NHV.

    Args:
        hidden: (N, H) or (B, T, H), fp32, fp16, bf16 or fp64.
        weight: (V, H) in the dtype of hidden (or any under autocast); bias: (V,) or None.
        ids: (N,) or (B, T) integers, in [0, V) where unmasked.
        mask: shaped like ids, non-zero where a token counts; masked rows are never read.
        lora: adapter (A (r, H), B (V, r), s) of the lm_head, in one product with the weight.
        temperature: > 0, or a tensor of them: (B,) or shaped like ids.
        softcap: None or > 0. logit_scale: not 0.
        entropy: also return the entropy of each distribution.
        workspace_bytes: bound on the temporary memory in bytes; None: room for 2,048 rows and at
            least 1 GiB on CUDA, 384 MiB elsewhere.
        tp_group: the ranks over which the vocabulary is split: weight (V_r, H), bias (V_r,) and B
            (V_r, r) are this rank's rows, in the order of the ranks, and all else is the same on
            every rank. Their gradients stay local, those of hidden and A are the whole ones on
            every rank. None: a weight or bias that is a DTensor (FSDP2) or partitioned by
            DeepSpeed (ZeRO-3) is gathered in forward and again in backward. Their gradients are
            averaged: over the mesh, and by the hook of the engine that trains the parameter.

    Returns:
        LogProbs, each field shaped like ids, fp32 (fp64 for fp64 inputs), 0 where masked.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
    """
    placed = place(hidden, weight, bias, tp_group, workspace_bytes, ids=ids, mask=mask)
    weight, bias = placed.weight, placed.bias
    inputs.check_head(hidden, weight, bias, softcap, logit_scale)
    lora = inputs.check_lora(lora, hidden, weight)
    backend = placed.rows(select(hidden.device))
    inputs.check_precision("hidden", hidden, backend.name)
    shape = tuple(hidden.shape[:-1])
    flat_mask = inputs.flat_mask(mask, shape, hidden.device)
    temperature, inverse = inputs.check_temperature(temperature, shape, flat_mask)
    rows = inputs.flatten(ids, flat_mask, placed.V, shape)
    options = {
        "backend": backend,
        "workspace_bytes": workspace_bytes,
        "softcap": softcap,
        "logit_scale": float(logit_scale),
        "temperature": temperature,
        "inv_temperature": inverse,
        "autocast_dtype": autocast_dtype(hidden),
        "lora_scale": lora[2],
        "shard": placed.shard,
        "entropy": entropy,
    }
    flat = hidden.reshape(-1, hidden.shape[-1])
    head = (flat, weight, bias, *lora[:2])
    with placed.saved():
        logp, ent, lse = apply(_LinearLogProb, *head, rows.ids, rows, options)
    return LogProbs(logp.view(shape), ent.view(shape) if entropy else None, lse.view(shape))


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, active, options):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        stats = torch.empty(4, ids.numel(), dtype=dtype, device=ids.device)
        backend = select(logits.device)
        backend.logprob_fwd(logits, ids, stats, active=active, **options)
        ctx.save_for_backward(logits, ids, active, stats)
        ctx.options = {name: value for name, value in options.items() if name != "entropy"}
        ctx.set_materialize_grads(False)
        # copies: the saved statistics must not change with what the caller does to its results
        return stats[0].clone(), stats[1].clone(), stats[2] + stats[3]

    @staticmethod
    @once
    def backward(ctx, dlogp, dentropy, dlse):
        logits, ids, active, stats = ctx.saved_tensors
        if dlogp is None and dentropy is None and dlse is None:
            return (None,) * 4
        mask = torch.ones_like(ids, dtype=torch.bool) if active is None else active
        dlogp, dlse, dentropy = _select((dlogp, dlse, dentropy), mask, stats[0])
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        select(logits.device).logprob_bwd(
            logits,
            ids,
            stats,
            dlogp,
            out,
            dlse=dlse,
            dentropy=dentropy,
            active=active,
            **ctx.options,
        )
        return out, None, None, None


@compilable
def logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
) -> LogProbs:
    """Log-probs of ids under given logits: log_softmax(logits / temperature)[ids].

    Arithmetic in fp32 whatever the logits are stored in; the gradient has their dtype.
    Differentiable in logp, entropy and lse.

    Args:
        logits: (N, V) or (B, T, V), stride 1 over V; other strides are free (e.g. `logits[:,
            :-1]`).
        ids: (N,) or (B, T) integers, in [0, V) where unmasked.
        mask: shaped like ids, non-zero where a token counts; masked rows are never read.
        temperature: > 0, or a tensor of them: (B,) or shaped like ids.
        entropy: also return the entropy of each distribution.

    Returns:
        LogProbs, each field shaped like ids, fp32 (fp64 for fp64 logits), 0 where masked.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
    """
    inputs.check_logits(logits)
    inputs.check_precision("logits", logits, select(logits.device).name)
    shape = tuple(logits.shape[:-1])
    flat_mask = inputs.flat_mask(mask, shape, logits.device)
    temperature, inverse = inputs.check_temperature(temperature, shape, flat_mask)
    rows = inputs.flatten(ids, flat_mask, logits.shape[-1], shape)
    cube = logits if logits.dim() == 3 else logits[None]
    active = None if mask is None else rows.mask
    inverse = 1.0 / temperature if inverse is None else inverse
    options = {"inv_temperature": inverse, "entropy": entropy}
    logp, ent, lse = apply(_LogProb, cube, rows.ids, active, options)
    return LogProbs(logp.view(shape), ent.view(shape) if entropy else None, lse.view(shape))
