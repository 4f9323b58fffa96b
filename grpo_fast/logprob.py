"""Log-probs of sampled tokens, from logits or from hidden states and the lm_head. The only
vocabulary-sized work of the library; everything behind it is (N,)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import inputs
from .backend import select
from .chunks import HeadGradients, LinearHead, autocast_dtype, fp16_scale, no_autocast
from .parallel import place


class LogProbs(NamedTuple):
    """Per-token results, fp32, shaped like ids, 0 where masked; in nats."""

    logp: Tensor
    """log softmax(z)[id], never above 0."""
    entropy: Tensor | None
    """-sum(p log p) of softmax(z); None unless asked for."""
    lse: Tensor
    """log sum exp(z)."""


def head_stats(head: LinearHead, ids: Tensor, index: Tensor | None, n: int) -> Tensor:
    """Forward over n listed rows: (4, N) logp, entropy, max, log-sum; zeros elsewhere. 2nHV
    FLOPs."""
    stats = torch.zeros(4, ids.numel(), dtype=head.dtype, device=ids.device)
    compact = stats if index is None else torch.empty_like(stats[:, :n])
    rows = ids if index is None else ids[index]
    for chunk in head.chunks(index, n):
        # a slice of (4, n) keeps its row stride, which the kernels take
        head.backend.logprob_fwd(
            chunk.logits, rows[chunk.rows], compact[:, chunk.rows], **head.transform
        )
    if index is not None:
        stats[:, index] = compact
    return stats


def head_gradients(
    head: LinearHead,
    ids: Tensor,
    stats: Tensor,
    upstream: tuple[Tensor, Tensor | None, Tensor | None],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward from (dlogp, dlse, dentropy), each (N,): dhidden, dweight, dbias.

    Recomputes the logits of the rows whose derivative is not exactly 0, and of no other.
    6nHV FLOPs over those n rows; 4nHV when the weight is frozen.
    """
    present = [g for g in upstream if g is not None]
    size = sum(g.abs() for g in present)
    # NaN is not 0: a poisoned row stays in
    index = (size != 0).nonzero()[:, 0]
    n = index.numel()
    index = None if n == ids.numel() else index
    listed = [g if index is None or g is None else g[index] for g in (*upstream, ids)]
    scale = fp16_scale(head.narrow, size)
    if scale is not None:
        listed[:3] = [None if g is None else g * scale for g in listed[:3]]
    dlogp, dlse, dentropy, rows = listed
    compact = stats if index is None else stats[:, index]
    grads = HeadGradients(head, needs, scale)
    for chunk in head.chunks(index, n):
        part = chunk.rows
        out = head.gradient_view(chunk.logits)
        head.backend.logprob_bwd(
            chunk.logits,
            rows[part],
            compact[:, part],
            dlogp[part],
            out,
            dlse=None if dlse is None else dlse[part],
            dentropy=None if dentropy is None else dentropy[part],
            **head.transform,
        )
        grads.add(chunk, out, index)
    return grads.finish()


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, rows, options):
        with no_autocast(hidden.device):
            head = LinearHead(hidden, weight, bias, **options)
            stats = head_stats(head, ids, rows.unmasked_index, rows.n_unmasked)
        ctx.save_for_backward(hidden, weight, bias, ids, stats)
        ctx.options, ctx.mask = options, rows.mask
        ctx.set_materialize_grads(False)
        # copies: the saved statistics must not change with what the caller does to its results
        return stats[0].clone(), stats[1].clone(), stats[2] + stats[3]

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy, dlse):
        hidden, weight, bias, ids, stats = ctx.saved_tensors
        if dlogp is None and dentropy is None and dlse is None:
            return (None,) * 6
        upstream = _select((dlogp, dlse, dentropy), ctx.mask, stats[0])
        needs = tuple(ctx.needs_input_grad[:3])
        with no_autocast(hidden.device):
            head = LinearHead(hidden, weight, bias, **ctx.options)
            grads = head_gradients(head, ids, stats, upstream, needs)
        inputs_ = (hidden, weight, bias)
        cast = [None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs_, strict=True)]
        return (*cast, None, None, None)


def _select(upstream, mask: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Upstream gradients as (N,), 0 where masked; dlogp made when it is missing."""
    zero = torch.zeros_like(like)
    dlogp, *others = (
        None if g is None else torch.where(mask, g.to(like.dtype), zero) for g in upstream
    )
    return (zero if dlogp is None else dlogp, *others)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    workspace_bytes: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> LogProbs:
    """Log-probs of ids under an lm_head, without ever holding the (N, V) logits.

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature
        logp = log_softmax(z)[ids]

    Logits are fp32 from the product, and statistics and the accumulators of dweight and dbias are
    fp32; each gradient is downcast once. Differentiable in logp, entropy and lse. Backward
    recomputes the logits of the rows whose upstream gradient is not 0; a frozen weight costs no
    dweight; under `torch.no_grad` only the forward runs.

    Args:
        hidden: (N, H) or (B, T, H), fp32, fp16, bf16 or fp64.
        weight: (V, H) in the dtype of hidden (or any under autocast); bias: (V,) or None.
        ids: (N,) or (B, T) integers, in [0, V) where unmasked.
        mask: shaped like ids, non-zero where a token counts; masked rows are never read.
        temperature: > 0. softcap: None or > 0. logit_scale: not 0.
        entropy: also return the entropy of each distribution.
        workspace_bytes: bound on the temporary memory in bytes; None: 1 GiB on CUDA, 384 MiB
            elsewhere.
        tp_group: the ranks over which the vocabulary is split: weight (V_r, H) and bias (V_r,) are
            this rank's rows, in the order of the ranks, and all else is the same on every rank.
            Gradients of weight and bias stay local, that of hidden is the whole one on every rank.
            None: a DTensor (FSDP2) is gathered in forward and again in backward, and its gradient
            averaged over its mesh.

    Returns:
        LogProbs, each field shaped like ids, fp32 (fp64 for fp64 inputs), 0 where masked.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
    """
    placed = place(hidden, weight, bias, tp_group, workspace_bytes, ids=ids, mask=mask)
    weight, bias = placed.weight, placed.bias
    inputs.check_head(hidden, weight, bias, softcap, logit_scale)
    inputs.check_temperature(temperature)
    backend = placed.rows(select(hidden.device))
    inputs.check_precision("hidden", hidden, backend.name)
    shape = tuple(hidden.shape[:-1])
    rows = inputs.flatten(ids, mask, placed.V, shape, hidden.device)
    options = {
        "backend": backend,
        "workspace_bytes": workspace_bytes,
        "softcap": softcap,
        "logit_scale": float(logit_scale),
        "temperature": float(temperature),
        "autocast_dtype": autocast_dtype(hidden),
        "shard": placed.shard,
    }
    flat = hidden.reshape(-1, hidden.shape[-1])
    with placed.saved():
        logp, ent, lse = _LinearLogProb.apply(flat, weight, bias, rows.ids, rows, options)
    return LogProbs(logp.view(shape), ent.view(shape) if entropy else None, lse.view(shape))


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, active, options):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        stats = torch.empty(4, ids.numel(), dtype=dtype, device=ids.device)
        backend = select(logits.device)
        backend.logprob_fwd(logits, ids, stats, active=active, **options)
        ctx.save_for_backward(logits, ids, active, stats)
        ctx.options = options
        ctx.set_materialize_grads(False)
        # copies: the saved statistics must not change with what the caller does to its results
        return stats[0].clone(), stats[1].clone(), stats[2] + stats[3]

    @staticmethod
    @once_differentiable
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


def logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
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
        temperature: > 0. entropy: also return the entropy of each distribution.

    Returns:
        LogProbs, each field shaped like ids, fp32 (fp64 for fp64 logits), 0 where masked.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
    """
    inputs.check_logits(logits)
    inputs.check_temperature(temperature)
    inputs.check_precision("logits", logits, select(logits.device).name)
    shape = tuple(logits.shape[:-1])
    rows = inputs.flatten(ids, mask, logits.shape[-1], shape, logits.device)
    cube = logits if logits.dim() == 3 else logits[None]
    active = None if mask is None else rows.mask
    options = {"inv_temperature": 1.0 / float(temperature)}
    logp, ent, lse = _LogProb.apply(cube, rows.ids, active, options)
    return LogProbs(logp.view(shape), ent.view(shape) if entropy else None, lse.view(shape))
