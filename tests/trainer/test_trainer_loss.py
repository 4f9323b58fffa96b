"""The loss an optimizer step sees, against the formulas of the papers in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_trainer import (
    Recording,
    dataset,
    double,
    logprobs,
    relative,
    spread_reward,
    trainer,
)

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


def sequences_of_step(run, number):
    """The micro-batches of a step: lists of (rollouts, advantages, old policy, index)."""
    args, uses = run.args, run.args.steps_per_generation * run.args.num_iterations
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    micros = []
    for micro_step in range(number * accumulation, (number + 1) * accumulation):
        rollouts, advantages, weights = run.windows[micro_step // uses]
        first = micro_step % args.steps_per_generation * size
        old = double(weights)
        micros.append([(rollouts, advantages, old, i) for i in range(first, first + size)])
    return micros


def token_losses(args, logp, old, start, advantage):
    """The per-token loss of a sequence, clipped or not, with the ratio-weighted k3 penalty."""
    ratio = (logp - old).exp()
    if args.loss_type == "cispo":
        value = -ratio.detach().clamp(max=args.epsilon_high) * advantage * logp
    else:
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
        value = -torch.minimum(ratio * advantage, clipped * advantage)
    gap = start - logp
    return value + args.beta * ratio * (gap.exp() - gap - 1)


def reference_step(run, number):
    """(loss, gradients) of an optimizer step in float64."""
    args, micros = run.args, sequences_of_step(run, number)
    policy, start = double(run.steps[number]["weights"]), double(run.windows[0][2])
    # truncated completions count as sequences, their tokens do not
    micros = [
        [s + (s[0].completion_ids[s[3]], not s[0].truncated[s[3]]) for s in m] for m in micros
    ]
    tokens = [sum(len(ids) for *_, ids, kept in micro if kept) for micro in micros]
    total = torch.zeros((), dtype=torch.float64)
    sequences = sum(len(micro) for micro in micros)
    for micro, here in zip(micros, tokens, strict=True):
        for rollouts, advantages, old, i, ids, kept in micro:
            if not kept:
                continue
            pair = rollouts.prompt_ids[i], ids, args.temperature
            logp = logprobs(policy, *pair)
            with torch.no_grad():
                before, first = logprobs(old, *pair), logprobs(start, *pair)
            value = token_losses(args, logp, before, first, advantages[i].double())
            divisor = {
                "grpo": len(ids) * sequences,
                "bnpo": here * len(micros),
                "dr_grpo": sequences * args.max_completion_length,
                "dapo": sum(tokens),
                "cispo": sum(tokens),
            }[args.loss_type]
            total = total + value.sum() / divisor
    total.backward()
    return total.item(), {name: p.grad for name, p in policy.named_parameters()}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_step_has_the_loss_and_gradient_of_the_float64_reference(loss_type, tmp_path):
    """Uneven lengths, truncated ones masked, temperature, KL, and steps off the old policy."""
    run = trainer(
        tmp_path,
        cls=Recording,
        reward=spread_reward,
        loss_type=loss_type,
        epsilon_high=0.3,
        beta=0.1,
        temperature=0.8,
        max_completion_length=20,
        per_device_train_batch_size=4,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
        num_iterations=2,
        mask_truncated_completions=True,
        max_grad_norm=0.0,
        max_steps=4,
        learning_rate=3e-3,
    )
    run.train()
    rollouts = run.windows[0][0]
    assert any(rollouts.truncated) and not all(rollouts.truncated)
    assert len({len(ids) for ids in rollouts.completion_ids}) > 2
    assert len(run.windows) == 1 and len(run.steps) == 4
    for number, step in enumerate(run.steps):
        loss, gradients = reference_step(run, number)
        assert sum(step["losses"]) == pytest.approx(loss, rel=2e-5, abs=2e-6)
        assert relative(step["gradients"], gradients) < 5e-5, number
    clipped = "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/region_mean"
    assert max(row.get(clipped, 0) for row in run.state.log_history) > 0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_split_into_micro_batches_changes_nothing_but_bnpo(loss_type, tmp_path):
    def gradients(size, accumulation):
        run = trainer(
            tmp_path,
            cls=Recording,
            reward=spread_reward,
            loss_type=loss_type,
            epsilon_high=0.3,
            max_completion_length=20,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            max_steps=1,
        )
        run.train()
        return run.steps[0]["gradients"]

    whole = gradients(8, 1)
    for size, accumulation in ((4, 2), (1, 8)):
        gap = relative(gradients(size, accumulation), whole)
        assert gap < 1e-5 if loss_type != "bnpo" else gap > 1e-3, (size, accumulation)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_the_last_step_of_an_epoch_counts_the_micro_batches_it_has(loss_type, tmp_path):
    """3 prompts, one for each micro-batch, accumulation 2: the second step has a single one."""
    run = trainer(
        tmp_path,
        cls=Recording,
        reward=spread_reward,
        loss_type=loss_type,
        train_dataset=dataset(3),
        steps_per_generation=1,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        max_steps=2,
        temperature=0.8,
    )
    run.train()
    assert [len(step["losses"]) for step in run.steps] == [2, 1] and len(run.windows) == 3
    rollouts, advantages, weights = run.windows[2]
    policy = double(weights)
    total, tokens = 0.0, sum(len(ids) for ids in rollouts.completion_ids)
    for i, ids in enumerate(rollouts.completion_ids):
        logp = logprobs(policy, rollouts.prompt_ids[i], ids, 0.8)
        divisor = 4 * len(ids) if loss_type == "grpo" else tokens
        total = total - (logp - logp.detach()).exp().sum() * advantages[i].double() / divisor
    total.backward()
    reference = {name: p.grad for name, p in policy.named_parameters()}
    assert relative(run.steps[1]["gradients"], reference) < 5e-5
