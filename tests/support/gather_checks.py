"""Heads that are DTensors, and calls that must fail on every rank; `parallel_worker.py` runs
these."""

from __future__ import annotations

import time
import weakref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from vocabulary_checks import agree, edges, head, leaf, mine, refused, splits

from grpo_fast import linear_logprob, linear_policy_loss

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


@check
def dtensor_with_a_group():
    """`to_local` both ways: the gradient is a DTensor like the weight."""
    W, V = dist.get_world_size(), 77
    mesh = init_device_mesh("cpu", (W,))
    hidden, weight, bias = head(V, torch.float64)
    ids = edges(splits(V)["chunked"], V, hidden.shape[0])
    whole = leaf(weight), leaf(bias)
    linear_logprob(hidden, whole[0], ids, bias=whole[1]).logp.sum().backward()
    own = [torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in (weight, bias)]
    linear_logprob(
        hidden, own[0], ids, bias=own[1], tp_group=mesh.get_group()
    ).logp.sum().backward()
    for parameter, want in zip(own, whole, strict=True):
        assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == (Shard(0),)
        agree(parameter.grad.full_tensor(), want.grad, "gradient", 1e-12)


class Tiny(torch.nn.Module):
    """A body and a head; tied: the head is the embedding, of which the body's input is made."""

    def __init__(self, V: int, H: int, tied: bool = False):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Embedding(V, H) if tied else None
        self.body = torch.nn.Linear(H, H)
        self.lm_head = torch.nn.Linear(H, V)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) / H**0.5)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, x):
        if self.embedding is not None:
            x = x + self.embedding(torch.arange(x.shape[0]))
        return self.body(x)


def fsdp_case(rank: int, V: int = 77, H: int = 24):
    """A batch that differs from rank to rank in values and length; the last rank's is masked."""
    g = torch.Generator().manual_seed(10 + rank)
    n = 9 + 4 * rank
    x, ids = 4 * torch.randn(n, H, generator=g), torch.randint(V, (n,), generator=g)
    mask = torch.arange(n) % 3 != 2
    if rank and rank == dist.get_world_size() - 1:
        mask &= False
    return x, ids, torch.randn(n, generator=g), mask, 0.5 + rank


def fsdp_loss(model, rank: int, op: str):
    x, ids, advantages, mask, scale = fsdp_case(rank)
    hidden = model(x)
    weight, bias = model.lm_head.weight, model.lm_head.bias
    if op == "policy":
        loss, _ = linear_policy_loss(hidden, weight, ids, advantages, mask=mask, bias=bias)
    else:
        out = linear_logprob(hidden, weight, ids, mask=mask, bias=bias, entropy=True)
        loss = (out.logp * advantages + 0.2 * out.entropy).sum()
    # every rank scales its loss by a number of its own
    return scale * loss


def check_fsdp(op: str, tied: bool, reshard: bool) -> None:
    W = dist.get_world_size()
    plain = Tiny(77, 24, tied)
    for rank in range(W):
        (fsdp_loss(plain, rank, op) / W).backward()
    model = Tiny(77, 24, tied)
    mesh = init_device_mesh("cpu", (W,))
    for module in (model,) if tied else (model.body, model.lm_head):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    assert isinstance(model.lm_head.weight, DTensor)
    fsdp_loss(model, dist.get_rank(), op).backward()
    named = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        grad = named[name].grad
        assert isinstance(grad, DTensor) and grad.placements == named[name].placements
        assert grad.to_local().shape == named[name].to_local().shape
        agree(grad.full_tensor(), p.grad, name, 1e-6)


@check
def fsdp_gives_the_average_of_ddp():
    for op in ("policy", "logprob"):
        check_fsdp(op, tied=False, reshard=True)
        # one root whose weight is whole again when the loss is computed, or sharded once more
        for reshard in (False, True):
            check_fsdp(op, tied=True, reshard=reshard)


@check
def gradients_of_a_bf16_shard_are_averaged_in_fp32():
    """The fp32 mean of what the ranks give, rounded once."""
    W, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (W,))
    hidden, weight, _ = head(77, torch.bfloat16)
    ids = torch.arange(hidden.shape[0])
    shard = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    total = torch.zeros(weight.shape)
    for r in range(W):
        whole = leaf(weight)
        linear_logprob(hidden * (1 + r), whole, ids).logp.sum().backward()
        total += whole.grad.float()
    linear_logprob(hidden * (1 + rank), shard, ids).logp.sum().backward()
    want = (total / W).bfloat16()
    assert shard.grad.dtype == torch.bfloat16
    agree(shard.grad.full_tensor(), want, "dweight", 1e-4)


def gone(reference) -> bool:
    """True when nothing holds it any more; gloo's own thread does for a moment."""
    for _ in range(100):
        if reference() is None:
            return True
        time.sleep(0.01)
    return False


@check
def fsdp_gathers_again_in_backward():
    """Nothing of the whole weight lives between the passes; a changed shard is refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, weight, _ = head(77, torch.float32)
    shard = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    ids = torch.arange(hidden.shape[0])
    made, whole = [], DTensor.full_tensor

    def watched(self, **kwargs):
        full = whole(self, **kwargs)
        made.append(weakref.ref(full.untyped_storage()))
        return full

    DTensor.full_tensor = watched
    try:
        loss = linear_logprob(leaf(hidden), shard, ids).logp.sum()
        assert len(made) == 1 and gone(made[0])
        loss.backward()
        assert len(made) == 2
        loss, _ = linear_policy_loss(leaf(hidden), shard, ids, torch.ones(ids.numel()))
        assert len(made) == 3 and gone(made[2])
        loss.backward()
        assert len(made) == 3
        loss = linear_logprob(leaf(hidden), shard, ids).logp.sum()
        with torch.no_grad():
            shard.add_(1.0)
        refused(RuntimeError, "modified", loss.backward)
        shard.requires_grad_(False)
        own = leaf(hidden)
        linear_policy_loss(own, shard, ids, torch.ones(ids.numel()))[0].backward()
    finally:
        DTensor.full_tensor = whole
    alone = leaf(hidden)
    linear_policy_loss(alone, weight + 1.0, ids, torch.ones(ids.numel()))[0].backward()
    agree(own.grad, alone.grad, "dhidden of a frozen shard", 1e-6)
    assert shard.grad is not None and not shard.requires_grad


@check
def bad_calls_raise_on_every_rank():
    """What differs on one rank is an error of all of them, and none is left waiting."""
    V, W, rank = 77, dist.get_world_size(), dist.get_rank()
    last = rank == W - 1
    sizes = splits(V)["chunked"]
    hidden, weight, bias = head(V, torch.float32)
    weight, bias = weight[mine(sizes)], bias[mine(sizes)]
    ids = torch.arange(hidden.shape[0])
    group = {"tp_group": dist.group.WORLD}

    def bad(what, hidden=hidden, weight=weight, ids=ids, **kwargs):
        refused(ValueError, what, linear_logprob, hidden, weight, ids, **{**group, **kwargs})

    bad("hidden: expected the same shape", hidden=hidden[1:] if last else hidden)
    bad("hidden: expected the same dtype", hidden=hidden.double() if last else hidden)
    bad("hidden: expected the same requires_grad", hidden=leaf(hidden) if last else hidden)
    bad("weight: expected the same width", weight=weight[:, 1:] if last else weight)
    bad("ids: expected the same values", ids=ids + 1 if last else ids)
    bad("mask: expected the same values", mask=(ids > 0) if last else (ids > 1))
    bad("bias: expected", bias=bias[1:] if last else bias)
    bad("bias: expected the same presence", bias=None if last else bias)
    bad("workspace_bytes: expected the same", workspace_bytes=(1 << 30) + last)
    bad("tp_group: expected a torch.distributed.ProcessGroup", tp_group=W)
    bad("weight: expected tensor (V_r, H)", weight=weight[0])
    bad("weight: expected the same width", weight=weight[0] if last else weight)
    mesh = init_device_mesh("cpu", (W,))
    whole = distribute_tensor(head(V, torch.float32)[1], mesh, [Replicate()])
    bad("weight: expected a DTensor of placements (Shard(0),)", weight=whole)
    columns = distribute_tensor(head(V, torch.float32)[1], mesh, [Shard(1)])
    bad("weight: expected a DTensor of placements Shard(0)", weight=columns, tp_group=None)
    bad("hidden: expected a plain tensor", hidden=whole)
    advantages = torch.zeros(ids.numel()) if last else torch.ones(ids.numel())
    args = (hidden, weight, ids, advantages)
    refused(ValueError, "advantages: expected the same values", linear_policy_loss, *args, **group)
    # the ranks agree here, and the next call of these shapes is not compared again
    bad("ids: expected token ids in [0, 77)", ids=ids + V - 3)
