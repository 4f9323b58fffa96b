"""One rank of `test_sequence_parallel.py`: `python ulysses_worker.py folder rank world`.

Each rank runs its slice of the rows, and compares with what one process computes of whole rows.
"""

from __future__ import annotations

import sys

import ranks
import torch
import torch.distributed as dist
from tiny import lora, tiny

from grpo_fast import LossConfig, denominator_count, linear_policy_loss
from grpo_fast.models.packing import pack
from grpo_fast.models.policy import attach
from grpo_fast.models.sequence_parallel import (
    check_sequence_parallel,
    sequence_parallel,
    split,
)

# the second row splits a sequence of 17 tokens between the ranks, wherever they are two
PROMPTS = [[5, 6, 7], [8, 9], [11, 3, 4, 5, 6], [12], [13, 14, 15, 16]]
COMPLETIONS = [[20 + i for i in range(n)] for n in (9, 15, 4, 1, 6)]


def both(model, row_length, **options):
    """(loss, gradients) of whole rows, and of this rank's slice summed over the ranks."""
    config = LossConfig(**{"loss_type": "dapo", **options})
    check_sequence_parallel(model, dist.get_world_size(), config)
    batch = pack(PROMPTS, COMPLETIONS, pad_id=0, row_length=row_length, device="cpu")
    g = torch.Generator().manual_seed(2)
    N = len(batch.ids)
    advantages = torch.randn(len(PROMPTS), generator=g)
    per_token = {
        "old_logp": -4.5 + 0.2 * torch.randn(N, generator=g),
        "ref_logp": -4.5 + 0.2 * torch.randn(N, generator=g),
        "mask": torch.rand(N, generator=g) > 0.2,
    }
    denominator = denominator_count(config, per_token["mask"], batch.cu_seqlens).float()

    def head(part, advantages, tokens, **more):
        def fn(hidden, weight):
            return linear_policy_loss(
                part.select(hidden), weight, part.ids, advantages, config=config,
                denominator=denominator, **tokens, **more,
            )[0]  # fmt: skip

        return fn

    whole = head(batch, advantages, per_token, cu_seqlens=batch.cu_seqlens)
    expected = run(model, lambda: model(**batch.inputs(), head_fn=whole))
    shard = split(batch, dist.get_rank(), dist.get_world_size())
    own = {name: value[shard.tokens] for name, value in per_token.items()}
    part = head(shard, advantages[shard.sequence], own)
    with sequence_parallel(model, shard.whole_position_ids, dist.group.WORLD):
        got = run(model, lambda: model(**shard.inputs(), head_fn=part))
    for tensor in (got[0], *got[1].values()):
        dist.all_reduce(tensor)
    return expected, got, len(shard.ids)


def run(model, forward):
    """The loss, and the gradients of everything that has one."""
    model.zero_grad()
    loss = forward()
    loss.backward()
    named = model.named_parameters()
    return loss.detach().clone(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def agree(model, row_length=24, **options):
    expected, got, here = both(model, row_length, **options)
    assert 0 < here < sum(map(len, COMPLETIONS))
    assert abs(got[0] - expected[0]) <= 1e-6 * max(1.0, abs(expected[0]))
    assert got[1].keys() == expected[1].keys()
    scale = max(grad.abs().max() for grad in expected[1].values())
    assert scale > 1e-3
    for name, grad in expected[1].items():
        gap = (got[1][name] - grad).abs().max()
        assert gap <= 1e-6 * max(1.0, scale), f"{name}: {gap:.2g} of {scale:.2g}"


def rows_split_in_a_sequence():
    model = tiny("Qwen3")
    attach(model)
    agree(model)


def one_row_of_an_uneven_length():
    model = tiny("Llama")
    attach(model)
    agree(model, row_length=None)


def with_a_kl_and_checkpointing():
    model = tiny("Qwen3")
    attach(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    agree(model, beta=0.1)


def a_constant_length():
    model = tiny("Llama")
    attach(model)
    agree(model, loss_type="dr_grpo", max_completion_length=16)


def an_adapter():
    # the ranks draw one adapter
    torch.manual_seed(0)
    model = lora(tiny("Qwen3"))
    attach(model)
    agree(model)


CHECKS = (
    rows_split_in_a_sequence,
    one_row_of_an_uneven_length,
    with_a_kl_and_checkpointing,
    a_constant_length,
    an_adapter,
)

if __name__ == "__main__":
    ranks.answer(CHECKS, *sys.argv[1:])
