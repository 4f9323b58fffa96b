"""The policy loss, sum(weight * token_loss), from logits or from hidden states and the lm_head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import inputs, routes
from .backend import Backend, select
from .batch import Batch, objective_arguments, prepare, rollout_arguments
from .chunks import LinearHead, Lora, Needs, autocast_dtype, fp16_scale, no_autocast
from .config import LossConfig
from .gradients import Attach, apply, compilable, wanted
from .logprob import head_stats
from .metrics import summarize
from .plan import Facts, Plan, choose
from .terms import evaluate, named_terms


def facts_of(head: LinearHead, batch: Batch, needs: Needs) -> Facts:
    """What the planner goes by, of a call."""
    rows, config = batch.rows, batch.config
    return Facts(
        n_rows=rows.ids.numel(),
        n_tokens=rows.n_tokens,
        n_unmasked=rows.n_unmasked,
        n_gradient=rows.n_gradient,
        longest=None if rows.lengths is None else max(rows.lengths, default=0),
        H=head.width,
        V=head.weight.shape[0],
        rank=head.weight.shape[1] - head.width,
        itemsize=head.dtype.itemsize,
        needs_hidden=needs.hidden,
        needs_weight=needs.weight,
        needs_other=needs.bias or needs.lora_A or needs.lora_B,
        per_sequence=batch.per_sequence,
        per_batch=batch.per_batch,
        known=batch.known,
        fp16=head.narrow == torch.float16,
        bonus=config.entropy_coef > 0,
        top_share=config.top_entropy_quantile,
        chunk_rows=head.chunk_rows,
        fixed=rows.fixed,
        columns_first=head.columns_first and rows.n_gradient > head.chunk_rows,
    )


@compilable
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
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy_threshold: Tensor | float | None = None,
    denominator: Tensor | float | int | None = None,
    skip_inactive_forward: bool = False,
    max_rows: int | None = None,
    workspace_bytes: int | None = None,
    explain: bool = False,
) -> tuple[Tensor, dict[str, Tensor]] | Plan:
    """GRPO-family loss from hidden states and the lm_head, without ever holding the (N, V) logits.

    The loss of `LossConfig`, with z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) /
    softcap) / temperature and logp = log_softmax(z)[ids]. Gradients for hidden, weight, bias and
    adapter are computed in the forward pass (skipped under `torch.no_grad`) and kept for one
    backward. fp32 logits, statistics and accumulators; each gradient is downcast once. Masked rows
    enter no product; rows that cannot have a gradient (advantage 0 without a KL or an entropy
    bonus) enter only the forward one. `plan.py` lists the routes and what they cost.

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
        ref_logp: shaped like ids, log-probs of the reference (nats); this or ref_hidden is needed
            when beta > 0.
        ref_hidden, ref_weight: (..., H') and (V, H') of the reference, from which ref_logp is
            computed here (2NHV more); ref_weight None: weight itself, without an adapter.
        rollout_logp: shaped like ids, log-probs that the rollout engine gave (nats; NaN where it
            gave none); see `LossConfig.rollout_correction`.
        bias: (V,) or None. softcap: None or > 0. logit_scale: not 0.
        lora: adapter (A (r, H), B (V, r), s) of the lm_head, in one product with the weight.
        temperature: (B,) or shaped like ids, > 0; None: `config.temperature`.
        entropy_threshold: nats; replaces the quantile of this call's own entropies in
            top_entropy_quantile, e.g. by that of all ranks.
        denominator: the count that the loss type divides by (`weights.count`), over the
            accumulation window and all ranks (divided by the world size when gradients are
            averaged), which makes bnpo the same as dapo; None: this call's.
        skip_inactive_forward: without a KL, leave out the rows that can add nothing to the loss or
            to a gradient (advantage 0; at sequence level, all of a sequence's): 2NHV less for each.
            The loss and the gradients are the same; metrics are then means over the others.
        max_rows: room for so many unmasked rows. Nothing is read back from the device then, as CUDA
            graphs ask; the loss is NaN when there are more, or an id is outside the vocabulary.
        workspace_bytes: bound in bytes on the logits and the scratch of one call, on top of the
            fp32 gradients of hidden and weight (and, under CUDA autocast, their cast copies); None:
            room for 2,048 rows and at least 1 GiB on CUDA, 384 MiB elsewhere. It is kept for the
            next call: `chunks.release_workspace` gives it back.
        explain: compute nothing and return the `Plan`: the route, its FLOPs and its bytes.

    Returns:
        loss (0-d fp32) and a dict of detached 0-d tensors on the device, see `metrics.summarize`.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
        RuntimeError: on a second backward through one loss.
    """
    config = LossConfig() if config is None else config
    inputs.check_head(hidden, weight, bias, softcap, logit_scale)
    lora_A, lora_B, lora_scale = inputs.check_lora(lora, hidden, weight)
    inputs.check_reference(ref_logp, ref_hidden, ref_weight, hidden, weight)
    backend = select(hidden.device)
    inputs.check_precision("hidden", hidden, backend.name)
    shape = tuple(hidden.shape[:-1])
    batch = prepare(
        shape,
        weight.shape[0],
        hidden.device,
        ids=ids,
        advantages=advantages,
        config=config,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logp=old_logp,
        ref_logp=ref_logp,
        rollout_logp=rollout_logp,
        temperature=temperature,
        entropy_threshold=entropy_threshold,
        denominator=denominator,
        skip_inactive_forward=skip_inactive_forward,
        max_rows=max_rows,
        has_ref=ref_hidden is not None,
    )
    tensors = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, lora_A, lora_B)
    needs = Needs(*wanted(*tensors))
    options = {
        "backend": backend,
        "workspace_bytes": workspace_bytes,
        "softcap": softcap,
        "logit_scale": float(logit_scale),
        "temperature": float(config.temperature),
        "autocast_dtype": autocast_dtype(hidden),
        "inv_temperature": batch.inv_temperature,
        "mask": batch.rows.mask if batch.rows.fixed else None,
    }
    with torch.no_grad(), no_autocast(hidden.device):
        adapter = None if lora is None else Lora(lora_A, lora_B, lora_scale)
        head = LinearHead(*tensors[:3], lora=adapter, **options)
        if ref_hidden is not None:
            # a stand-in where only the plan is wanted
            ref = batch.weights
            if not explain:
                ref = _reference(ref_hidden, ref_weight, weight, bias, batch, options)
            batch = replace(batch, ref_logp=ref)
        plan = choose(facts_of(head, batch, needs))
        if explain:
            return plan
        terms, gradients = routes.run(plan.route, head, batch, needs)
        loss, metrics = summarize(terms, batch)
    return (apply(Attach, loss, gradients, None, *tensors) if any(needs) else loss), metrics


def _reference(
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    batch: Batch,
    options: dict,
) -> Tensor:
    """Log-probs (N,) of the reference, by the same operations as those of the policy: with equal
    weights the KL is exactly 0."""
    flat = ref_hidden.reshape(-1, ref_hidden.shape[-1])
    head = LinearHead(flat, weight if ref_weight is None else ref_weight, bias, **options)
    rows = batch.rows
    return head_stats(head, rows.ids, rows.unmasked_index, rows.n_unmasked)[0]


def _logits_two_pass(backend: Backend, cube: Tensor, batch: Batch, active, out, options):
    dtype = torch.promote_types(cube.dtype, torch.float32)
    ids = batch.rows.ids
    stats = torch.empty(4, ids.numel(), dtype=dtype, device=ids.device)
    backend.logprob_fwd(cube, ids, stats, active=active, **options)
    terms = evaluate(batch, stats)
    scale = None
    if out is not None:
        dlogp, dentropy = terms.dlogp, terms.dentropy
        size = dlogp.abs() if dentropy is None else dlogp.abs() + dentropy.abs()
        scale = fp16_scale(cube.dtype, size)
        if scale is not None:
            dlogp = dlogp * scale
            dentropy = None if dentropy is None else dentropy * scale
        backend.logprob_bwd(
            cube, ids, stats, dlogp, out, dentropy=dentropy, active=size != 0, **options
        )
    return terms, scale


def _logits_one_pass(backend: Backend, cube: Tensor, batch: Batch, active, out, options):
    dtype = torch.promote_types(cube.dtype, torch.float32)
    ids = batch.rows.ids
    terms = torch.empty(6, ids.numel(), dtype=dtype, device=ids.device)
    fields = batch.listed(None, dtype)
    more = rollout_arguments(batch, fields["rollout_logp"])
    if batch.config.entropy_coef > 0:
        more["entropy_coef"] = batch.config.entropy_coef
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
        **options,
        **more,
        **objective_arguments(batch.config),
    )
    return named_terms(terms, batch, None, batch.rows.mask), None


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


@compilable
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
    rollout_logp: Tensor | None = None,
    temperature: Tensor | None = None,
    entropy_threshold: Tensor | float | None = None,
    denominator: Tensor | float | int | None = None,
    skip_inactive_forward: bool = False,
    max_rows: int | None = None,
    inplace: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO-family loss from given logits, with logp = log_softmax(logits / temperature)[ids].

    Where a token's derivative needs its own log-prob alone, one launch reads each row, evaluates
    the objective and writes its gradient. Arithmetic in fp32 whatever the logits are stored in; the
    gradient has their dtype.

    Args:
        logits: (B, T, V) or packed (N, V), stride 1 over V; other strides are free (`logits[:,
            :-1]`).
        inplace: write the gradient over the logits (saves N V elements). Autograd is told: another
            use of the logits in backward raises.
        max_rows: anything but None: nothing is read back from the device (`linear_policy_loss`).
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
    (needed,) = wanted(logits)
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
        rollout_logp=rollout_logp,
        temperature=temperature,
        entropy_threshold=entropy_threshold,
        denominator=denominator,
        skip_inactive_forward=skip_inactive_forward,
        max_rows=max_rows,
        has_ref=False,
    )
    with torch.no_grad():
        cube = logits.detach() if logits.dim() == 3 else logits.detach()[None]
        out = None
        if needed:
            out = cube if inplace else torch.empty_like(cube, memory_format=torch.contiguous_format)
        whole = mask is None and batch.rows.n_unmasked == batch.rows.n_tokens
        active = None if whole else batch.rows.mask
        one_pass = not (batch.per_sequence or batch.per_batch) and logits.dtype != torch.float16
        route = _logits_one_pass if one_pass else _logits_two_pass
        inverse = batch.inv_temperature
        options = {"inv_temperature": 1.0 / config.temperature if inverse is None else inverse}
        terms, scale = route(backend, cube, batch, active, out, options)
        if needed and inplace:
            torch.autograd.graph.increment_version(logits)
        loss, metrics = summarize(terms, batch)
    if not needed:
        return loss, metrics
    return apply(Attach, loss, (out.view(logits.shape),), scale, logits), metrics
