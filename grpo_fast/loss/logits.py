"""The policy loss from given logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import checks
from grpo_fast.config import LossConfig
from grpo_fast.engine.backend import Backend, select
from grpo_fast.engine.gradients import fp16_scale
from grpo_fast.objective.batch import Batch, prepare, rollout_arguments
from grpo_fast.objective.terms import TokenTerms, evaluate, named_terms
from grpo_fast.objective.terms import per_token as terms_of_tokens
from grpo_fast.objective.token_loss import token_loss_of
from grpo_fast.objective.tokens import Tokens, Totals

from . import compiled
from .attach import Done, attach
from .call import DEFAULT, Call, Execution, needs_gradient
from .metrics import summarize


class Checked(NamedTuple):
    """A call that nothing is wrong with."""

    call: Call
    backend: Backend
    batch: Batch


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
        **token_loss_of(batch.config).arguments,
    )
    return named_terms(terms, batch, None, batch.rows.mask), None


def _check_inplace(logits: Tensor) -> None:
    """A gradient may be written over logits that are no leaf and whose rows do not overlap."""
    if logits.is_leaf:
        checks.fail("logits", "a non-leaf tensor with inplace=True", "a leaf that requires grad")
    if logits.numel() == 0:
        return
    reach = logits.shape[-1]
    pairs = zip(logits.stride()[:-1], logits.shape[:-1], strict=True)
    for stride, n in sorted(pair for pair in pairs if pair[1] > 1):
        if stride < reach:
            got = f"strides {logits.stride()}"
            checks.fail("logits", "rows that do not overlap with inplace=True", got)
        reach += stride * (n - 1)


def check(call: Call) -> Checked:
    """Every ValueError of `policy_loss`, before any work, but for those about inplace."""
    logits, run = call.source, call.execution
    checks.check_logits(logits)
    backend = select(logits.device)
    checks.check_precision("logits", logits, backend.name)
    batch = prepare(
        call.shape,
        logits.shape[-1],
        logits.device,
        call.tokens,
        call.config,
        call.totals,
        skip_inactive_forward=run.skip_inactive_forward,
        max_rows=run.max_rows,
    )
    return Checked(call, backend, batch)


def compute(checked: Checked, needs: tuple[bool], inplace: bool = False) -> Done:
    """The loss, its metrics and its gradient: plain tensors in and out, nothing of autograd."""
    call, backend, batch = checked
    (needed,) = needs
    logits, config = call.source, batch.config
    with torch.no_grad():
        cube = logits.detach() if logits.dim() == 3 else logits.detach()[None]
        out = None
        if needed:
            out = cube if inplace else torch.empty_like(cube, memory_format=torch.contiguous_format)
        whole = call.tokens.mask is None and batch.rows.n_unmasked == batch.rows.n_tokens
        active = None if whole else batch.rows.mask
        one_pass = not (batch.per_sequence or batch.per_batch) and logits.dtype != torch.float16
        route = _logits_one_pass if one_pass else _logits_two_pass
        inverse = batch.inv_temperature
        options = {"inv_temperature": 1.0 / config.temperature if inverse is None else inverse}
        terms, scale = route(backend, cube, batch, active, out, options)
        loss, metrics = summarize(terms, batch)
        gradients = [out.view(logits.shape)] if needed else [None]
        return Done(
            loss,
            metrics,
            gradients,
            scale,
            tokens=lambda: terms_of_tokens(terms, batch, call.shape),
        )


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
    per_token: bool = False,
) -> tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor], TokenTerms]:
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
        loss (0-d fp32) and a dict of detached 0-d tensors on the device, see `metrics.summarize`;
        with per_token `terms.TokenTerms` too.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; it is named.
        RuntimeError: on a second backward through one loss.
    """
    call = Call(
        logits,
        None,
        Tokens(ids, advantages, mask, cu_seqlens, old_logp, ref_logp, rollout_logp, temperature),
        DEFAULT if config is None else config,
        Totals(denominator, entropy_threshold),
        Execution(skip_inactive_forward, max_rows),
    )
    if torch.compiler.is_compiling():
        refused = {"inplace": (inplace, False), "per_token": (per_token, False)}
        return compiled.traced("policy_loss", call, **refused)
    checks.check_logits(logits)
    needs = needs_gradient(logits)
    if inplace and any(needs):
        _check_inplace(logits)
    done = compute(check(call), needs, inplace)
    if inplace and any(needs):
        torch.autograd.graph.increment_version(logits)
    loss = attach(done, (logits,)) if any(needs) else done.loss
    return (loss, done.metrics, done.tokens()) if per_token else (loss, done.metrics)
