"""The losses that `full_curves.py` compares: the reference, ours, and ones that are wrong on
purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss, reference
from grpo_fast.engine.chunks import FIXED_BYTES

# 64 rows of 200 fp32 logits: the 1,024 rows of a step go in 16 chunks
WORKSPACE = FIXED_BYTES + (128 << 10)


def reference_loss(hidden, weight, ids, advantages, config, mask, old, ref):
    """Full logits in fp32 and autograd."""
    return of_logits(reference.head_logits(hidden, weight), ids, advantages, config, mask, old, ref)


def of_logits(logits: Tensor, ids, advantages, config: LossConfig, mask, old, ref):
    """`reference.policy_loss` with the entropy and the clipped share of the tokens."""
    loss = reference.policy_loss(
        logits, ids, advantages, config, mask=mask, old_logp=old, ref_logp=ref
    )
    with torch.no_grad():
        logp, entropy, _ = reference.logprob(logits, ids)
        gap = torch.where(mask, logp - old, 0.0)
        if config.importance_sampling_level == "sequence":
            gap = (gap.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(logp)
        low, high = config.ratio_bounds
        up = advantages[:, None] if advantages.dim() == 1 else advantages
        clipped = ((gap.exp() < low) & (up < 0)) | ((gap.exp() > high) & (up > 0))
    return loss, entropy[mask].mean(), clipped[mask].float().mean()


def reference_logprob(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return reference.logprob(reference.head_logits(hidden, weight), ids)[0]


def our_loss(hidden, weight, ids, advantages, config, mask, old, ref):
    """`linear_policy_loss` in chunks."""
    loss, metrics = linear_policy_loss(
        hidden,
        weight,
        ids,
        advantages.contiguous(),
        config=config,
        mask=mask,
        old_logp=old,
        ref_logp=ref,
        workspace_bytes=WORKSPACE,
    )
    return loss, metrics["entropy"], metrics["clip_ratio"]


def our_logprob(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, ids, workspace_bytes=WORKSPACE).logp


def flipped(share: float) -> Callable:
    """Ours, with the sign of the advantage wrong for this share of the tokens."""

    def loss(hidden, weight, ids, advantages, config, mask, old, ref):
        # every 1 / share-th token, wherever it stands
        wrong = (torch.arange(ids.numel()) % round(1 / share) == 0).view(ids.shape)
        advantages = advantages[:, None].expand(ids.shape)
        advantages = torch.where(wrong, -advantages, advantages)
        return our_loss(hidden, weight, ids, advantages, config, mask, old, ref)

    return loss


def without_clip(hidden, weight, ids, advantages, config, mask, old, ref):
    """Ours, with bounds that no ratio reaches."""
    open_ = replace(config, epsilon=1e6, epsilon_high=None)
    return our_loss(hidden, weight, ids, advantages, open_, mask, old, ref)


def without_ratio(hidden, weight, ids, advantages, config, mask, old, ref):
    """Ours, as if the second step on a batch were on-policy too."""
    return our_loss(hidden, weight, ids, advantages, config, mask, None, ref)


def without_kl(hidden, weight, ids, advantages, config, mask, old, ref):
    """Ours, with the penalty forgotten."""
    return our_loss(hidden, weight, ids, advantages, replace(config, beta=0.0), mask, old, None)


def without_mask(hidden, weight, ids, advantages, config, mask, old, ref):
    """Ours, with what stands behind the end of a completion trained on as well."""
    return our_loss(hidden, weight, ids, advantages, config, torch.ones_like(mask), old, ref)


def scaled(hidden, weight, ids, advantages, config, mask, old, ref):
    """Ours, 0.6 times its gradient."""
    out = our_loss(hidden, weight, ids, advantages, config, mask, old, ref)
    return out[0] * 0.6 + out[0].detach() * 0.4, *out[1:]


def target_only(hidden, weight, ids, advantages, config, mask, old, ref):
    """Gradient of the sampled token's logit alone, without that of the log-sum-exp."""
    logits = reference.head_logits(hidden.float(), weight.float())
    lse = torch.logsumexp(logits, -1, keepdim=True)
    # a shift of all logits by c(z) leaves the softmax; its gradient cancels that of the lse
    shifted = _Shift.apply(logits, lse.detach(), ids)
    return of_logits(shifted, ids, advantages, config, mask, old, ref)


class _Shift(torch.autograd.Function):
    """Identity whose gradient keeps the column of the sampled token only, as dlogp."""

    @staticmethod
    def forward(ctx, logits, lse, ids):
        ctx.save_for_backward((logits - lse).exp().gather(-1, ids[..., None]), ids)
        return logits.clone()

    @staticmethod
    def backward(ctx, upstream):
        p, ids = ctx.saved_tensors
        # dz_t = dlogp (1 - p_t)
        dlogp = upstream.gather(-1, ids[..., None]) / (1 - p).clamp(min=1e-6)
        return torch.zeros_like(upstream).scatter(-1, ids[..., None], dlogp), None, None


class _Bf16Head(torch.autograd.Function):
    """Logits rounded to bf16; dweight summed in bf16, 16 rows at a time."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return (hidden @ weight.T).bfloat16().float()

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight = ctx.saved_tensors
        rows, narrow = upstream.flatten(0, 1).bfloat16(), hidden.flatten(0, 1).bfloat16()
        total = torch.zeros(weight.shape, dtype=torch.bfloat16)
        for part, h in zip(rows.split(16), narrow.split(16), strict=True):
            total += part.T @ h
        return (rows @ weight.bfloat16()).view_as(hidden).to(hidden.dtype), total.to(weight.dtype)


def bf16_sums(hidden, weight, ids, advantages, config, mask, old, ref):
    """What a careless fused loss does: bf16 logits, bf16 dlogits, dweight accumulated in bf16."""
    logits = _Bf16Head.apply(hidden, weight)
    return of_logits(logits, ids, advantages, config, mask, old, ref)


# name of a wrong loss -> the loss; all on bf16 weights
CONTROLS: dict[str, Callable] = {
    "gradient of the target logit only": target_only,
    "wrong sign for every 4th token": flipped(1 / 4),
    "wrong sign for every 20th token": flipped(1 / 20),
    "no mask": without_mask,
    "no clip": without_clip,
    "no KL": without_kl,
    "no ratio": without_ratio,
    "bf16 logits and sums": bf16_sums,
    "gradient times 0.6": scaled,
}
