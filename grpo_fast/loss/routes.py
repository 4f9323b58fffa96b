"""The routes of the loss from hidden states; `plan/route.py` says which one a call takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_fast.engine.chunks import Chunk, LinearHead, Needs
from grpo_fast.engine.gradients import HeadGradients, compact, fp16_scale
from grpo_fast.engine.logprob import head_gradients, head_stats
from grpo_fast.objective.batch import Batch, rollout_arguments
from grpo_fast.objective.terms import Terms, evaluate, named_terms
from grpo_fast.objective.token_loss import token_loss_of

Gradients = list[Tensor | None]
# rows of a chunk, their statistics (4, k) -> d loss / d logp and by the entropy, each (k,)
Derivative = Callable[[Chunk, Tensor], tuple[Tensor, Tensor | None]]
NONE: Gradients = [None] * 5


def run(
    route: str, head: LinearHead, batch: Batch, needs: Needs, main_grad: Tensor | None = None
) -> tuple[Terms, Gradients]:
    """Terms of the computed rows, and fp32 gradients of hidden, weight, bias, A and B.

    main_grad: where the gradient of the weight is added; None then stands in its place.
    """
    if route == "one_pass" or (route == "forward_only" and not _whole(batch)):
        return one_pass(head, batch, needs, main_grad)
    return {
        "forward_only": two_passes,
        "known_derivative": known_derivative,
        "whole_sequences": whole_sequences,
        "frozen_head": frozen_head,
        "two_passes": two_passes,
    }[route](head, batch, needs, main_grad)


def _whole(batch: Batch) -> bool:
    return batch.per_sequence or batch.per_batch


def add_active(
    grads: HeadGradients, chunk: Chunk, dlogits: Tensor, dlogp: Tensor, dentropy: Tensor | None
) -> None:
    """Add a chunk's products without its rows of derivative 0.

    Their number is known on a CPU, and a copy of V numbers is cheaper than a product with H times
    as many. An accelerator would have to wait for it: there such rows are zeros in the product.
    """
    hidden, dlogits, place = chunk.hidden, dlogits[0], chunk.place
    if dlogp.is_cpu:
        active = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
        keep = active.nonzero()[:, 0]
        if keep.numel() == 0:
            return
        if keep.numel() < active.numel():
            if isinstance(place, slice):
                place = torch.arange(place.start, place.stop, device=dlogits.device)
            hidden, dlogits, place = hidden[keep], compact(dlogits, keep), place[keep]
    grads.add(hidden, dlogits, place)


def one_pass(
    head: LinearHead, batch: Batch, needs: Needs, main_grad: Tensor | None
) -> tuple[Terms, Gradients]:
    """Logits of a chunk -> objective -> dlogits in their place -> products, all in one visit."""
    rows = batch.rows
    index = rows.unmasked_index
    fields = batch.listed(index, head.dtype)
    rollout = fields.pop("rollout_logp")
    ids = rows.ids if index is None else rows.ids[index]
    # room that is left holds zeros, whose token may be a banned one: 0 * -inf
    mask = rows.mask[index] if rows.fixed else None
    # (4, n) terms plus dlogp and ratio; see kernels/policy.py
    terms = torch.empty(6, rows.n_unmasked, dtype=head.dtype, device=ids.device)
    n_gradient = rows.n_gradient if any(needs) else 0
    grads = HeadGradients(head, needs, n_gradient, main_grad)
    config = batch.config
    options = dict(token_loss_of(config).arguments)
    if config.entropy_coef > 0:
        options["entropy_coef"] = config.entropy_coef

    def visit(start: int, stop: int, backward: bool) -> None:
        listed = None if index is None else index[start:stop]
        for chunk in head.chunks(listed, stop - start):
            part = slice(start + chunk.rows.start, start + chunk.rows.stop)
            out = grads.room(chunk.logits) if backward else None
            mine = {k: None if v is None else v[part] for k, v in fields.items()}
            gap = None if rollout is None else rollout[part]
            head.backend.policy(
                chunk.logits,
                ids[part],
                mine["advantages"],
                mine["weights"],
                terms[:, part],
                out,
                old_logp=mine["old_logp"],
                ref_logp=mine["ref_logp"],
                active=None if mask is None else mask[part],
                **options,
                **rollout_arguments(batch, gap),
                **chunk.transform,
            )
            if backward:
                bonus = mine["weights"] if config.entropy_coef > 0 else None
                add_active(grads, chunk, out, terms[5, part], bonus)

    visit(0, n_gradient, True)
    visit(n_gradient, rows.n_unmasked, False)
    return named_terms(terms, batch, index, mask), grads.finish()


def in_pass(
    head: LinearHead,
    batch: Batch,
    needs: Needs,
    derivative: Derivative,
    main_grad: Tensor | None,
    *,
    cuts: list[int] | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """Statistics (4, N) of the computed rows, and the gradients of a derivative that every chunk
    can say of its own rows: the logits are used twice and computed once."""
    rows = batch.rows
    index = rows.unmasked_index
    stats = torch.zeros(4, rows.ids.numel(), dtype=head.dtype, device=rows.ids.device)
    grads = HeadGradients(head, needs, rows.n_gradient, main_grad, scale)

    def visit(start: int, stop: int, ends: list[int] | None, backward: bool) -> None:
        listed = None if index is None else index[start:stop]
        for chunk in head.chunks(listed, stop - start, ends):
            ids = rows.ids[chunk.place]
            own = stats.new_empty(4, ids.numel())
            head.backend.logprob_fwd(chunk.logits, ids, own, **chunk.transform)
            stats[:, chunk.place] = own
            if not backward:
                continue
            dlogp, dentropy = derivative(chunk, own)
            upstream = [dlogp, dentropy]
            if scale is not None:
                upstream = [None if g is None else g * scale for g in upstream]
            out = grads.room(chunk.logits)
            head.backend.logprob_bwd(
                chunk.logits, ids, own, upstream[0], out, dentropy=upstream[1], **chunk.transform
            )
            add_active(grads, chunk, out, dlogp, dentropy)

    visit(0, rows.n_gradient, cuts, True)
    visit(rows.n_gradient, rows.n_unmasked, None, False)
    return stats, grads.finish()


def known_derivative(
    head: LinearHead, batch: Batch, needs: Needs, main_grad: Tensor | None
) -> tuple[Terms, Gradients]:
    """On-policy: the ratio is 1, and the derivative of every loss is known before the pass."""
    n = batch.rows.ids.numel()
    # at log-probs of 0: none of the derivatives depends on them
    guess = evaluate(batch, torch.zeros(2, n, dtype=head.dtype, device=head.hidden.device))
    size = guess.dlogp.abs()
    if guess.dentropy is not None:
        size = size + guess.dentropy.abs()

    def derivative(chunk: Chunk, _: Tensor) -> tuple[Tensor, Tensor | None]:
        bonus = None if guess.dentropy is None else guess.dentropy[chunk.place]
        return guess.dlogp[chunk.place], bonus

    scale = fp16_scale(head.narrow, size)
    stats, grads = in_pass(head, batch, needs, derivative, main_grad, scale=scale)
    return evaluate(batch, stats), grads


def whole_sequences(
    head: LinearHead, batch: Batch, needs: Needs, main_grad: Tensor | None
) -> tuple[Terms, Gradients]:
    """A derivative needs its sequence: chunks end where sequences end."""
    lengths, ends = batch.rows.lengths, batch.rows.ends
    cuts, members = [], {}
    first = start = stop = 0
    for sequence, n in enumerate((*lengths, head.chunk_rows + 1)):
        if stop + n - start > head.chunk_rows and stop > start:
            cuts.append(stop)
            members[start] = slice(first, sequence + 1)
            first, start = sequence, stop
        stop += n

    def derivative(chunk: Chunk, own: Tensor) -> tuple[Tensor, Tensor | None]:
        place = chunk.place
        if isinstance(place, slice):
            place = torch.arange(place.start, place.stop, device=own.device)
        sizes = ends[members[chunk.rows.start]]
        sizes = sizes - sizes[0]
        terms = evaluate(batch.part(place, sizes), own)
        return terms.dlogp, terms.dentropy

    stats, grads = in_pass(head, batch, needs, derivative, main_grad, cuts=cuts)
    return evaluate(batch, stats), grads


def frozen_head(
    head: LinearHead, batch: Batch, needs: Needs, main_grad: Tensor | None
) -> tuple[Terms, Gradients]:
    """The forward keeps u = dlogp / dhidden of every row; the gradient is a row scale of it."""

    def one(_: Chunk, own: Tensor) -> tuple[Tensor, None]:
        return torch.ones_like(own[0]), None

    stats, (u, *_) = in_pass(head, batch, needs, one, main_grad)
    terms = evaluate(batch, stats)
    dlogp = terms.dlogp[:, None]
    # selected, not only multiplied: u may hold a NaN where nothing counts
    u.mul_(dlogp).masked_fill_(dlogp == 0, 0.0)
    return terms, [u, *NONE[1:]]


def two_passes(
    head: LinearHead, batch: Batch, needs: Needs, main_grad: Tensor | None
) -> tuple[Terms, Gradients]:
    """Log-probs of all rows, the objective on (N,), backward on the rows that have a derivative."""
    rows = batch.rows
    stats = head_stats(head, rows.ids, rows.unmasked_index, rows.n_unmasked)
    terms = evaluate(batch, stats)
    if not any(needs):
        return terms, NONE
    upstream = (terms.dlogp, None, terms.dentropy)
    fixed = rows.unmasked_index if rows.fixed else None
    options = {"index": fixed, "main_grad": main_grad}
    return terms, head_gradients(head, rows.ids, stats, upstream, needs, **options)
