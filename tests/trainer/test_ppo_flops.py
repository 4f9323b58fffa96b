"""What a step of PPO multiplies, by torch's FLOP counter: the shared critic adds N H products to
those of the policy, no forward of the backbone, and none with the lm_head."""

from __future__ import annotations

import pytest
import torch
from tiny_ppo import trainer
from tiny_trainer import VOCAB
from torch.utils.flop_counter import FlopCounterMode

from grpo_fast.models.critic import without_critic
from grpo_fast.models.head import backbone
from grpo_fast.models.segments import laid_out

H, V = 32, len(VOCAB)


def body(model, packed):
    """A backbone on packed sequences."""
    with laid_out(packed.layout):
        return model(**packed.body_inputs())


def counted(call) -> int:
    """FLOPs of a call and of the backward of what it returns."""
    with FlopCounterMode(display=False) as counter:
        call().sum().backward()
    return counter.get_total_flops()


def caught(folder, **options):
    """A trainer after one window, and the micro-batch of it."""
    # a step so small that no token is clipped, which would leave the products
    settings = {"max_steps": 1, "num_iterations": 2, "kl_coef": 0.0, "learning_rate": 1e-9}
    run = trainer(folder, **settings, **options)
    seen, stage = [], run.loss

    def loss(model, micro):
        seen.append(micro)
        return stage(model, micro)

    run.loss = loss
    run.train()
    run.loss = stage
    return run, seen[0]


@pytest.mark.parametrize("detach", [False, True])
def test_products_of_a_step(tmp_path, detach):
    """One forward and backward of the backbone, 6NHV with the head, and the value head: 2NH, 2NH
    for its weight, 2NH for the hidden states where its gradient goes there."""
    run, micro = caught(tmp_path, value_detach=detach)
    packed = micro.packed
    n = packed.ids.numel()
    alone = counted(lambda: packed.select(body(backbone(run.model), packed)[0]))
    total = counted(lambda: run.loss(run.model, micro)[0])
    value = (4 if detach else 6) * n * H
    head = total - alone - value
    # rows of a product are padded to a multiple of 16
    assert 6 * n * H * V <= head <= 6 * -(-n // 16) * 16 * H * V


def test_products_of_the_measuring(tmp_path):
    """Old log-probs and values: one forward, 2NHV and 2NH."""
    run, micro = caught(tmp_path)
    packed = micro.packed
    n = packed.ids.numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        body(backbone(run.model), packed)
    alone = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        run.measure(micro, True)
    head = counter.get_total_flops() - alone - 2 * n * H
    assert 2 * n * H * V <= head <= 2 * -(-n // 16) * 16 * H * V


def test_a_separate_critic_costs_its_own_backbone(tmp_path):
    """Exactly one more forward and backward of a backbone than the policy loss alone."""
    run, micro = caught(tmp_path, critic="separate")
    packed = micro.packed
    alone = counted(lambda: packed.select(body(run.critic.body, packed)[0]))
    total = counted(lambda: run.loss(run.model, micro)[0])

    def policy(hidden, head):
        return run.policy_loss(packed.select(hidden), head, micro)

    actor = counted(lambda: run.model(**packed.inputs(), head_fn=policy)[0])
    # the value head stands on hidden states of its own: 2NH forward, 4NH backward
    assert total - actor == alone + 6 * packed.ids.numel() * H
    assert without_critic(run.model.state_dict()).keys() < run.model.state_dict().keys()
