"""One rank of `test_zero3.py`: `python zero3_worker.py folder rank world`.

A body and an lm_head that DeepSpeed's ZeRO-3 has partitioned, trained for two steps of Adam,
against the same in plain torch, where one process goes through the batches of all ranks.
"""

from __future__ import annotations

import os
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import deepspeed
import ranks
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from gather_checks import Tiny, fsdp_case, refused
from vocabulary_checks import agree

from grpo_fast import linear_logprob, linear_policy_loss
from grpo_fast.engine import gathering

CHECKS = []
BOUND = 1e-6
V, H = 77, 24


def check(function):
    CHECKS.append(function)
    return function


def loss_of(model, head, rank: int, op: str, seen: list) -> torch.Tensor:
    """The loss of a rank's batch; the gradient of its hidden states goes to `seen` in backward."""
    x, ids, advantages, mask, scale = fsdp_case(rank, V, H)
    if op == "logprob":
        # the other losses have a rank of which every token is masked
        mask = torch.arange(ids.numel()) % 3 != 2
    hidden = model(x.to(head.weight.dtype))
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: seen.append(grad.clone()))
    return scale * loss_on(hidden, head, ids, advantages, mask, op)


def loss_on(hidden, head, ids, advantages, mask, op: str) -> torch.Tensor:
    if op == "policy":
        loss, _ = linear_policy_loss(
            hidden, head.weight, ids, advantages, mask=mask, bias=head.bias
        )
        return loss
    out = linear_logprob(hidden, head.weight, ids, mask=mask, bias=head.bias, entropy=True)
    return (out.logp * advantages + 0.2 * out.entropy).sum()


class Inside(Tiny):
    """Computes the loss in its own forward, where DeepSpeed gathers what is touched by itself."""

    def forward(self, rank: int, op: str):
        # not an argument, of which DeepSpeed's hooks would make a copy
        return loss_of(super().forward, self.lm_head, rank, op, self.seen)


class Twice(Tiny):
    """Runs the lm_head too, for which DeepSpeed's prefetch is under way when the loss comes."""

    def __init__(self, *shape):
        super().__init__(*shape)
        # DeepSpeed sees only what is taken from a module
        self.loose = SimpleNamespace(weight=self.lm_head.weight, bias=self.lm_head.bias)

    def forward(self, rank: int, op: str):
        outputs = []

        def body(x):
            outputs.append(super(Twice, self).forward(x))
            return outputs[0]

        loss = loss_of(body, self.loose, rank, op, self.seen)
        return loss + 0.01 * self.lm_head(outputs[0]).square().mean()


def run(model, head, rank: int, op: str, seen: list) -> torch.Tensor:
    """The loss of a model or its engine, inside of its forward or outside."""
    inner = getattr(model, "module", model)
    if isinstance(inner, (Inside, Twice)):
        inner.seen = seen
        return model(rank, op)
    return loss_of(model, head, rank, op, seen)


def adam(model):
    # a large eps: Adam makes a step of +-lr of a gradient that is only rounding
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05, eps=1e-3)


def engine_of(model, accumulate: int = 1, bf16: bool = False, **options):
    """A ZeRO-3 engine that keeps nothing whole which it does not have to."""
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        **options,
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
    }
    return deepspeed.initialize(model=model, optimizer=adam(model), config=config)[0]


def whole(parameter) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def status(parameter) -> str:
    return parameter.ds_status.name


def plain_steps(plain, op: str, steps: int, accumulate: int = 1):
    """Yields the gradients of a step and those of this rank's hidden states, then steps."""
    W, optimizer = dist.get_world_size(), adam(plain)
    for _ in range(steps):
        optimizer.zero_grad()
        for rank in range(W):
            seen = []
            for _ in range(accumulate):
                loss = run(plain, plain.lm_head, rank, op, seen)
                (loss / W / accumulate).backward()
            if rank == dist.get_rank():
                hidden = [W * accumulate * grad for grad in seen]
        yield {name: p.grad for name, p in plain.named_parameters()}, hidden
        optimizer.step()


def compare(
    op: str,
    inside: type | None = None,
    tied: bool = False,
    frozen: bool = False,
    accumulate: int = 1,
    around=lambda head: nullcontext(),
    steps: int = 2,
    persistent: bool = False,
    **options,
) -> None:
    """Gradients and weights of every step."""
    plain, model = (inside or Tiny)(V, H, tied), (inside or Tiny)(V, H, tied)
    for m in (plain, model):
        m.lm_head.requires_grad_(not frozen)
    engine = engine_of(model, accumulate, **options)
    head = engine.module.lm_head
    assert status(head.weight) == "NOT_AVAILABLE" and head.weight.numel() == 0
    for grads, hidden in plain_steps(plain, op, steps, accumulate):
        seen = []
        for micro in range(accumulate):
            with around(head):
                loss = run(engine, head, dist.get_rank(), op, seen)
            engine.backward(loss)
            if micro == accumulate - 1:
                compare_gradients(model, grads, seen, hidden, accumulate)
            engine.step()
    assert (status(head.weight) == "AVAILABLE") == persistent
    for (name, p), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        agree(whole(p), want, name, BOUND)
        assert p.grad is None


def compare_gradients(model, grads, seen, hidden, accumulate: int) -> None:
    for got, want in zip(seen, hidden, strict=True):
        # the engine divides the loss by the number of accumulated ones
        agree(accumulate * got, want, "hidden", BOUND)
    for name, p in model.named_parameters():
        if p.requires_grad:
            agree(safe_get_full_grad(p), grads[name], f"gradient of {name}", BOUND)


@check
def trained_outside_of_the_engine():
    """The engine's forward ends at the hidden states; the loss takes the partitioned weight."""
    for op in ("policy", "logprob"):
        compare(op)


@check
def trained_inside_of_the_engine():
    """The engine's forward ends at the loss; DeepSpeed gathers the weight where it is touched."""
    for op in ("policy", "logprob"):
        compare(op, inside=Inside)


@check
def trained_while_tied_to_the_embedding():
    """Two gradients of one parameter; the prefetch of the embedding is under way meanwhile."""
    for op in ("policy", "logprob"):
        compare(op, tied=True)
    compare("logprob", tied=True, stage3_max_reuse_distance=10**9)
    compare("policy", tied=True, inside=Inside)


@check
def prefetched_for_its_own_module():
    """What DeepSpeed has begun to gather is waited for, from the second step on."""
    waited, finish = [], gathering._finish_prefetch

    def watched(parameter):
        finish(parameter)
        waited.append(status(parameter))

    gathering._finish_prefetch = watched
    try:
        # a few elements, so that it does not come in one piece with the body
        compare("logprob", inside=Twice, steps=4, stage3_prefetch_bucket_size=100)
    finally:
        gathering._finish_prefetch = finish
    assert waited and set(waited) == {"AVAILABLE"}


@check
def gradients_are_accumulated():
    compare("policy", accumulate=2)


@check
def small_parameters_that_stay_whole():
    """Below DeepSpeed's threshold nothing is partitioned between the passes."""
    compare("logprob", persistent=True, stage3_param_persistence_threshold=10**6)


@check
def gathered_by_the_caller_in_forward_only():
    for op in ("policy", "logprob"):
        compare(op, around=lambda head: deepspeed.zero.GatheredParameters(head.parameters()))


@check
def a_frozen_head():
    for op in ("policy", "logprob"):
        compare(op, frozen=True)
        compare(op, frozen=True, inside=Inside)


@check
def bf16_with_fp32_masters():
    """DeepSpeed reduces in bf16: its gradient is off by the rounding of each rank's, and of theirs
    added up."""
    W = dist.get_world_size()
    for op in ("policy", "logprob"):
        plain, model = Tiny(V, H).bfloat16(), Tiny(V, H).bfloat16()
        engine = engine_of(model, bf16=True)
        total = torch.zeros(V, H)
        for rank in range(W):
            plain.zero_grad()
            loss_of(plain, plain.lm_head, rank, op, []).backward()
            total += plain.lm_head.weight.grad.float() / W
        engine.backward(loss_of(engine, model.lm_head, dist.get_rank(), op, []))
        agree(safe_get_full_grad(model.lm_head.weight), total, "gradient", 4e-3)


@check
def nothing_whole_lives_between_the_passes():
    """Gathered in forward, partitioned until backward, gathered again there if it is needed."""
    model = Tiny(V, H)
    engine = engine_of(model)
    weight, made = model.lm_head.weight, []
    enter = deepspeed.zero.GatheredParameters.__enter__

    def watched(self):
        enter(self)
        if self.params[0] is weight:
            made.append(weakref.ref(weight.data.untyped_storage()))

    deepspeed.zero.GatheredParameters.__enter__ = watched
    try:
        for op, gathers in (("policy", 1), ("logprob", 2)):
            made.clear()
            loss = loss_of(engine, model.lm_head, dist.get_rank(), op, [])
            assert len(made) == 1 and made[0]() is None
            assert status(weight) == "NOT_AVAILABLE" and weight.numel() == 0
            engine.backward(loss)
            assert len(made) == gathers and made[-1]() is None
            assert status(weight) == "NOT_AVAILABLE" and weight.numel() == 0
            engine.step()
    finally:
        deepspeed.zero.GatheredParameters.__enter__ = enter


@check
def refused_without_a_reduce_hook():
    """Nobody would average the gradient of a parameter that no engine trains."""
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": dist.get_world_size()}):
        head = torch.nn.Linear(H, V)
    hidden, ids = torch.randn(9, H), torch.arange(9)
    call = (linear_logprob, hidden, head.weight, ids)
    refused(ValueError, "weight: expected a frozen parameter", *call)
    with torch.no_grad():
        got = linear_logprob(hidden, head.weight, ids).logp
    want = linear_logprob(hidden, whole(head.weight), ids).logp
    assert torch.equal(got, want)
    refused(ValueError, "tp_group: expected None", *call, tp_group=dist.group.WORLD)


def main(folder: str, rank: str, world: str) -> None:
    # what DeepSpeed reads where no launcher of it has started the process
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_SIZE=world)
    # gloo alone: the operation over shared memory would be compiled first, for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks.answer((join, *CHECKS), folder, rank, world)


def join():
    deepspeed.init_distributed("gloo", verbose=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
