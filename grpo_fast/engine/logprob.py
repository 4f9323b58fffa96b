"""Log-probs of sampled tokens, from logits or from hidden states and the lm_head. The only
vocabulary-sized work of the library; everything behind it is (N,)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast import checks
from grpo_fast.checks import no_double_backward
from grpo_fast.rows import Rows, check_temperature, flat_mask, flatten

from . import opaque
from .backend import select
from .chunks import LinearHead, Lora, Needs, autocast_dtype, no_autocast
from .head import Head, as_head
from .parallel import Placement, place
from .passes import head_gradients, head_stats, stats_and_slope

Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]


class LogProbs(NamedTuple):
    """Per-token results, fp32, shaped like ids, 0 where masked; in nats."""

    logp: Tensor
    """log softmax(z)[id], never above 0."""
    entropy: Tensor | None
    """-sum(p log p) of softmax(z); None unless asked for."""
    lse: Tensor
    """log sum exp(z)."""


class Checked(NamedTuple):
    """A call that nothing is wrong with."""

    tensors: tuple[Tensor | None, ...]
    """hidden (N, H), weight, bias, A and B, or the logits (B, T, V): what a gradient may be of."""
    rows: Rows
    options: dict[str, Any]
    """The other arguments of the head, or of the row functions."""
    placed: Placement | None = None


def named(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and lse (N,) of statistics (4, N). Copies: what backward keeps must not change
    with what the caller does to its results."""
    return stats[0].clone(), stats[1].clone(), stats[2] + stats[3]


def _select(upstream: Upstream, mask: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """(dlogp, dentropy, dlse) -> (dlogp, dlse, dentropy), each (N,), 0 where masked; dlogp is made
    when it is missing."""
    dlogp, dentropy, dlse = upstream
    zero = torch.zeros_like(like)
    dlogp, *others = (
        None if g is None else torch.where(mask, g.to(like.dtype), zero)
        for g in (dlogp, dlse, dentropy)
    )
    return (zero if dlogp is None else dlogp, *others)


def head_options(
    hidden: Tensor,
    head: Head,
    workspace_bytes: int | None,
    temperature: float,
    inverse: Tensor | None,
    entropy: bool,
) -> dict[str, Any]:
    """Arguments of a `LinearHead`, and whether its entropies are wanted."""
    return {
        "backend": select(hidden.device),
        "workspace_bytes": workspace_bytes,
        "softcap": head.softcap,
        "logit_scale": float(head.logit_scale),
        "temperature": temperature,
        "inv_temperature": inverse,
        "autocast_dtype": autocast_dtype(hidden),
        "lora_scale": head.numbers["lora_scale"],
        "shard": None,
        "entropy": entropy,
    }


def check_linear(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    workspace_bytes: int | None,
    entropy: bool,
) -> Checked:
    """Every ValueError of `linear_logprob`, before any work."""
    placed = place(
        hidden, head.weight, head.bias, head.tp_group, workspace_bytes, ids=ids, mask=mask
    )
    weight, bias = placed.weight, placed.bias
    checks.check_head(hidden, weight, bias, head.softcap, head.logit_scale)
    A, B, lora_scale = checks.check_lora(head.lora, hidden, weight)
    backend = placed.rows(select(hidden.device))
    checks.check_precision("hidden", hidden, backend.name)
    shape = tuple(hidden.shape[:-1])
    keep = flat_mask(mask, shape, hidden.device)
    temperature, inverse = check_temperature(temperature, shape, keep)
    rows = flatten(ids, keep, placed.V, shape)
    options = head_options(hidden, head, workspace_bytes, temperature, inverse, entropy)
    options |= {"backend": backend, "lora_scale": lora_scale, "shard": placed.shard}
    return Checked(
        (hidden.reshape(-1, hidden.shape[-1]), weight, bias, A, B), rows, options, placed
    )


def _open(tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> LinearHead:
    hidden, weight, bias, A, B = tensors
    options = {name: value for name, value in options.items() if name != "entropy"}
    scale = options.pop("lora_scale")
    return LinearHead(
        hidden, weight, bias, lora=None if A is None else Lora(A, B, scale), **options
    )


def linear_forward(
    tensors: tuple[Tensor | None, ...], rows: Rows, options: dict[str, Any], needs: Needs
) -> tuple[Tensor, Tensor | None]:
    """Statistics (4, N), and dlogp / dhidden (N, H) where the head is frozen."""
    with no_autocast(tensors[0].device):
        head = _open(tensors, options)
        if needs == (True, False, False, False, False):
            return stats_and_slope(head, rows.ids, rows, needs, entropy=options["entropy"])
        listed = (rows.unmasked_index, rows.n_unmasked)
        return head_stats(head, rows.ids, *listed, entropy=options["entropy"]), None


def linear_backward(
    tensors: tuple[Tensor | None, ...],
    ids: Tensor,
    mask: Tensor,
    kept: tuple[Tensor, Tensor | None],
    options: dict[str, Any],
    needs: Needs,
    upstream: Upstream,
) -> list[Tensor | None]:
    """Gradients of hidden, weight, bias, A and B, in their dtypes.

    Args:
        kept: what `linear_forward` returned.
        upstream: by logp, entropy and lse, (N,) or None each, not all None.
    """
    stats, u = kept
    dlogp, dlse, dentropy = _select(upstream, mask, stats[0])
    if u is not None and dentropy is None and dlse is None:
        dlogp = dlogp[:, None]
        dhidden = (u * dlogp).masked_fill_(dlogp == 0, 0.0)
        return [dhidden.to(tensors[0].dtype), None, None, None, None]
    with no_autocast(tensors[0].device):
        head = _open(tensors, options)
        grads = head_gradients(head, ids, stats, (dlogp, dlse, dentropy), needs)
    return [None if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)]


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_A, lora_B, rows, options):
        tensors = (hidden, weight, bias, lora_A, lora_B)
        ctx.needs = Needs(*ctx.needs_input_grad[:5])
        stats, u = linear_forward(tensors, rows, options, ctx.needs)
        ctx.save_for_backward(*tensors, rows.ids, stats, u)
        ctx.options, ctx.mask = options, rows.mask
        ctx.set_materialize_grads(False)
        return named(stats)

    @staticmethod
    @no_double_backward
    def backward(ctx, *upstream):
        if all(g is None for g in upstream):
            return (None,) * 7
        *tensors, ids, stats, u = ctx.saved_tensors
        grads = linear_backward(
            tensors, ids, ctx.mask, (stats, u), ctx.options, ctx.needs, upstream
        )
        return (*grads, None, None)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor | Head,
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
        weight: (V, H) in the dtype of hidden (or any under autocast), or a `Head` that says all of
            the head; bias: (V,) or None.
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
    head = as_head(weight, bias, lora, softcap, logit_scale, tp_group)
    if torch.compiler.is_compiling():
        arguments = {"hidden": hidden, **head.traced(), **head.numbers, "ids": ids, "mask": mask}
        arguments |= {"temperature": temperature, "workspace_bytes": workspace_bytes}
        logp, ent, lse, *_ = opaque.call("linear_logprob", arguments)
    else:
        checked = check_linear(hidden, head, ids, mask, temperature, workspace_bytes, entropy)
        with checked.placed.saved():
            logp, ent, lse = _LinearLogProb.apply(*checked.tensors, checked.rows, checked.options)
    shape = hidden.shape[:-1]
    return LogProbs(logp.view(shape), ent.view(shape) if entropy else None, lse.view(shape))


def check_given(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> Checked:
    """Every ValueError of `logprob`, before any work."""
    checks.check_logits(logits)
    checks.check_precision("logits", logits, select(logits.device).name)
    shape = tuple(logits.shape[:-1])
    keep = flat_mask(mask, shape, logits.device)
    temperature, inverse = check_temperature(temperature, shape, keep)
    rows = flatten(ids, keep, logits.shape[-1], shape)
    cube = logits if logits.dim() == 3 else logits[None]
    options = {
        "active": None if mask is None else rows.mask,
        "inv_temperature": 1.0 / temperature if inverse is None else inverse,
    }
    return Checked((cube,), rows, options)


def logits_forward(logits: Tensor, ids: Tensor, options: dict[str, Any], entropy: bool) -> Tensor:
    """Statistics (4, N) of logits (B, T, V); without `entropy` that row is 0."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    stats = torch.empty(4, ids.numel(), dtype=dtype, device=ids.device)
    select(logits.device).logprob_fwd(logits, ids, stats, **options, entropy=entropy)
    return stats


def logits_backward(
    logits: Tensor, ids: Tensor, stats: Tensor, options: dict[str, Any], upstream: Upstream
) -> Tensor:
    """Gradient (B, T, V) of the logits, in their dtype; upstream as in `linear_backward`."""
    active = options["active"]
    mask = torch.ones_like(ids, dtype=torch.bool) if active is None else active
    dlogp, dlse, dentropy = _select(upstream, mask, stats[0])
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    backend = select(logits.device)
    backend.logprob_bwd(logits, ids, stats, dlogp, out, dlse=dlse, dentropy=dentropy, **options)
    return out


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, options, entropy):
        stats = logits_forward(logits, ids, options, entropy)
        ctx.save_for_backward(logits, ids, stats)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return named(stats)

    @staticmethod
    @no_double_backward
    def backward(ctx, *upstream):
        if all(g is None for g in upstream):
            return (None,) * 4
        logits, ids, stats = ctx.saved_tensors
        return logits_backward(logits, ids, stats, ctx.options, upstream), None, None, None


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
    if torch.compiler.is_compiling():
        arguments = {"logits": logits, "ids": ids, "mask": mask, "temperature": temperature}
        logp, ent, lse, *_ = opaque.call("logprob", arguments)
    else:
        checked = check_given(logits, ids, mask, temperature)
        logp, ent, lse = _LogProb.apply(
            *checked.tensors, checked.rows.ids, checked.options, entropy
        )
    shape = logits.shape[:-1]
    return LogProbs(logp.view(shape), ent.view(shape) if entropy else None, lse.view(shape))
