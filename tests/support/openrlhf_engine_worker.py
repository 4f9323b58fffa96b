"""One rank of `test_openrlhf_engine.py`: `python openrlhf_engine_worker.py folder rank world`.

Actors whose models DeepSpeed has taken, trained with OpenRLHF's forward and with ours.
"""

from __future__ import annotations

import os
import sys

import deepspeed
import openrlhf_cases as cases
import ranks
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from peft import LoraConfig, get_peft_model

from grpo_fast.integrations.openrlhf.actor import install, uninstall

CHECKS = []
BOUND = 1e-5


def check(function):
    CHECKS.append(function)
    return function


def engine_of(model, stage: int, accumulate: int):
    """An engine as OpenRLHF configures it, in fp32, that keeps nothing whole in ZeRO-3."""
    zero = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    # a large eps: Adam makes a step of +-lr of a gradient that is only rounding
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02, eps=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(
    stage: int, accumulate: int, late: bool = False, **options
) -> tuple[list[float], torch.Tensor]:
    """Loss of every micro-batch of this rank, gradient norms, and the weights at the end.

    late: ours from the second micro-batch on.
    """
    one = cases.actor(temperature=0.8, **options)
    engine = one.model = engine_of(one.model, stage, accumulate)
    losses, norms = [], []
    for step in range(3 * accumulate):
        if late and step == 1:
            install()
        data = cases.batch(seed=10 * step + dist.get_rank())
        # what the trainer asks for before it trains
        with torch.no_grad():
            one.eval()
            old = one(**data)
            one.train()
        logp, output = one(**data, return_output=True, return_entropy=True)
        mask = data["action_mask"]
        entropy = (output.entropy[:, -cases.A :] * mask).sum()
        sign = torch.linspace(-1, 1, cases.A)
        loss = (((logp - old).exp() * sign * mask).sum() - 0.1 * entropy) / mask.sum()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    # of the optimizer: the parameters themselves may be in the middle of a prefetch
    weights = [safe_get_full_fp32_param(p).flatten() for p in trained]
    return losses + norms, torch.cat(weights)


def compare(stage: int, accumulate: int = 1, late: bool = False, **options) -> None:
    uninstall()
    theirs, weights = train(stage, accumulate, **options)
    if not late:
        install()
    ours, moved = train(stage, accumulate, late, **options)
    far = cases.distance(torch.tensor(ours), torch.tensor(theirs)), cases.distance(moved, weights)
    assert max(far) <= BOUND, far
    assert any(theirs)


@check
def zero_2():
    compare(2)


@check
def zero_2_accumulates():
    compare(2, accumulate=2, packed=True)


@check
def zero_3():
    compare(3)


@check
def zero_3_with_a_bias_and_packed():
    compare(3, family="Phi", packed=True)


@check
def zero_3_tied_and_capped():
    """Gemma-2 ties its head to the embedding."""
    compare(3, family="Gemma2", accumulate=2)


@check
def zero_3_with_lora():
    compare(3, lora=True)


@check
def zero_3_installed_in_the_middle():
    """The head is checked while DeepSpeed's prefetch of a recorded order is under way."""
    compare(3, late=True)
    compare(3, late=True, family="Gemma2")


@check
def zero_3_refuses_an_adapter_on_the_head():
    install()
    one = cases.actor()
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    one.model = engine_of(get_peft_model(one.model, lora), 3, 1)
    try:
        one(**cases.batch())
    except ValueError as error:
        assert str(error).startswith("ds.zero_stage: expected 2 with a LoRA adapter"), error
        return
    raise AssertionError("nothing was raised")


@check
def zero_3_keeps_nothing_whole():
    install()
    one = cases.actor()
    one.model = engine_of(one.model, 3, 1)
    weight = one.model.module.lm_head.weight
    logp, _ = one(**cases.batch(), return_output=True)
    assert weight.numel() == 0
    one.model.backward(logp.sum())
    assert weight.numel() == 0
    one.model.step()


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
