"""Models under FSDP2 on several ranks; `parallel_worker.py` runs these."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from tiny import tiny
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss
from grpo_fast.models.head import find_head
from grpo_fast.models.policy import attach, check_head

CHECKS = []


def _logprob(ids, hidden, head):
    options = {"temperature": 0.8, "entropy": True}
    out = linear_logprob(hidden[:, :-1], head, ids[:, 1:], **options)
    return (out.logp * torch.arange(8.0)).sum() + out.entropy.sum()


def _loss(ids, hidden, head):
    config = LossConfig(loss_type="gspo")
    given = {"config": config}
    advantages = torch.tensor([1.0, -0.5])
    return linear_policy_loss(hidden[:, :-1], head, ids[:, 1:], advantages, **given)[0]


def _agrees(family: str, own_group: bool, score) -> None:
    """Every rank has its own tokens: gradients are the mean over the ranks, that of a head in a
    group of its own too, whose forward never runs."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = tiny(family)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    attach(model)
    plain = copy.deepcopy(model)
    head = [model.get_output_embeddings()] if own_group else []
    for part in (*model.base_model.layers, *head, model):
        fully_shard(part)
    g = torch.Generator().manual_seed(rank)
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=g)
    for one in (plain, model):
        one(input_ids=ids, head_fn=lambda h, head: score(ids, h, head)).backward()
    assert isinstance(find_head(model).weight, DTensor)
    check_head(plain, find_head(model))
    for (name, want), got in zip(plain.named_parameters(), model.parameters(), strict=True):
        dist.all_reduce(want.grad)
        gradient = got.grad.full_tensor()
        error = (gradient - want.grad / world).abs().max() / want.grad.abs().max()
        assert error < 1e-5, f"{family} {name} {error}"


def fsdp2_gradients_are_means_over_the_ranks():
    _agrees("Llama", False, _logprob)


def fsdp2_head_with_a_group_of_its_own():
    _agrees("Llama", True, _logprob)
    _agrees("Llama", True, _loss)


def fsdp2_head_with_a_bias_and_a_group_of_its_own():
    _agrees("Phi", True, _logprob)
    _agrees("Phi", True, _loss)


CHECKS += [
    fsdp2_gradients_are_means_over_the_ranks,
    fsdp2_head_with_a_group_of_its_own,
    fsdp2_head_with_a_bias_and_a_group_of_its_own,
]
