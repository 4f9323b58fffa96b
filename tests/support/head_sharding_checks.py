"""A vocabulary split over ranks that have tokens of their own; `parallel_worker.py` runs these."""

from __future__ import annotations

import torch
import torch.distributed as dist
from allocations import Allocations
from torch.utils.flop_counter import FlopCounterMode
from vocabulary_checks import agree, leaf, mine, refused, replicated, splits

from grpo_fast import Head, LossConfig, linear_logprob, linear_policy_loss
from grpo_fast.engine import parallel
from grpo_fast.loss.vocabulary import sharded_logprob, sharded_policy_loss

CHECKS = []
BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}
# sequences of each rank, in tokens: unequal, with an empty sequence, and a rank without a token
LENGTHS = ((5, 0, 9), (3,), (0,), (12, 2, 1, 4))
V, H = 77, 24


def check(function):
    CHECKS.append(function)
    return function


class Batch:
    """Packed tokens of the first `world` ranks, of which one takes its own."""

    def __init__(self, dtype: torch.dtype, lengths=LENGTHS, masked_rank: int = -1) -> None:
        g = torch.Generator().manual_seed(3)
        self.ranks = lengths[: dist.get_world_size()]
        sizes = [n for rank in self.ranks for n in rank]
        n = sum(sizes)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.weight, self.bias = (draw(V, H) / H**0.5).to(dtype), draw(V).to(dtype)
        self.A, self.B = (0.3 * draw(4, H)).to(dtype), (0.3 * draw(V, 4)).to(dtype)
        self.hidden = (3 * draw(n, H)).to(dtype)
        self.ids = torch.randint(V, (n,), generator=g)
        self.mask = torch.arange(n) % 5 != 3
        self.advantages = draw(len(sizes)).to(dtype)
        self.cu_seqlens = torch.tensor([0, *sizes]).cumsum(0)
        logp = linear_logprob(self.hidden, self.weight, self.ids, bias=self.bias).logp.detach()
        self.old_logp, self.ref_logp, self.rollout_logp = (
            logp + 0.3 * draw(n).to(logp) for _ in range(3)
        )
        rank = dist.get_rank()
        self.tokens = _part([sum(r) for r in self.ranks], rank)
        self.sequences = _part([len(r) for r in self.ranks], rank)
        if masked_rank >= 0:
            self.mask[_part([sum(r) for r in self.ranks], masked_rank)] = False
        # what is masked may hold anything
        for name in ("hidden", "old_logp", "ref_logp", "rollout_logp"):
            getattr(self, name)[~self.mask] = float("nan")

    def given(self, config: LossConfig, tokens: slice) -> dict:
        names = ["mask", "old_logp", *(["ref_logp"] if config.beta else [])]
        names += ["rollout_logp"] if config.rollout_correction == "token_truncate" else []
        return {name: getattr(self, name)[tokens] for name in names}


def _part(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def agree_with_one(batch, config, sizes, lora=False, advantages=None, **options) -> None:
    """Loss, metrics and every gradient, of each rank's slice."""
    bound, everything = BOUND[batch.hidden.dtype], slice(None)
    advantages = batch.advantages if advantages is None else advantages
    every_token = advantages.numel() == batch.ids.numel()
    part, own = mine(sizes), batch.tokens
    whole = [leaf(t) for t in (batch.hidden, batch.weight, batch.bias, batch.A, batch.B)]
    rows = [leaf(t) for t in (batch.hidden[own], batch.weight[part], batch.bias[part])]
    rows += [leaf(batch.A), leaf(batch.B[part])]

    def head(t):
        return Head(t[1], t[2], lora=(t[3], t[4], 0.5) if lora else None)

    want, metrics = linear_policy_loss(
        whole[0],
        head(whole),
        batch.ids,
        advantages,
        config=config,
        cu_seqlens=batch.cu_seqlens,
        **batch.given(config, everything),
        **options,
    )
    bounds = batch.cu_seqlens[batch.sequences.start : batch.sequences.stop + 1]
    got, seen = sharded_policy_loss(
        rows[0],
        head(rows),
        batch.ids[own],
        advantages[own if every_token else batch.sequences],
        group=dist.group.WORLD,
        cu_seqlens=bounds - bounds[0],
        config=config,
        **batch.given(config, own),
        **options,
    )
    want.backward()
    got.backward()
    # a sum of both signs: relative to its terms, which are near 1, and not to what is left of them
    assert (got - want).abs() <= bound * want.abs().clamp(min=1), (got, want)
    replicated(got.detach())
    assert seen.keys() == metrics.keys()
    for name, value in metrics.items():
        agree(seen[name], value, name, 10 * bound)
    # as an engine that averages over the ranks wants it
    mean = rows[0].grad / dist.get_world_size()
    padded = whole[0].grad.clone()
    padded[own] = mean
    agree(padded, whole[0].grad, "dhidden", bound)
    for name, i, place in (("dweight", 1, part), ("dbias", 2, part), ("dB", 4, part)):
        if whole[i].grad is not None:
            padded = whole[i].grad.clone()
            padded[place] = rows[i].grad
            agree(padded, whole[i].grad, name, bound)
    if lora:
        agree(rows[3].grad, whole[3].grad, "dA", bound)
        replicated(rows[3].grad)


@check
def ranks_with_tokens_of_their_own():
    configs = (
        LossConfig(beta=0.1),
        LossConfig(loss_type="grpo", beta=0.1),
        LossConfig(loss_type="gspo", beta=0.05),
        LossConfig(loss_type="cispo", epsilon_high=1.2, temperature=0.9),
        LossConfig(rollout_correction="token_truncate", rollout_ratio_max=1.1),
    )
    for dtype in BOUND:
        for sizes in splits(V).values():
            for config in configs:
                agree_with_one(Batch(dtype), config, sizes)


@check
def with_an_adapter_on_the_head():
    for dtype in BOUND:
        agree_with_one(Batch(dtype), LossConfig(), splits(V)["chunked"], lora=True)


@check
def with_a_denominator_and_advantages_of_tokens():
    batch = Batch(torch.float64)
    advantages = torch.linspace(-1, 1, batch.ids.numel(), dtype=torch.float64)
    sizes = splits(V)["ragged"]
    agree_with_one(batch, LossConfig(), sizes, advantages=advantages, denominator=1000)


@check
def with_a_rank_whose_tokens_are_all_masked():
    for rank in range(dist.get_world_size()):
        agree_with_one(Batch(torch.float64, masked_rank=rank), LossConfig(), splits(V)["chunked"])


@check
def the_same_bits_again():
    batch, sizes = Batch(torch.float32), splits(V)["chunked"]
    found = []
    for _ in range(2):
        rows = [leaf(batch.hidden[batch.tokens]), leaf(batch.weight[mine(sizes)])]
        bounds = batch.cu_seqlens[batch.sequences.start : batch.sequences.stop + 1]
        loss, _ = sharded_policy_loss(
            *rows,
            batch.ids[batch.tokens],
            batch.advantages[batch.sequences],
            group=dist.group.WORLD,
            cu_seqlens=bounds - bounds[0],
            mask=batch.mask[batch.tokens],
        )
        loss.backward()
        found.append((loss.detach(), rows[0].grad, rows[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@check
def logprobs_of_own_tokens():
    for dtype, bound in BOUND.items():
        batch, sizes = Batch(dtype), splits(V)["ragged"]
        options = {"temperature": 0.8, "entropy": True}
        want = linear_logprob(batch.hidden, batch.weight, batch.ids, mask=batch.mask, **options)
        got = sharded_logprob(
            batch.hidden[batch.tokens],
            batch.weight[mine(sizes)],
            batch.ids[batch.tokens],
            group=dist.group.WORLD,
            mask=batch.mask[batch.tokens],
            **options,
        )
        for name, a, b in zip(("logp", "entropy", "lse"), got, want, strict=True):
            agree(a, b[batch.tokens], name, bound)


def _large(n: int, V: int, H: int) -> dict:
    """Arguments of `sharded_policy_loss` for n tokens of this rank; V divides by the ranks."""
    g = torch.Generator().manual_seed(dist.get_rank())
    rows = V // dist.get_world_size()
    return {
        "hidden": torch.randn(n, H, generator=g).requires_grad_(),
        "weight": (torch.randn(rows, H, generator=g) / H**0.5).requires_grad_(),
        "ids": torch.randint(V, (n,), generator=g),
        "advantages": torch.randn(n, generator=g),
        "group": dist.group.WORLD,
        "cu_seqlens": torch.tensor([0, n]),
    }


@check
def no_rank_holds_more_than_its_rows():
    """Bytes of head tensors: the weight's rows are there, the gradient's rows come, and a slice:
    the logits of a chunk for these rows, with what torch's row functions put beside them (3 times
    as much). Nothing of V x H, whose bytes are `full`."""
    W, V, H, n = dist.get_world_size(), 4096, 512, 8
    full, slice_ = 4 * V * H, 4 * 4 * (n * W) * (V // W)
    sharded_policy_loss(**_large(n, V, H))[0].backward()
    case = _large(n, V, H)
    with Allocations(case["weight"], case["hidden"]) as seen:
        sharded_policy_loss(**case)[0].backward()
    assert seen.largest <= V * H // W, (seen.largest, V * H // W)
    hidden = 8 * 4 * n * W * H
    # with the rows of the weight that were there before: (2 / W + slice) of V H
    assert full / W + seen.peak <= 2 * full / W + slice_ + hidden, (seen.peak, full, slice_)
    assert slice_ + hidden < 0.2 * full


@check
def products_are_divided_by_the_ranks():
    W, V, H, n = dist.get_world_size(), 1024, 64, 48
    case = _large(n, V, H)
    with FlopCounterMode(display=False) as counter:
        sharded_policy_loss(**case)[0].backward()
    share = counter.get_total_flops() / (6 * n * W * H * V / W)
    # products of whole tiles of 16 rows
    assert 0.99 <= share <= 1.0 + 16 / (n * W), share


@check
def every_rank_hears_of_a_wrong_argument():
    rank = dist.get_rank()
    case = _large(8, 64, 16)
    first = {**case, "mask": torch.ones(8, dtype=torch.bool)} if rank == 0 else case
    refused(ValueError, "mask: expected the same mask shape", sharded_policy_loss, **first)
    wide = {**case, "hidden": torch.randn(8, 17)} if rank == 0 else case
    refused(ValueError, "hidden: expected the same hidden width", sharded_policy_loss, **wide)
    refused(ValueError, "bonus: expected one of", sharded_policy_loss, **case, bonus=1)
    taken = {**case, "weight": Head(case["weight"].detach(), tp_group=object())}
    refused(ValueError, "weight: expected a Head without", sharded_policy_loss, **taken)
    padded = {**case, "hidden": torch.randn(2, 4, 16), "ids": case["ids"].view(2, 4)}
    refused(ValueError, "hidden: expected packed", sharded_policy_loss, **padded)


@check
def the_gradient_of_hidden_is_reduce_scattered():
    """Half of the traffic of an all-reduce, which is not used."""
    batch, sizes, reduced = Batch(torch.float32), splits(V)["chunked"], []
    real = parallel.VocabularyShard.reduce
    parallel.VocabularyShard.reduce = lambda *a: reduced.append(a) or real(*a)
    try:
        agree_with_one(batch, LossConfig(), sizes)
    finally:
        parallel.VocabularyShard.reduce = real
    assert reduced == []
