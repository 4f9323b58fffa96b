"""A vocabulary split over the ranks against one process; `parallel_worker.py` runs these."""

from __future__ import annotations

import torch
import torch.distributed as dist
from loss_cases import generator, make_case, relative

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss, reference
from grpo_fast.engine import parallel
from grpo_fast.engine.backend import select
from grpo_fast.engine.chunks import FIXED_BYTES
from grpo_fast.objective import objectives

BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def splits(V: int) -> dict[str, list[int]]:
    """Rows of each rank: as torch chunks them, as unequal as can be, and with an empty rank."""
    W = dist.get_world_size()
    step = -(-V // W)
    chunked = [max(0, min(step, V - r * step)) for r in range(W)]
    return {
        "chunked": chunked,
        "ragged": [1] * (W - 1) + [V - W + 1],
        "empty": [0] + [1] * (W - 2) + [V - W + 2],
    }


def mine(sizes: list[int]) -> slice:
    rank = dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def edges(sizes: list[int], V: int, n: int) -> torch.Tensor:
    """(n,) ids that begin with the first and last row of every shard."""
    ends = torch.tensor(sizes).cumsum(0)
    known = torch.cat((ends - 1, ends - torch.tensor(sizes))).clamp(0, V - 1)
    return torch.cat((known, torch.randint(V, (n,), generator=generator(3))))[:n]


def refused(error, what, function, *args, **kwargs):
    """The call raises, and says so."""
    try:
        function(*args, **kwargs)
    except error as e:
        assert what in str(e), str(e)
        return
    raise AssertionError(f"nothing was raised about {what}")


def replicated(tensor: torch.Tensor) -> None:
    """The same bits on every rank."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor.contiguous())
    same = [torch.equal(torch.nan_to_num(t), torch.nan_to_num(tensor)) for t in every]
    assert all(same), "the ranks have different bits"


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def agree(got: torch.Tensor, want: torch.Tensor, what: str, bound: float) -> None:
    if want.numel():
        error = relative(got, want)
        assert error <= bound, f"{what}: {error:.2e} > {bound}"


def head(V: int, dtype: torch.dtype, n: int = 21, H: int = 24, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, H), (V, H), (V,))]
    made[1] /= H**0.5
    made[0] *= 6
    return [t.to(dtype) for t in made]


def check_logprob(V: int, sizes: list[int], dtype: torch.dtype, **options) -> None:
    """All three results and all three gradients, with NaN in the masked hidden states."""
    hidden, weight, bias = head(V, dtype)
    n = hidden.shape[0]
    ids = edges(sizes, V, n)
    mask = torch.arange(n) % 7 != 5
    # what is masked may hold anything, on each rank something else
    ids = torch.where(mask, ids, -100 - dist.get_rank())
    hidden[~mask] = float("nan")
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(3, n, generator=g, dtype=torch.float64).to(dtype)
    results = []
    for group in (None, dist.group.WORLD):
        part = slice(0, V) if group is None else mine(sizes)
        leaves = [leaf(hidden), leaf(weight[part]), leaf(bias[part])]
        out = linear_logprob(
            *leaves[:2], ids, mask=mask, bias=leaves[2], entropy=True, tp_group=group, **options
        )
        sum((x * u).sum() for x, u in zip(out, upstream, strict=True)).backward()
        results.append((out, leaves))
    (want, whole), (got, own) = results
    for name, a, b in zip(("logp", "entropy", "lse"), got, want, strict=True):
        agree(a.detach(), b.detach(), name, BOUND[dtype])
        replicated(a.detach())
    assert (got.logp <= 0).all()
    replicated(own[0].grad)
    part = mine(sizes)
    agree(own[0].grad, whole[0].grad, "dhidden", BOUND[dtype])
    assert own[1].grad.shape == own[1].shape
    # a shard of one row may have a gradient of nothing but rounding, so the norm is the whole's
    for name, i in (("dweight", 1), ("dbias", 2)):
        padded = whole[i].grad.clone()
        padded[part] = own[i].grad
        agree(padded, whole[i].grad, name, BOUND[dtype])


@check
def logprob_of_even_and_uneven_shards():
    for V in (77, 80, 1001):
        for sizes in splits(V).values():
            for dtype in BOUND:
                check_logprob(V, sizes, dtype)


@check
def logprob_with_head_transforms():
    for sizes in splits(77).values():
        for dtype in BOUND:
            check_logprob(77, sizes, dtype, softcap=8.0, temperature=0.7, logit_scale=1.3)


@check
def chunks_are_sized_by_the_largest_shard():
    """Two chunks; a rank that sized them by its own single row would make one."""
    V, sizes = 77, splits(77)["ragged"]
    budget = FIXED_BYTES + 16 * 4 * (V + 3 * 24)
    check_logprob(V, sizes, torch.float32, workspace_bytes=budget)


def policy(group, sizes, config, frozen=False, dtype=torch.float32, **fields):
    """Loss, metrics and gradients of the 16 tokens of a case, with NaN where masked."""
    case = make_case()
    part = slice(0, 77) if group is None else mine(sizes)
    g = torch.Generator().manual_seed(5)
    bias = torch.randn(77, generator=g)
    hidden = leaf(case.hidden.to(dtype))
    weight, bias = case.weight.to(dtype)[part], bias.to(dtype)[part]
    if not frozen:
        weight, bias = leaf(weight), leaf(bias)
    loss, metrics = linear_policy_loss(
        hidden,
        weight,
        case.ids,
        case.advantages,
        config=config,
        mask=case.mask,
        old_logp=case.old_logp,
        ref_logp=case.ref_logp if config.beta else None,
        bias=bias,
        tp_group=group,
        **fields,
    )
    (3.0 * loss).backward()
    return loss.detach(), metrics, hidden.grad, weight.grad, bias.grad


def check_policy(config, frozen=False, **fields):
    for sizes in splits(77).values():
        for dtype, bound in BOUND.items():
            want = policy(None, sizes, config, frozen, dtype, **fields)
            got = policy(dist.group.WORLD, sizes, config, frozen, dtype, **fields)
            agree(got[0], want[0], "loss", bound)
            agree(got[2], want[2], "dhidden", bound)
            replicated(got[0])
            replicated(got[2])
            assert want[2].abs().max() > 1e-3
            assert 0 < got[1]["clip_ratio"] < 1
            assert got[1].keys() == want[1].keys()
            for key, value in want[1].items():
                agree(got[1][key], value, key, 10 * bound)
            for a, b, name in ((got[3], want[3], "dweight"), (got[4], want[4], "dbias")):
                assert (a is None) == (b is None) == frozen
                if not frozen:
                    padded = b.clone()
                    padded[mine(sizes)] = a
                    agree(padded, b, name, bound)


@check
def policy_loss_at_token_level():
    check_policy(LossConfig(beta=0.1, temperature=0.9))
    check_policy(LossConfig(loss_type="cispo", epsilon_high=1.2, temperature=0.9), softcap=9.0)


@check
def policy_loss_at_sequence_level():
    check_policy(LossConfig(importance_sampling_level="sequence", temperature=0.9))


@check
def policy_loss_of_a_frozen_head():
    check_policy(LossConfig(temperature=0.9), frozen=True)


@check
def policy_loss_without_a_gradient():
    sizes, config = splits(77)["chunked"], LossConfig(temperature=0.9)
    case = make_case()
    given = {"config": config, "mask": case.mask, "old_logp": case.old_logp}
    with torch.no_grad():
        want, _ = linear_policy_loss(case.hidden, case.weight, case.ids, case.advantages, **given)
        part = case.weight[mine(sizes)]
        got, _ = linear_policy_loss(
            case.hidden, part, case.ids, case.advantages, **given, tp_group=dist.group.WORLD
        )
    agree(got, want, "loss", 1e-6)


@check
def policy_row_function_with_entropy_and_rollout():
    """Terms and dlogits against autograd in float64; the shards are slices of the logits."""
    V, n = 77, 12
    sizes = splits(V)["chunked"]
    g = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(n, V, generator=g, dtype=torch.float64)
    ids = edges(sizes, V, n)
    advantages, weights = torch.randn(2, n, generator=g, dtype=torch.float64)
    weights = weights.abs()
    weights[3] = 0.0
    whole = leaf(logits)
    logp, entropy, _ = reference.logprob(whole, ids, 1 / 0.8)
    old, rollout = (logp.detach() + 0.3 * torch.randn(n, generator=g) for _ in range(2))
    factor = (old - rollout).exp().clamp(0.8, 1.1)
    want = weights * (-advantages * factor * logp - 0.05 * entropy)
    want.sum().backward()
    part = mine(sizes)
    shard = parallel.place(logits, logits.T[part], None, dist.group.WORLD, ids=ids).shard
    backend = parallel.vocabulary_parallel(select("cpu"), shard)
    terms, out = torch.full((6, n), float("nan")).double(), logits[None, :, part].clone()
    backend.policy(
        out,
        ids,
        advantages,
        weights,
        terms,
        out,
        token_loss=objectives.token_loss,
        objective=objectives.reinforce,
        kl=objectives.k3,
        kl_gradient=objectives.k3,
        through_ratio=False,
        weight_kl=False,
        parameters=(0.0,) * 4,
        beta=0.0,
        entropy_coef=0.05,
        old_logp=old,
        rollout_logp=rollout,
        rollout_weight=objectives.rollout_weight,
        rollout_bounds=(0.8, 1.1),
        inv_temperature=0.8,
    )
    agree(terms[0], want.detach(), "loss", 1e-12)
    agree(terms[2], entropy.detach(), "entropy", 1e-12)
    agree(out[0], whole.grad[:, part], "dlogits", 1e-12)
    assert (out[0, 3] == 0).all()


@check
def arguments_are_compared_in_the_first_call_of_their_shapes():
    """A later call makes the collectives of its statistics and no other, and has the same bits."""
    V, group = 53, dist.group.WORLD
    sizes = splits(V)["ragged"]
    hidden, weight, bias = head(V, torch.float32)
    ids, part = edges(sizes, V, hidden.shape[0]), mine(sizes)
    gathers, real = [], dist.all_gather

    def counting(out, value, **kwargs):
        gathers.append(value.dtype)
        return real(out, value, **kwargs)

    def call(ids):
        gathers.clear()
        given = {"bias": bias[part], "tp_group": group}
        return linear_logprob(hidden, weight[part], ids, **given).logp, list(gathers)

    dist.all_gather = counting
    try:
        (first, before), (second, after) = call(ids), call(ids)
        # another shape is another first call, on every rank, before it is refused
        refused(ValueError, "ids: expected", call, ids[:, None])
        other = list(gathers)
    finally:
        dist.all_gather = real
    assert before == [torch.int64, torch.float32] and after == [torch.float32]
    assert torch.equal(first, second) and other == [torch.int64]


@check
def banned_shards_and_nan():
    """A shard of nothing but -inf, targets in it, a vocabulary of nothing else, and a NaN."""
    V = 77
    sizes = splits(V)["chunked"]
    hidden, weight, bias = head(V, torch.float32)
    ids = edges(sizes, V, hidden.shape[0])
    bias[sizes[0] : sizes[0] + sizes[1]] = -torch.inf
    away = (ids < sizes[0]) | (ids >= sizes[0] + sizes[1])
    for mask in (None, away):
        results = []
        for group in (None, dist.group.WORLD):
            part = slice(0, V) if group is None else mine(sizes)
            leaves = [leaf(hidden), leaf(weight[part]), leaf(bias[part])]
            out = linear_logprob(
                *leaves[:2], ids, mask=mask, bias=leaves[2], entropy=True, tp_group=group
            )
            upstream = torch.linspace(-1, 1, ids.numel())
            torch.autograd.backward(
                (out.logp, out.entropy, out.lse), (upstream, 0.3 * upstream, 0.1 * upstream)
            )
            results.append((out, leaves[0].grad, leaves[1].grad))
        (want, dhidden, dweight), (got, own_dhidden, own_dweight) = results
        if mask is None:
            assert torch.equal(got.logp == -torch.inf, ~away)
            assert torch.equal(want.logp == -torch.inf, ~away)
        for a, b in zip(got, want, strict=True):
            agree(a[away].detach(), b[away].detach(), "results", 1e-6)
        agree(own_dhidden, dhidden, "dhidden", 1e-6)
        padded = dweight.clone()
        padded[mine(sizes)] = own_dweight
        agree(padded, dweight, "dweight", 1e-6)
    part, group = mine(sizes), dist.group.WORLD
    out = linear_logprob(
        hidden, weight[part], ids, bias=bias[part] * 0 - torch.inf, entropy=True, tp_group=group
    )
    assert all(torch.isnan(x).all() for x in out[:2])
    weight[-1, 0] = float("nan")
    out = linear_logprob(hidden, weight[part], ids, entropy=True, tp_group=group)
    assert all(torch.isnan(x).all() for x in out)
