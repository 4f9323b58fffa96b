"""The row functions of `kernels/` in plain torch, with the same signatures: CPU and old GPUs.

Works through SCRATCH_BYTES of rows at a time, so that beside the logits it is given it holds one
small block whatever V is, and the passes over a block stay near the cache. Computes in fp32, or in
the dtype of float64 logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# 4 MiB: two blocks of fp32 rows; at V = 49152 that is 10 rows, where the ~12 launches of a block
# cost under 5 % of its arithmetic on 2 cores
SCRATCH_BYTES = 4 << 20
# stands for -inf beside the row max: exp gives 0, and 0 * FLOOR * any gradient is still 0, not NaN
FLOOR = -1e30


def _row_blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows (n, V) of logits (B, T, V) with their slice of N = B * T."""
    B, T, V = logits.shape
    width = 8 if logits.dtype == torch.float64 else 4
    rows = max(1, SCRATCH_BYTES // (2 * V * width))
    for b in range(B):
        for t in range(0, T, rows):
            block = logits[b, t : t + rows]
            yield slice(b * T + t, b * T + t + block.shape[0]), block


def _of_rows(inv_temperature: float | Tensor, rows: slice, index: Tensor | slice) -> float | Tensor:
    """The number for all rows, or the (n,) numbers of the rows in index."""
    return inv_temperature[rows][index] if isinstance(inv_temperature, Tensor) else inv_temperature


def _column(factor: float | Tensor) -> float | Tensor:
    """What a block (n, V) is multiplied by: a number, or (n,) -> (n, 1)."""
    return factor[:, None] if isinstance(factor, Tensor) else factor


def _transform(
    x: Tensor, scale: float, softcap: float | None, inv_temperature: float | Tensor
) -> Tensor:
    """Block of logits as stored -> z in fp32: x itself where nothing changes, else a new tensor."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if softcap is not None:
        return z.mul(scale / softcap).tanh_().mul_(_column(softcap * inv_temperature))
    factor = scale * inv_temperature
    if not isinstance(factor, Tensor) and factor == 1.0:
        return z
    return z.mul(_column(factor))


def _sum(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Row sums in a wider dtype; of long rows the sums of 128 neighbours are made in p's own, which
    takes a twentieth of the time on a CPU."""
    whole = p.shape[1] // 128 * 128
    if dtype == p.dtype or whole < 4096:
        return p.sum(1, dtype=dtype)
    blocks = p[:, :whole].unflatten(1, (-1, 128)).sum(2)
    return blocks.sum(1, dtype=dtype) + p[:, whole:].sum(1, dtype=dtype)


def _row_stats(
    x: Tensor, ids: Tensor, keep: bool, entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, V), only read, and ids (n,) -> stats (4, n), p = exp(x - max), and x - max if keep."""
    peak = x.amax(1)
    # all -inf: NaN rows, as torch.log_softmax gives; one -inf: clamped, so that 0 * z is 0
    z = x - peak[:, None]
    gap = z.gather(1, ids[:, None])[:, 0]
    if not z.is_cpu:
        z.clamp_(min=FLOOR)
    p = torch.exp(z)
    # not a matrix product: its plain running sum over 150k terms costs three digits of the entropy
    dot = (p * z if keep else z.mul_(p)).sum(1) if entropy else None
    # on CPU looking at the sum is cheaper than clamping every logit
    if entropy and z.is_cpu and not torch.isfinite(dot).all():
        z = (x - peak[:, None]).clamp_(min=FLOOR)
        dot = (p * z).sum(1)
    # the target is kept out of the sum: log1p(rest) holds what log(1 + rest) would round away
    target = p.gather(1, ids[:, None])
    # in fp32 the sum and its log are wrong by 2e-9 nats on average, always to one side: 1.6e-4 of
    # the gradient of a sequence-level ratio over 65k tokens. MPS has nothing wider, and elsewhere
    # the kernels compute this
    wide = torch.float64 if p.is_cpu else p.dtype
    rest = _sum(p.scatter_(1, ids[:, None], 0.0), wide)
    p.scatter_(1, ids[:, None], target)
    total = rest + target[:, 0]
    log_sum = torch.where(gap == 0.0, torch.log1p(rest), torch.log(total))
    spread = log_sum - dot / total if entropy else torch.zeros_like(total)
    stats = torch.stack((gap - log_sum, spread, peak.to(wide), log_sum))
    return stats.to(x.dtype), p, z


def logprob_fwd(
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    *,
    active: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
) -> None:
    """Fill stats (4, N) with logp, entropy (0 without `entropy`), max and log-sum; see
    `kernels/logprob.py`."""
    for rows, block in _row_blocks(logits):
        if active is None:
            x = _transform(block, scale, softcap, _of_rows(inv_temperature, rows, slice(None)))
            stats[:, rows] = _row_stats(x, ids[rows], False, entropy)[0]
            continue
        index = active[rows].nonzero()[:, 0]
        stats[:, rows] = 0.0
        if index.numel():
            x = _transform(block[index], scale, softcap, _of_rows(inv_temperature, rows, index))
            stats[:, rows.start + index] = _row_stats(x, ids[rows][index], False, entropy)[0]


def _store_gradient(
    out: Tensor,
    index: Tensor | slice,
    z: Tensor,
    p: Tensor,
    ids: Tensor,
    stats: Tensor,
    dlogp: Tensor,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    chain: tuple[float, float | None, float | Tensor],
) -> None:
    """out[index] = dloss/dlogits (n, V), from z - max and p = exp(z - max), both used up.

    z is read only with dentropy or a softcap.
    """
    logp, entropy, peak, log_sum = stats
    scale, softcap, inv_temperature = chain
    inner = scale * inv_temperature
    # -1: the target is a column of another rank's logits, and no column here is special
    target = ids.clamp(min=0)[:, None]
    norm = torch.exp(-log_sum)
    by_p = -dlogp if dlse is None else dlse - dlogp
    at_target = dlogp * -torch.expm1(logp)
    p_target = p.gather(1, target)[:, 0] * norm
    if dlse is not None:
        at_target = at_target + dlse * p_target
    # straight into its place where that has the type of p
    grad = out if isinstance(index, slice) and out.dtype == p.dtype else p
    if dentropy is None:
        torch.mul(p, (by_p * norm * inner)[:, None], out=grad)
    else:
        # -p (z - max - E[z - max]) dentropy, with E = log_sum - entropy
        mean = log_sum - entropy
        gap = z.gather(1, target)[:, 0] - mean
        at_target = at_target - torch.where(p_target > 0, dentropy * p_target * gap, 0.0)
        factor = (z - mean[:, None]).mul_(-dentropy[:, None]).add_(by_p[:, None])
        torch.mul(p, factor.mul_((norm * inner)[:, None]), out=grad)
    value = torch.where(ids[:, None] < 0, grad.gather(1, target), (at_target * inner)[:, None])
    grad.scatter_(1, target, value)
    if softcap is not None:
        tanh = (z + peak[:, None]).div_(_column(softcap * inv_temperature))
        grad.mul_(tanh.square_().neg_().add_(1.0))
    if grad is p:
        out[index] = p.to(out.dtype)


def logprob_bwd(
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    dlogp: Tensor,
    out: Tensor,
    *,
    dlse: Tensor | None = None,
    dentropy: Tensor | None = None,
    active: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Fill out (B, T, V) with the gradient by logits (out may be logits); see
    `kernels/logprob.py`."""
    keep = dentropy is not None or softcap is not None
    for (rows, block), (_, out_block) in zip(_row_blocks(logits), _row_blocks(out), strict=True):
        index = slice(None) if active is None else active[rows].nonzero()[:, 0]
        chain = (scale, softcap, _of_rows(inv_temperature, rows, index))
        x = _transform(block[index], *chain)
        if active is not None:
            out_block.zero_()
            if index.numel() == 0:
                continue
        stat = stats[:, rows][:, index]
        z = x - stat[2][:, None]
        if keep:
            z.clamp_(min=FLOOR)
        p = torch.exp(z) if keep else z.exp_()
        upstream = [None if g is None else g[rows][index] for g in (dlogp, dlse, dentropy)]
        _store_gradient(out_block, index, z, p, ids[rows][index], stat, *upstream, chain)


def token_terms(
    logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    token_loss: Callable,
    objective: Callable,
    kl: Callable,
    kl_gradient: Callable,
    through_ratio: bool,
    weight_kl: bool,
    parameters: tuple[float, float, float, float],
    beta: float,
    entropy_coef: float = 0.0,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    rollout_weight: Callable | None = None,
    rollout_bounds: tuple[float, float] = (0.0, float("inf")),
    rollout_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Terms (6, n) of tokens whose log-probs and entropies (n,) are known, and d loss / d entropy;
    what `kernels/policy.py` does between its two reads of a row."""
    assert rollout_logp is None or rollout_weight is not None
    old = logp if old_logp is None else old_logp
    if rollout_logp is not None:
        factor = rollout_weight(old - rollout_logp, *rollout_bounds, rollout_mask)
        advantages = advantages * factor
    loss, by_logp, by_ratio, ratio, kl_value = token_loss(
        logp,
        # on-policy: 0 for every finite logp, NaN where logp is NaN
        logp - old,
        logp if ref_logp is None else ref_logp,
        advantages,
        *parameters,
        beta,
        objective,
        kl,
        kl_gradient,
        through_ratio,
        weight_kl,
        ref_logp is not None,
    )
    dlogp, dentropy = (by_logp + by_ratio) * weights, None
    if entropy_coef != 0.0:
        loss = loss - entropy_coef * entropy
        dentropy = -entropy_coef * weights
    return torch.stack((loss * weights, logp, entropy, ratio, kl_value, dlogp)), dentropy


def without_gradient(dlogp: Tensor, dentropy: Tensor | None) -> Tensor:
    """Rows whose derivatives are exactly 0."""
    return dlogp == 0.0 if dentropy is None else (dlogp == 0.0) & (dentropy == 0.0)


def policy(
    logits: Tensor,
    ids: Tensor,
    advantages: Tensor,
    weights: Tensor,
    terms: Tensor,
    out: Tensor | None,
    *,
    entropy_coef: float = 0.0,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    active: Tensor | None = None,
    inv_temperature: float | Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
    **objective: object,
) -> None:
    """Fill terms (6, N) and, unless out is None, out (B, T, V); see `kernels/policy.py`.

    objective: the other arguments of `token_terms`.
    """
    keep = out is not None and (softcap is not None or entropy_coef != 0.0)
    given = {"old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    outs = _row_blocks(logits if out is None else out)
    for (rows, block), (_, out_block) in zip(_row_blocks(logits), outs, strict=True):
        index = slice(None) if active is None else active[rows].nonzero()[:, 0]
        if active is not None:
            terms[:, rows] = 0.0
            terms[3, rows] = 1.0
        chain = (scale, softcap, _of_rows(inv_temperature, rows, index))
        x = _transform(block[index], *chain)
        target = ids[rows][index]
        if out is not None and active is not None:
            out_block.zero_()
        if target.numel() == 0:
            continue
        stats, p, z = _row_stats(x, target, keep, entropy or entropy_coef != 0.0)
        mine = {name: None if v is None else v[rows][index] for name, v in given.items()}
        row_terms, dentropy = token_terms(
            *stats[:2],
            advantages[rows][index],
            weights[rows][index],
            entropy_coef=entropy_coef,
            **mine,
            **objective,
        )
        terms[:, rows][:, index] = row_terms
        if out is not None:
            dlogp = row_terms[5]
            _store_gradient(out_block, index, z, p, target, stats, dlogp, None, dentropy, chain)
            # NaN in a row that has no gradient stays out of it
            dead = without_gradient(dlogp, dentropy).nonzero()[:, 0]
            out_block[dead if active is None else index[dead]] = 0.0


def scale(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = x * factor, of any shape; out may be x, which is left alone where factor is 1.

    Half precision in place goes through fp32, 256 rows at a time: a loss scale of 65536 is inf in
    fp16.
    """
    # reading the factor makes a GPU wait, and a CPU save a pass
    if x.is_cpu and factor.item() == 1.0:
        if out is not x:
            out.copy_(x)
    elif x.dtype.itemsize >= 4:
        torch.mul(x, factor.to(x.dtype), out=x)
        if out is not x:
            out.copy_(x)
    else:
        planes = zip(*(t if t.dim() == 3 else t[None] for t in (x, out)), strict=True)
        for plane, out_plane in planes:
            for rows, out_rows in zip(plane.split(256), out_plane.split(256), strict=True):
                out_rows.copy_(rows.float().mul_(factor))
