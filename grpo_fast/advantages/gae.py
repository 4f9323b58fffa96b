"""Generalised advantage estimation on packed tokens: rewards (N,) and values (N,) -> advantages.

Token t of a completion has the state s_t = prompt + tokens before it, so `values` are read at the
rows that predict the tokens (`PackedBatch.rows`). A token that the policy did not write, such as
the answer of a tool, is a gap: nothing decays across it, and its own results are 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_fast.checks import check_tensor, describe, fail, is_number

KL_IN_REWARD = ("k1", "k3")
# as in `objective`: beyond it exp is continued by its tangent, and stays finite
_LOG_RATIO_LIMIT = 20.0


def _alone(value: Tensor) -> Tensor:
    """The sum over ranks of a value where there is one rank."""
    return value


def _check_packed(name: str, value: Tensor, like: Tensor | None = None) -> None:
    if like is not None:
        check_tensor(name, value, tuple(like.shape), like.device)
    elif not isinstance(value, Tensor) or value.dim() != 1 or not value.is_floating_point():
        fail(name, "floating-point tensor (N,)", describe(value))


def _check_mask(mask: Tensor | None, like: Tensor) -> None:
    if mask is not None:
        check_tensor("mask", mask, tuple(like.shape), like.device, floating=False)


def _check_bounds(cu_seqlens: Tensor, n: int) -> None:
    """(S+1,) integers, and on the host from 0 to N without a fall. (N,) never stands for (S,) here,
    so that a batch of as many sequences as tokens may have an empty one."""
    integer = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1
    if not integer or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        fail("cu_seqlens", "integer tensor (S+1,)", describe(cu_seqlens))
    if cu_seqlens.device.type == "cpu":
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != n or (cu_seqlens.diff() < 0).any():
            fail("cu_seqlens", f"boundaries rising from 0 to N = {n}", cu_seqlens.tolist())


def _check_discount(name: str, value: object, expected: str = "a number in [0, 1]") -> None:
    if not is_number(value) or not 0 <= value <= 1:
        fail(name, expected, describe(value) if isinstance(value, Tensor) else repr(value))


def _owners(bounds: Tensor, n: int) -> Tensor:
    """Sequence (N,) of each token; S for tokens behind the last sequence."""
    return torch.searchsorted(bounds[1:], torch.arange(n, device=bounds.device), right=True)


def _kept(mask: Tensor | None, bounds: Tensor) -> tuple[Tensor | None, Tensor]:
    """Order (N,) with the kept tokens first, and their boundaries; no gap is left among them."""
    if mask is None:
        return None, bounds
    before = torch.cat((bounds.new_zeros(1), (mask != 0).long().cumsum(0)))
    return torch.argsort(mask == 0, stable=True), before[bounds]


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets of packed sequences.

        delta_t = r_t + gamma * V_{t+1} - V_t        V behind the last kept token: bootstrap, or 0
        A_t     = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V_t

    The recursion runs by doubling: after the pass of width w every A_t holds the 2w deltas from t
    on, so L tokens need ceil(log2(L)) passes of elementwise operations and no loop over time. The
    result of a sequence is the same bits whatever else is packed with it.

    Source: High-Dimensional Continuous Control Using Generalized Advantage Estimation (2015);
    lambda by sequence: VAPO: Efficient and Reliable Reinforcement Learning (2025).

    Args:
        rewards: (N,) floating point, see `token_rewards`. Masked places may hold anything.
        values: (N,), the critic's expectation of the return from each token on.
        cu_seqlens: (S+1,) integers, boundaries of the sequences; one may be empty.
        gamma: discount of a token, in [0, 1]. 0.99 is a horizon of 100 tokens.
        lam: in [0, 1], or (S,) of them. 1: the return minus the value; 0: the TD error.
        mask: (N,) bool, the tokens that the policy wrote; None: all.
        bootstrap: (S,), the value behind a sequence that was cut; None: 0.
        longest: tokens of the longest sequence, on the host; None: N, which costs passes without
            effect where cu_seqlens are on an accelerator, and never another result.

    Returns:
        advantages and returns, (N,) float32 (float64 for float64 values), without gradient; exactly
        0 where masked.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
    """
    _check_packed("rewards", rewards)
    _check_packed("values", values, rewards)
    _check_bounds(cu_seqlens, rewards.numel())
    _check_mask(mask, rewards)
    _check_discount("gamma", gamma)
    sequences = (cu_seqlens.numel() - 1,)
    if isinstance(lam, Tensor):
        check_tensor("lam", lam, sequences, rewards.device)
    else:
        _check_discount("lam", lam, "a number in [0, 1], or a tensor (S,) of them")
    if bootstrap is not None:
        check_tensor("bootstrap", bootstrap, sequences, rewards.device)
    n = rewards.numel()
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    if n == 0:
        return rewards.new_zeros(0, dtype=dtype), rewards.new_zeros(0, dtype=dtype)
    with torch.no_grad():
        bounds = cu_seqlens.to(rewards.device, torch.int64)
        order, ends = _kept(mask, bounds)
        r, v = rewards.to(dtype), values.to(dtype)
        if order is not None:
            r, v = r[order], v[order]
        owner = _owners(ends, n).clamp(max=sequences[0] - 1)
        left = ends[owner + 1] - torch.arange(n, device=r.device)  # (N,) tokens from t to its end
        if longest is None:
            longest = int(cu_seqlens.diff().max()) if cu_seqlens.device.type == "cpu" else n
        behind = torch.zeros_like(v) if bootstrap is None else bootstrap.to(dtype)[owner]
        following = torch.where(left > 1, _shift(v, 1), behind)
        factor = gamma * (lam.to(dtype)[owner] if isinstance(lam, Tensor) else lam)
        advantages = _doubled(r + gamma * following - v, left, factor, longest)
        returns = advantages + v
        if order is None:
            return advantages, returns
        found = torch.stack((advantages, returns))
        found = torch.where(left > 0, found, torch.zeros_like(found))
        advantages, returns = torch.empty_like(found).index_copy_(1, order, found)
    return advantages, returns


def _shift(values: Tensor, step: int) -> Tensor:
    """values[t + step], and 0 behind the end."""
    return torch.cat((values[step:], values.new_zeros(min(step, values.numel()))))


def _doubled(delta: Tensor, left: Tensor, factor: float | Tensor, longest: int) -> Tensor:
    """sum_k factor^k delta_{t+k} over the rest of each sequence. The powers come from squaring,
    because torch.pow rounds differently in and behind the vectorised part of a tensor."""
    total, step = delta, 1
    while step < longest:
        total = torch.where(left > step, total + factor * _shift(total, step), total)
        factor, step = factor * factor, 2 * step
    return total


def length_lam(cu_seqlens: Tensor, alpha: float = 0.05, mask: Tensor | None = None) -> Tensor:
    """lam = 1 - 1 / (alpha * length), at least 0: longer sequences look further.

    Source: VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks (2025).

    Args:
        cu_seqlens: (S+1,) integers.
        alpha: > 0; 0.05 as in the paper, where sequences of up to 20 tokens get lambda 0.
        mask: (N,) bool, the tokens that are counted; None: all.

    Returns:
        (S,) float32, on the device of the mask, or that of cu_seqlens.

    Raises:
        ValueError: alpha is no finite number above 0.
    """
    if not is_number(alpha) or not 0 < alpha < float("inf"):
        fail("alpha", "a finite number > 0", repr(alpha))
    bounds = cu_seqlens.long() if mask is None else cu_seqlens.to(mask.device, torch.int64)
    _, ends = _kept(mask, bounds)
    return (1 - 1 / (alpha * ends.diff().clamp(min=1))).clamp(min=0.0).float()


def token_kl(logp: Tensor, ref_logp: Tensor, estimator: str = "k1") -> Tensor:
    """KL of the policy to the reference at each sampled token, in nats.

        k1 = log pi - log pi_ref            unbiased, may be negative at a token
        k3 = exp(-k1) - 1 + k1              never negative; its tangent beyond 20 nats

    Source: Approximating KL Divergence (Schulman, 2020).

    Raises:
        ValueError: unequal shapes, or an estimator other than k1 and k3.
    """
    _check_packed("ref_logp", ref_logp, logp)
    if estimator not in KL_IN_REWARD:
        fail("estimator", " or ".join(map(repr, KL_IN_REWARD)), repr(estimator))
    if estimator == "k1":
        return logp - ref_logp
    gap = ref_logp - logp
    exponent = gap.clamp(max=_LOG_RATIO_LIMIT)
    return torch.expm1(exponent) + exponent.exp() * (gap - exponent) - gap


def token_rewards(
    scores: Tensor,
    cu_seqlens: Tensor,
    *,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    shaped: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Rewards of tokens from the reward of each completion.

        r_t = -kl_coef * kl_t + shaped_t + [t is the last kept token of its sequence] * score

    A packed completion ends with its EOS, so the score stands on it and not behind it. A sequence
    without a kept token gets no reward.
    Source: Fine-Tuning Language Models from Human Preferences (2019).

    Args:
        scores: (S,) floating point, one for each completion.
        cu_seqlens: (S+1,) integers.
        kl: (N,) nats, from `token_kl`; needed unless kl_coef is 0.
        kl_coef: reward per nat.
        shaped: (N,) further rewards of the tokens; None: 0.
        mask: (N,) bool, the tokens that the policy wrote; None: all. The others get exactly 0.

    Returns:
        (N,) float32 (float64 for float64 scores), without gradient.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range.
    """
    bounds = cu_seqlens.to(scores.device, torch.int64)
    check_tensor("scores", scores, (bounds.numel() - 1,), scores.device)
    if not is_number(kl_coef) or (kl_coef != 0 and kl is None):
        fail("kl_coef", "0 without kl, else a number", repr(kl_coef))
    sized = next((t for t in (kl, shaped, mask) if t is not None), None)
    n = int(bounds[-1]) if sized is None else sized.numel()
    _check_bounds(cu_seqlens, n)
    rewards = scores.new_zeros(n, dtype=torch.promote_types(scores.dtype, torch.float32))
    for name, value in (("kl", kl), ("shaped", shaped)):
        if value is not None:
            check_tensor(name, value, (n,), scores.device)
    _check_mask(mask, rewards)
    with torch.no_grad():
        if kl_coef:
            rewards = rewards - kl_coef * kl
        if shaped is not None:
            rewards = rewards + shaped
        order, ends = _kept(mask, bounds)
        if n == 0:
            return rewards
        if mask is not None:
            rewards = torch.where(mask != 0, rewards, torch.zeros_like(rewards))
        owner = _owners(ends, n).clamp(max=scores.numel() - 1)
        places = torch.arange(n, device=scores.device)
        last = places == ends[owner + 1] - 1
        last &= ends[owner] < ends[owner + 1]
        terminal = torch.where(last, scores.to(rewards.dtype)[owner], torch.zeros_like(rewards))
        if order is not None:
            terminal = torch.empty_like(terminal).index_copy_(0, order, terminal)
        return rewards + terminal


def _selected(parts: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
    """The parts in the widest float there is, exactly 0 where masked."""
    wide = [p.float() if p.device.type == "mps" else p.double() for p in parts]
    pairs = zip(wide, masks, strict=True)
    return [p if m is None else torch.where(m != 0, p, torch.zeros_like(p)) for p, m in pairs]


def _moments(
    parts: list[Tensor], masks: list[Tensor | None], total: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of the kept tokens of all parts and ranks.

    In two passes: the deviations are squared after the mean of all is known, so that a large mean
    costs no digits. A rank without tokens still joins both sums.
    """
    chosen = _selected(parts, masks)
    pairs = zip(chosen, masks, strict=True)
    counts = [p.new_tensor(p.numel()) if m is None else (m != 0).sum().to(p) for p, m in pairs]
    count, added = total(torch.stack((sum(counts), sum(p.sum() for p in chosen))))
    mean = added / count.clamp(min=1)
    gaps = _selected([p - mean for p in chosen], masks)
    return count, mean, total(sum(g.square().sum() for g in gaps))


def whiten(
    parts: list[Tensor],
    masks: list[Tensor | None] | None = None,
    *,
    total: Callable[[Tensor], Tensor] = _alone,
    eps: float = 1e-8,
) -> list[Tensor]:
    """Mean 0 and variance 1 over the kept tokens of a window and of all ranks.

        w = (x - mean) * rsqrt(var + eps)       var with n - 1; fewer than two tokens: w = x - mean

    A mean of each rank, or of each micro-batch, would be another objective on every one of them.

    Args:
        parts: tensors (N_i,), the micro-batches of this rank; at least one, possibly empty.
        masks: (N_i,) bool for each, or None for all of a part.
        total: sums a tensor over the ranks; every rank calls `whiten` together.
        eps: added to the variance.

    Returns:
        parts whitened, each in its own dtype, exactly 0 where masked.
    """
    if not parts:
        fail("parts", "at least one tensor", parts)
    masks = [None] * len(parts) if masks is None else masks
    count, mean, squares = _moments(parts, masks, total)
    scale = torch.rsqrt(squares / (count - 1).clamp(min=1) + eps)
    scale = torch.where(count > 1, scale, torch.ones_like(scale))
    whitened = _selected([(p.to(mean) - mean) * scale for p in parts], masks)
    return [w.to(p.dtype) for w, p in zip(whitened, parts, strict=True)]


def explained_variance(
    returns: list[Tensor],
    values: list[Tensor],
    masks: list[Tensor | None] | None = None,
    *,
    total: Callable[[Tensor], Tensor] = _alone,
) -> tuple[Tensor, Tensor]:
    """1 - Var(returns - values) / Var(returns) over a window and all ranks, and Var(returns).

    1: the critic knows the returns; 0: no better than their mean. From global sums: a mean over
    micro-batches is another number. Read it beside the variance, since where the returns hardly
    vary it is far below 0 for a critic that is good enough.

    Args:
        returns, values: tensors (N_i,), the micro-batches of this rank.
        masks: (N_i,) bool for each, or None for all of a part.
        total: sums a tensor over the ranks.

    Returns:
        two 0-d tensors; the first is NaN where the returns do not vary.
    """
    masks = [None] * len(returns) if masks is None else masks
    count, _, spread = _moments(returns, masks, total)
    gaps = [r.double() - v.double() for r, v in zip(returns, values, strict=True)]
    _, _, error = _moments(gaps, masks, total)
    share = torch.where(spread > 0, 1 - error / spread, torch.full_like(spread, torch.nan))
    return share, spread / count.clamp(min=1)
