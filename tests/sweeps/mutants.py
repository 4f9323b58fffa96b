"""Errors that the tests have to notice, each a change of one place of the source.

A text that no longer occurs exactly once in its file is an error: whoever changes the line moves
the mutant along with it. `full_mutants.py` runs them.
"""

from __future__ import annotations

from kernel_mutants import KERNEL_MUTANTS, mutants_of

MUTANTS = [
    *mutants_of(
        "grpo_fast/objective/objectives.py",
        (
            "slope = m.where((plain > clipped) | (ratio > cap), 0.0, -ratio * advantage)",
            "slope = m.where((plain < clipped) | (ratio > cap), 0.0, -ratio * advantage)",
            "the gradient of the wrong side of the clip",
            "loss",
        ),
        (
            "plain = m.where(ratio > cap, cap, ratio) * advantage",
            "plain = ratio * advantage",
            "the value is not capped by delta",
            "loss",
        ),
        (
            "slope = -bounded(ratio, low, high) * advantage",
            "slope = -ratio * advantage",
            "cispo without its bounds",
            "loss",
        ),
        (
            "- gap - 1.0, 1.0 - scale",
            "- gap - 1.0, scale - 1.0",
            "k3 pushes away from the reference",
            "loss",
        ),
        (
            "by_ratio = by_ratio + m.where(outside, 0.0, beta * ratio * kl)",
            "by_ratio = by_ratio + 0.0",
            "no gradient through the ratio that weights the KL",
            "loss",
        ),
        (
            "m.where(advantage > 0.0, divergence - high, divergence - low)",
            "m.where(advantage > 0.0, divergence - low, divergence - high)",
            "dppo_kl with its bounds exchanged",
            "loss",
        ),
    ),
    *mutants_of(
        "grpo_fast/objective/levels.py",
        (
            "spread(sequence_sum(by_ratio, bounds) / length, bounds, n)",
            "spread(sequence_sum(by_ratio, bounds), bounds, n)",
            "the pull of a sequence without 1 / length",
            "loss",
        ),
        (
            'if level != "sequence_product":',
            'if level == "sequence_product":',
            "the product of the token ratios for their geometric mean",
            "loss",
        ),
        (
            "return lifted, _identity",
            "return log_ratio, _identity",
            "gspo_token with the ratio of a token",
            "loss",
        ),
        (
            "(advantages > 0) & (log_ratio > high)",
            "(advantages > 0) & (log_ratio < -low)",
            "gmpo clips the wrong side",
            "loss",
        ),
    ),
    *mutants_of(
        "grpo_fast/objective/corrections.py",
        (
            "total = total / sequence_sum(known.to(total.dtype), bounds).clamp(min=1.0)",
            "total = total * 1.0",
            "the product of a sequence for its geometric mean",
            "corrections",
        ),
        (
            "known = mask & ~torch.isnan(log_ratio)",
            "known = mask",
            "one missing rollout log-prob poisons its sequence",
            "corrections",
        ),
        (
            "(advantages < 0) & (drift > threshold)",
            "(advantages > 0) & (drift > threshold)",
            "the off-policy mask takes the good sequences",
            "corrections",
        ),
        (
            "torch.nanquantile(counted, 1.0 - share)",
            "torch.nanquantile(counted, share)",
            "the top-entropy set is the bottom one",
            "corrections",
        ),
    ),
    *mutants_of(
        "grpo_fast/objective/terms.py",
        (
            "torch.where(mask & ~dropped, -config.entropy_coef * weights, zero)",
            "torch.where(mask & ~dropped, config.entropy_coef * weights, zero)",
            "the entropy bonus has the sign of a penalty",
            "corrections",
        ),
        (
            "loss = loss - torch.where(dropped, zero, config.entropy_coef * entropy)",
            "loss = loss - config.entropy_coef * entropy",
            "the entropy of tokens outside the set is in the value",
            "corrections",
        ),
        (
            "by_token = torch.where(mask, logp - old, zero)",
            "by_token = logp - old + 0.1",
            "masked tokens are in the ratio of their sequence",
            "loss",
        ),
        (
            'old = torch.where(torch.isnan(fields["rollout_logp"]), old, fields["rollout_logp"])',
            "old = old * 1.0",
            "vespo's ratio is not that to the policy that sampled",
            "corrections",
        ),
    ),
    *mutants_of(
        "grpo_fast/objective/weights.py",
        (
            "weight = spread(1.0 / (lengths * total), bounds, mask.numel())",
            "weight = spread(1.0 / (lengths.mean() * total), bounds, mask.numel())",
            "grpo divides by the mean length",
            "loss",
        ),
        (
            'mask.sum() if AGGREGATIONS[scheme] == "tokens" else bounds.numel() - 1',
            'mask.numel() if AGGREGATIONS[scheme] == "tokens" else bounds.numel() - 1',
            "masked tokens are in the denominator",
            "loss",
        ),
        (
            "return torch.where(mask, weight, torch.zeros_like(weight))",
            "return weight * 1.0",
            "masked tokens have a weight",
            "mathematics",
        ),
    ),
    *mutants_of(
        "grpo_fast/loss/metrics.py",
        (
            "(terms.ratio < bounds[0]) & (terms.advantage < 0)",
            "(terms.ratio < bounds[0]) & (terms.advantage > 0)",
            "clip_low counts the side that is not clipped",
            "loss",
        ),
        (
            "finite = torch.isfinite(terms.logp) & torch.isfinite(terms.loss)",
            "finite = torch.isfinite(terms.ratio)",
            "a NaN is not counted",
            "rows",
        ),
    ),
    *mutants_of(
        "grpo_fast/loss/routes.py",
        (
            "sizes = sizes - sizes[0]",
            "sizes = sizes[[0, -1]] - sizes[0]",
            "the sequences of a chunk are taken for one",
            "loss",
        ),
        (
            "active = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)",
            "active = dlogp != 0",
            "rows with an entropy bonus alone leave the products",
            "corrections",
        ),
        (
            "hidden[keep], compact(dlogits, keep), place[keep]",
            "hidden[: keep.numel()], compact(dlogits, keep), place[keep]",
            "compacted rows meet the hidden states of others",
            "loss",
        ),
        (
            "return guess.dlogp[chunk.place], bonus",
            "return guess.dlogp[chunk.rows], bonus",
            "the derivative of another row when some are masked",
            "loss",
        ),
    ),
    *mutants_of(
        "grpo_fast/plan/route.py",
        (
            "fits = f.longest is not None and f.longest <= f.chunk_rows",
            "fits = f.longest is not None",
            "a sequence that does not fit a chunk is cut in one",
            "loss",
        ),
        (
            "elif by_itself and not f.fp16:",
            "elif by_itself:",
            "dlogits in fp16 without a scale",
            "kernels",
        ),
    ),
    *mutants_of(
        "grpo_fast/engine/chunks.py",
        (
            "place = slice(start, stop) if index is None else index[start:stop]",
            "place = slice(start, stop) if index is None else index[: stop - start]",
            "every chunk is the first one",
            "loss",
        ),
    ),
    *mutants_of(
        "grpo_fast/engine/gradients.py",
        (
            "grad.zero_()",
            "grad.mul_(1.0)",
            "dweight of no row at all is what its memory held",
            "mathematics",
        ),
        (
            "dhidden = torch.addmm(dh, du, lora.A.to(du.dtype), alpha=lora.scale)",
            "dhidden = torch.addmm(dh, du, lora.A.to(du.dtype))",
            "the adapter's part of dhidden without its scale",
            "options",
        ),
        (
            "return torch.exp2(-torch.floor(",
            "return torch.exp2(torch.floor(",
            "gradients in fp16 are made smaller",
            "kernels",
        ),
    ),
    *mutants_of(
        "grpo_fast/engine/gemm.py",
        (
            "            out.zero_()\n",
            "            out.mul_(1.0)\n",
            "bf16 dhidden is added to what its memory held",
            "rows",
        ),
        (
            "torch.mm(dlogits.t(), hidden, out=out) if first else out.addmm_(dlogits.t(), hidden)",
            "torch.mm(dlogits.t(), hidden, out=out)",
            "dweight is that of the last chunk",
            "loss",
        ),
    ),
    *mutants_of(
        "grpo_fast/engine/passes.py",
        (
            "stats[:, index] = compact",
            "stats[:, :n] = compact",
            "log-probs of masked batches land on the first rows",
            "rows",
        ),
        (
            "index = (size != 0).nonzero()[:, 0]",
            "index = (upstream[0] != 0).nonzero()[:, 0]",
            "rows with a gradient by lse or entropy alone are left out",
            "rows",
        ),
    ),
    *mutants_of(
        "grpo_fast/engine/logprob.py",
        (
            "torch.where(mask, g.to(like.dtype), zero)",
            "g.to(like.dtype)",
            "masked rows get a gradient",
            "rows",
        ),
        (
            "if u is not None and dentropy is None and dlse is None:",
            "if u is not None:",
            "a frozen head loses the gradient of entropy and lse",
            "gradcheck",
        ),
    ),
    *mutants_of(
        "grpo_fast/engine/torch_backend.py",
        (
            "torch.mul(p, (by_p * norm * inner)[:, None], out=grad)",
            "torch.mul(p, 0.0, out=grad)",
            "no -p beside the target",
            "rows",
        ),
        (
            "at_target = dlogp * -torch.expm1(logp)",
            "at_target = dlogp * 1.0",
            "no -p at the target",
            "rows",
        ),
        (
            "mean = log_sum - entropy",
            "mean = log_sum",
            "the gradient of the entropy about the wrong mean",
            "rows",
        ),
        (
            "torch.where(gap == 0.0, torch.log1p(rest), torch.log(total))",
            "torch.log(total)",
            "log-probs near 0 are rounded away",
            "rows",
        ),
        (
            "(by_logp + by_ratio) * weights, None",
            "(by_logp + by_ratio) * weights * 0.6, None",
            "every gradient of the one-pass loss times 0.6",
            "loss",
        ),
    ),
    *KERNEL_MUTANTS,
]
