"""The policy loss, sum(weight * token_loss), from hidden states and the lm_head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast import checks
from grpo_fast.config import LossConfig
from grpo_fast.engine.backend import Backend, select
from grpo_fast.engine.chunks import LinearHead, Lora, Needs, autocast_dtype, no_autocast
from grpo_fast.engine.head import Head, as_head
from grpo_fast.engine.held import held_in
from grpo_fast.engine.parallel import Placement, place
from grpo_fast.engine.passes import head_stats
from grpo_fast.objective.batch import Batch, prepare
from grpo_fast.objective.terms import TokenTerms
from grpo_fast.objective.terms import per_token as terms_of_tokens
from grpo_fast.objective.tokens import Tokens, Totals
from grpo_fast.plan.route import Facts, Plan, choose

from . import compiled, routes
from .attach import Done, attach
from .call import DEFAULT, Call, Execution, check_main_grad, needs_gradient, recomputed
from .metrics import summarize


class Checked(NamedTuple):
    """A call that nothing is wrong with."""

    call: Call
    tensors: tuple[Tensor | None, ...]
    """hidden (N, H), weight, bias, A and B: what a gradient may be of."""
    ref_weight: Tensor | None
    backend: Backend
    batch: Batch
    placed: Placement
    options: dict[str, Any]
    """The other arguments of a `LinearHead`."""


def facts_of(head: LinearHead, batch: Batch, needs: Needs, accumulates: bool) -> Facts:
    """What the planner goes by, of a call; accumulates: into the caller's main_grad."""
    rows, config = batch.rows, batch.config
    held = held_in(head, rows.n_gradient, accumulates) if needs.weight else 0
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
        columns_first=held == 0 and head.by_columns(needs, rows.n_gradient),
        held=held,
    )


def check(call: Call) -> Checked:
    """Every ValueError of `linear_policy_loss`, before any work."""
    hidden, head, tokens, run = call.source, call.head, call.tokens, call.execution
    where = (head.tp_group, run.workspace_bytes)
    same = {"ids": tokens.ids, "mask": tokens.mask, "advantages": tokens.advantages}
    placed = place(hidden, head.weight, head.bias, *where, **same)
    weight, bias = placed.weight, placed.bias
    ref_weight = call.ref_weight
    if isinstance(ref_weight, Tensor):
        ref_weight = place(call.ref_hidden, ref_weight, None, *where).weight
    checks.check_head(hidden, weight, bias, head.softcap, head.logit_scale)
    A, B, lora_scale = checks.check_lora(head.lora, hidden, weight)
    checks.check_reference(tokens.ref_logp, call.ref_hidden, ref_weight, hidden, weight)
    backend = placed.rows(select(hidden.device))
    checks.check_precision("hidden", hidden, backend.name)
    check_main_grad(run, weight, gathered=bool(placed.sources))
    batch = prepare(
        call.shape,
        placed.V,
        hidden.device,
        tokens,
        call.config,
        call.totals,
        skip_inactive_forward=run.skip_inactive_forward,
        max_rows=run.max_rows,
        has_ref=call.ref_hidden is not None,
    )
    options = {
        "backend": backend,
        "workspace_bytes": run.workspace_bytes,
        "softcap": head.softcap,
        "logit_scale": float(head.logit_scale),
        "autocast_dtype": autocast_dtype(hidden),
        "shard": placed.shard,
        "lora": None if head.lora is None else Lora(A, B, lora_scale),
        "temperature": float(batch.config.temperature),
        "inv_temperature": batch.inv_temperature,
        "mask": batch.rows.mask if batch.rows.fixed else None,
    }
    tensors = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, A, B)
    return Checked(call, tensors, ref_weight, backend, batch, placed, options)


def compute(checked: Checked, needs: Needs) -> Done:
    """The loss, its metrics and its gradients: plain tensors in and out, nothing of autograd."""
    call, tensors = checked.call, checked.tensors
    run = call.execution
    with torch.no_grad(), no_autocast(call.source.device):
        head = LinearHead(*tensors[:3], **checked.options)
        batch = _with_reference(checked, explain=False)
        plan = choose(facts_of(head, batch, needs, run.main_grad is not None))
        if run.main_grad is not None:
            batch = replace(batch, weights=batch.weights * run.grad_scale)
        terms, gradients = routes.run(plan.route, head, batch, needs, run.main_grad)
        loss, metrics = summarize(terms, batch)
        done = Done(
            loss, metrics, gradients, tokens=lambda: terms_of_tokens(terms, batch, call.shape)
        )
    return done if run.main_grad is None else done.unscaled(run.grad_scale)


def plan_of(checked: Checked, needs: Needs) -> Plan:
    """The route that `compute` takes, and its costs."""
    with torch.no_grad(), no_autocast(checked.call.source.device):
        head = LinearHead(*checked.tensors[:3], **checked.options)
        batch = _with_reference(checked, explain=True)
        accumulates = checked.call.execution.main_grad is not None
        return choose(facts_of(head, batch, needs, accumulates))


def _with_reference(checked: Checked, explain: bool) -> Batch:
    """The batch with log-probs of the reference, by the same operations as those of the policy:
    with equal weights the KL is exactly 0."""
    batch, hidden = checked.batch, checked.call.ref_hidden
    if hidden is None:
        return batch
    if explain:
        # a stand-in where only the plan is wanted
        return replace(batch, ref_logp=batch.weights)
    _, weight, bias, *_ = checked.tensors
    weight = weight if checked.ref_weight is None else checked.ref_weight
    options = {**checked.options, "lora": None}
    head = LinearHead(hidden.reshape(-1, hidden.shape[-1]), weight, bias, **options)
    rows = batch.rows
    listed = (rows.unmasked_index, rows.n_unmasked)
    logp = head_stats(head, rows.ids, *listed, entropy=False)[0]
    return replace(batch, ref_logp=logp)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor | Head,
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
    main_grad: Tensor | None = None,
    grad_scale: float = 1.0,
    workspace_bytes: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    per_token: bool = False,
    explain: bool = False,
) -> tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor], TokenTerms] | Plan:
    """GRPO-family loss from hidden states and the lm_head, without ever holding the (N, V) logits.

    The loss of `LossConfig`, with z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) /
    softcap) / temperature and logp = log_softmax(z)[ids]. Gradients for hidden, weight, bias and
    adapter are computed in the forward pass (skipped under `torch.no_grad`) and kept for one
    backward. fp32 logits, statistics and accumulators; each gradient is downcast once. Masked rows
    enter no product; rows that cannot have a gradient (advantage 0 without a KL or an entropy
    bonus) enter only the forward one. `plan/route.py` lists the routes and what they cost.
    torch.compile sees one op, without main_grad, tp_group, per_token and explain.

    Args:
        hidden: (B, T, H) or packed (N, H); hidden[..., t, :] predicts ids[..., t].
        weight: (V, H) in the dtype of hidden (or any under autocast), or a `Head` that says all of
            the head; frozen when it needs no gradient.
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
        main_grad: (V, H) fp32, e.g. `weight.grad` of an fp32 weight, or the main gradient of a
            half-precision one, also when it is tied to an embedding: the gradient of the weight is
            added to it here, in the forward pass, and autograd has none for the weight. It saves
            a buffer of that size, and a pass over it. A checkpointed call adds it once.
        grad_scale: with main_grad, the factor with which backward will reach this loss (a loss
            scale, or 1 / accumulation steps). Another one raises there (on an accelerator the other
            gradients are NaN).
        workspace_bytes: bound in bytes on the logits and the scratch of one call, on top of the
            fp32 gradients of hidden and weight (and, under CUDA autocast, their cast copies); None:
            room for 2,048 rows and at least 1 GiB on CUDA, 384 MiB elsewhere. It is kept for the
            next call: `release_workspace` gives it back.
        tp_group: the ranks over which the vocabulary is split, as in `linear_logprob`; None: a
            weight or bias that is a DTensor (FSDP2) or partitioned by DeepSpeed (ZeRO-3) is
            gathered in forward. Their gradients are averaged in backward: over the mesh, and by
            the hook of the engine that trains the parameter. Every rank has to make the call.
        per_token: also return the log-prob, entropy, ratio and KL of every token.
        explain: compute nothing and return the `Plan`: the route, its FLOPs and its bytes.

    Returns:
        loss (0-d fp32) and a dict of detached 0-d tensors on the device, see `metrics.summarize`;
        with per_token `terms.TokenTerms` too.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
        RuntimeError: on a second backward through one loss.
    """
    call = Call(
        hidden,
        as_head(weight, bias, lora, softcap, logit_scale, tp_group),
        Tokens(ids, advantages, mask, cu_seqlens, old_logp, ref_logp, rollout_logp, temperature),
        DEFAULT if config is None else config,
        Totals(denominator, entropy_threshold),
        Execution(skip_inactive_forward, max_rows, workspace_bytes, main_grad, grad_scale),
        ref_hidden,
        ref_weight,
    )
    if torch.compiler.is_compiling():
        refused = {"per_token": (per_token, False), "explain": (explain, False)}
        return compiled.traced("linear_policy_loss", call, **refused)
    checked = check(call)
    needs = Needs(*needs_gradient(*checked.tensors))
    if explain:
        return plan_of(checked, needs)
    if main_grad is not None and recomputed():
        needs = needs._replace(weight=False)
    done = compute(checked, needs)
    loss = attach(done, checked.tensors) if any(needs) else done.loss
    return (loss, done.metrics, done.tokens()) if per_token else (loss, done.metrics)
