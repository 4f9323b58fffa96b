"""The policy loss, sum(weight * token_loss), from logits or from hidden states and the lm_head.

Token-level ratios go in one pass (logits chunk -> objective -> dlogits in place -> dhidden,
dweight: 6NHV); sequence-level ratios in two (log-probs of all, objective on (N,), backward on the
rows that still have a gradient: 2NHV + 6NHV times their share). Without a gradient wanted: 2NHV.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import inputs, objectives
from .backend import Backend, select
from .batch import Batch, objective_arguments, prepare
from .chunks import HeadGradients, LinearHead, autocast_dtype, fp16_scale, no_autocast
from .config import LossConfig
from .logprob import head_gradients, head_stats
from .metrics import Terms, summarize
from .parallel import place
from .weights import sequence_sum, spread


def _two_pass_terms(batch: Batch, stats: Tensor) -> Terms:
    """The objective on (N,): from log-probs to weighted losses and their derivative by logp."""
    config, mask = batch.config, batch.rows.mask
    logp = stats[0]
    n = logp.numel()
    fields = batch.listed(None, logp.dtype)
    old = logp if batch.old_logp is None else fields["old_logp"]
    # a banned token has logp - logp = NaN, as it must; a masked one is 0
    log_ratio = torch.where(mask, logp - old, torch.zeros_like(logp))
    by_sequence = config.level == "sequence"
    if by_sequence:
        lengths = sequence_sum(mask.to(logp.dtype), batch.bounds).clamp(min=1.0)
        log_ratio = spread(sequence_sum(log_ratio, batch.bounds) / lengths, batch.bounds, n)
    choice = objective_arguments(config)
    loss, by_logp, by_ratio, ratio, kl = objectives.token_loss(
        logp,
        log_ratio,
        logp if batch.ref_logp is None else fields["ref_logp"],
        fields["advantages"],
        *choice["parameters"],
        config.beta,
        choice["objective"],
        choice["kl"],
        choice["kl_gradient"],
        choice["through_ratio"],
        choice["weight_kl"],
        batch.ref_logp is not None,
    )
    zero = torch.zeros_like(logp)
    weights = fields["weights"]
    by_logp = torch.where(mask, by_logp * weights, zero)
    by_ratio = torch.where(mask, by_ratio * weights, zero)
    if by_sequence:
        # every token of a sequence moves its mean log-ratio by 1 / length
        by_ratio = spread(sequence_sum(by_ratio, batch.bounds) / lengths, batch.bounds, n)
        by_ratio = torch.where(mask, by_ratio, zero)
    loss = torch.where(mask, loss * weights, zero)
    dlogp = by_logp + by_ratio
    return Terms(loss, logp, stats[1], ratio, kl, dlogp, log_ratio, fields["advantages"], mask)


def _one_pass_terms(
    terms: Tensor, batch: Batch, index: Tensor | None, mask: Tensor | None
) -> Terms:
    """Name the rows that the policy kernels filled; index lists the tokens they belong to."""
    fields = batch.listed(index, terms.dtype)
    old = fields["old_logp"]
    log_ratio = torch.zeros_like(terms[1]) if old is None else terms[1] - old
    return Terms(*terms, log_ratio, fields["advantages"], mask)


def _linear_one_pass(head: LinearHead, batch: Batch, needs: tuple[bool, bool, bool]):
    """6nHV over the rows that may have a gradient, 2nHV over the other unmasked ones."""
    rows = batch.rows
    index = rows.unmasked_index
    fields = batch.listed(index, head.dtype)
    ids = rows.ids if index is None else rows.ids[index]
    # (4, n) terms plus dlogp and ratio; see kernels/policy.py
    terms = torch.empty(6, rows.n_unmasked, dtype=head.dtype, device=ids.device)
    n_gradient = rows.n_gradient if any(needs) else 0
    grads = HeadGradients(head, needs)
    choice = objective_arguments(batch.config)

    def visit(listed: Tensor | None, start: int, stop: int, backward: bool) -> None:
        for chunk in head.chunks(listed, stop - start):
            part = slice(start + chunk.rows.start, start + chunk.rows.stop)
            out = head.gradient_view(chunk.logits) if backward else None
            row_fields = {k: None if v is None else v[part] for k, v in fields.items()}
            head.backend.policy(
                chunk.logits,
                ids[part],
                row_fields["advantages"],
                row_fields["weights"],
                terms[:, part],
                out,
                old_logp=row_fields["old_logp"],
                ref_logp=row_fields["ref_logp"],
                **choice,
                **head.transform,
            )
            if backward:
                grads.add(chunk, out, listed)

    visit(None if index is None else index[:n_gradient], 0, n_gradient, True)
    visit(None if index is None else index[n_gradient:], n_gradient, rows.n_unmasked, False)
    return _one_pass_terms(terms, batch, index, None), grads.finish()


class _Attach(torch.autograd.Function):
    """Give a finished loss its gradients: backward only multiplies by the upstream scalar."""

    @staticmethod
    def forward(ctx, loss, gradients, scale, *tensors):
        ctx.gradients, ctx.scale = list(gradients), scale
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss computed its gradients in the forward pass and gave them to the first "
                "backward; call the loss again for a second one (retain_graph cannot help)."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = upstream if ctx.scale is None else upstream / ctx.scale
        out = []
        while gradients:
            grad = gradients.pop(0)
            dtype = ctx.dtypes[-1 - len(gradients)]
            out.append(None if grad is None else _scaled(grad, factor).to(dtype))
        return (None, None, None, *out)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor in place: the buffer is ours, and a copy of dweight would double the peak.

    Half precision goes through fp32, 256 rows at a time: a loss scale of 65536 is inf in fp16.
    """
    # reading the factor makes a GPU wait, and a CPU save a pass
    if grad.is_cpu and factor.item() == 1.0:
        return grad
    if grad.dtype.itemsize >= 4:
        return grad.mul_(factor.to(grad.dtype))
    for plane in grad if grad.dim() == 3 else grad[None]:
        for rows in plane.split(256):
            rows.copy_(rows.float().mul_(factor))
    return grad


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    advantages: Tensor,
    *,
    config: LossConfig | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: Tensor | float | int | None = None,
    skip_inactive_forward: bool = False,
    workspace_bytes: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO-family loss from hidden states and the lm_head, without ever holding the (N, V) logits.

    The loss of `LossConfig`, with z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) /
    softcap) / temperature and logp = log_softmax(z)[ids]. Gradients for hidden, weight and bias are
    computed in the forward pass (skipped under `torch.no_grad`) and kept for one backward. fp32
    logits, statistics and accumulators; each gradient is downcast once. Masked rows enter no
    product; rows whose advantage is 0 (with beta = 0) enter only the forward one.

    Args:
        hidden: (B, T, H) or packed (N, H); hidden[..., t, :] predicts ids[..., t].
        weight: (V, H) in the dtype of hidden (or any under autocast); frozen when it needs no
            gradient.
        ids: (B, T) or (N,) sampled tokens, in [0, V) where unmasked.
        advantages: contiguous (B,), (B, T), or packed (S,) or (N,).
        config: None for `LossConfig()`.
        mask: shaped like ids, non-zero where a token counts. What is masked may hold anything, NaN
            too.
        cu_seqlens: (S+1,) boundaries of a packed batch.
        old_logp: shaped like ids, log-probs of the policy that sampled (nats); None: on-policy,
            ratio 1.
        ref_logp: shaped like ids, log-probs of the reference (nats); needed when beta > 0.
        bias: (V,) or None. softcap: None or > 0. logit_scale: not 0.
        denominator: the count that the loss type divides by (`weights.count`), over the
            accumulation window and all ranks (divided by the world size when gradients are
            averaged), which makes bnpo the same as dapo; None: this call's.
        skip_inactive_forward: without a KL, leave out the rows that can add nothing to the loss or
            to a gradient (advantage 0; at sequence level, all of a sequence's): 2NHV less for each.
            The loss and the gradients are the same; metrics are then means over the others.
        workspace_bytes: bound in bytes on the logits and the scratch of one call, on top of the
            fp32 gradients of hidden and weight (and, under CUDA autocast, their cast copies);
            None: 1 GiB on CUDA, 384 MiB elsewhere.
        tp_group: the ranks over which the vocabulary is split, as in `linear_logprob`; None: a
            DTensor (FSDP2) is gathered, and its gradient averaged over its mesh in backward.

    Returns:
        loss (0-d fp32) and a dict of detached 0-d tensors on the device, see `metrics.summarize`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
        RuntimeError: on a second backward through one loss.
    """
    config = LossConfig() if config is None else config
    given = {"ids": ids, "mask": mask, "advantages": advantages}
    placed = place(hidden, weight, bias, tp_group, workspace_bytes, **given)
    weight, bias = placed.weight, placed.bias
    inputs.check_head(hidden, weight, bias, softcap, logit_scale)
    backend = placed.rows(select(hidden.device))
    inputs.check_precision("hidden", hidden, backend.name)
    shape = tuple(hidden.shape[:-1])
    batch = prepare(
        shape,
        placed.V,
        hidden.device,
        ids=ids,
        advantages=advantages,
        config=config,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logp=old_logp,
        ref_logp=ref_logp,
        denominator=denominator,
        skip_inactive_forward=skip_inactive_forward,
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    tensors = (flat, weight, bias)
    wanted = torch.is_grad_enabled()
    needs = tuple(wanted and t is not None and t.requires_grad for t in tensors)
    with torch.no_grad(), no_autocast(hidden.device):
        head = LinearHead(
            *tensors,
            backend,
            workspace_bytes,
            softcap,
            float(logit_scale),
            float(config.temperature),
            autocast_dtype(hidden),
            placed.shard,
        )
        # fp16 dlogits need a scale that fits the largest derivative, which one pass does not know
        if config.level == "token" and head.narrow != torch.float16:
            terms, gradients = _linear_one_pass(head, batch, needs)
        else:
            rows = batch.rows
            stats = head_stats(head, rows.ids, rows.unmasked_index, rows.n_unmasked)
            terms = _two_pass_terms(batch, stats)
            gradients = (None, None, None)
            if any(needs):
                gradients = head_gradients(head, rows.ids, stats, (terms.dlogp, None, None), needs)
        loss, metrics = summarize(
            terms,
            batch.rows.n_unmasked,
            batch.n_tokens,
            batch.ref_logp is not None,
            config.ratio_bounds,
        )
    return (_Attach.apply(loss, gradients, None, *tensors) if any(needs) else loss), metrics


def _logits_two_pass(backend: Backend, cube: Tensor, batch: Batch, active, out, inv_temperature):
    dtype = torch.promote_types(cube.dtype, torch.float32)
    ids = batch.rows.ids
    stats = torch.empty(4, ids.numel(), dtype=dtype, device=ids.device)
    options = {"inv_temperature": inv_temperature}
    backend.logprob_fwd(cube, ids, stats, active=active, **options)
    terms = _two_pass_terms(batch, stats)
    scale = None
    if out is not None:
        dlogp = terms.dlogp
        scale = fp16_scale(cube.dtype, dlogp)
        upstream = dlogp if scale is None else dlogp * scale
        backend.logprob_bwd(cube, ids, stats, upstream, out, active=dlogp != 0, **options)
    return terms, scale


def _logits_one_pass(backend: Backend, cube: Tensor, batch: Batch, active, out, inv_temperature):
    dtype = torch.promote_types(cube.dtype, torch.float32)
    ids = batch.rows.ids
    terms = torch.empty(6, ids.numel(), dtype=dtype, device=ids.device)
    fields = batch.listed(None, dtype)
    backend.policy(
        cube,
        ids,
        fields["advantages"],
        fields["weights"],
        terms,
        out,
        old_logp=fields["old_logp"],
        ref_logp=fields["ref_logp"],
        active=active,
        inv_temperature=inv_temperature,
        **objective_arguments(batch.config),
    )
    return _one_pass_terms(terms, batch, None, batch.rows.mask), None


def _check_inplace(logits: Tensor) -> None:
    """A gradient may be written over logits that are no leaf and whose rows do not overlap."""
    if logits.is_leaf:
        inputs.fail("logits", "a non-leaf tensor with inplace=True", "a leaf that requires grad")
    reach = logits.shape[-1]
    pairs = zip(logits.stride()[:-1], logits.shape[:-1], strict=True)
    for stride, n in sorted(pair for pair in pairs if pair[1] > 1):
        if stride < reach:
            got = f"strides {logits.stride()}"
            inputs.fail("logits", "rows that do not overlap with inplace=True", got)
        reach += stride * (n - 1)


def policy_loss(
    logits: Tensor,
    ids: Tensor,
    advantages: Tensor,
    *,
    config: LossConfig | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    denominator: Tensor | float | int | None = None,
    skip_inactive_forward: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO-family loss from given logits, with logp = log_softmax(logits / temperature)[ids].

    At token level one launch reads each row, evaluates the objective and writes its gradient.
    Arithmetic in fp32 whatever the logits are stored in; the gradient has their dtype.

    Args:
        logits: (B, T, V) or packed (N, V), stride 1 over V; other strides are free (`logits[:,
            :-1]`).
        inplace: write the gradient over the logits (saves N V elements). Autograd is told: another
            use of the logits in backward raises.
        Others: as in `linear_policy_loss`.

    Returns:
        loss (0-d fp32) and a dict of detached 0-d tensors on the device, see `metrics.summarize`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
        RuntimeError: on a second backward through one loss.
    """
    config = LossConfig() if config is None else config
    inputs.check_logits(logits)
    backend = select(logits.device)
    inputs.check_precision("logits", logits, backend.name)
    needed = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needed:
        _check_inplace(logits)
    shape = tuple(logits.shape[:-1])
    batch = prepare(
        shape,
        logits.shape[-1],
        logits.device,
        ids=ids,
        advantages=advantages,
        config=config,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logp=old_logp,
        ref_logp=ref_logp,
        denominator=denominator,
        skip_inactive_forward=skip_inactive_forward,
    )
    with torch.no_grad():
        cube = logits.detach() if logits.dim() == 3 else logits.detach()[None]
        out = None
        if needed:
            out = cube if inplace else torch.empty_like(cube, memory_format=torch.contiguous_format)
        whole = mask is None and batch.rows.n_unmasked == batch.n_tokens
        active = None if whole else batch.rows.mask
        one_pass = config.level == "token" and logits.dtype != torch.float16
        route = _logits_one_pass if one_pass else _logits_two_pass
        terms, scale = route(backend, cube, batch, active, out, 1.0 / float(config.temperature))
        if needed and inplace:
            torch.autograd.graph.increment_version(logits)
        loss, metrics = summarize(
            terms,
            batch.rows.n_unmasked,
            batch.n_tokens,
            batch.ref_logp is not None,
            config.ratio_bounds,
        )
    if not needed:
        return loss, metrics
    return _Attach.apply(loss, (out.view(logits.shape),), scale, logits), metrics
