"""Advantages, weights, objectives and the whole loss against numbers worked out by hand or in
numpy."""

import math

import numpy as np
import pytest
import torch
from loss_cases import configurations, make_case, truth

from grpo_fast import LossConfig, linear_policy_loss, objectives, policy_loss, reference, weights
from grpo_fast.advantages import group_advantages


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.8, 0.4, 0.2], [1.0, 1.0, 0.0, 0.0]])
    population = group_advantages(rewards, eps=0.0, population=True)
    torch.testing.assert_close(
        population[0], torch.tensor([1.2649, 0.6325, -0.6325, -1.2649]), rtol=0, atol=1e-4
    )
    half = group_advantages(torch.tensor([[1.0] * 4 + [0.0] * 4]), eps=0.0)
    torch.testing.assert_close(half[0, :1], torch.tensor([0.9354]), rtol=0, atol=1e-4)
    # TRL's form: sample std + 1e-4
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), expected)
    batch = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, "batch"), batch)
    torch.testing.assert_close(
        group_advantages(rewards, "none"), rewards - rewards.mean(1)[:, None]
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_degenerate_groups_are_exactly_zero(scale):
    nan = float("nan")
    rewards = torch.tensor(
        [[0.1, 0.1, 0.1], [0.3, nan, 0.3], [nan, nan, nan], [nan, 0.7, nan], [0.0, 1.0, nan]]
    )
    # a mean of three 0.1 is not 0.1 in fp32; divided by eps that would train on rounding
    got = group_advantages(rewards, scale)
    assert torch.equal(got[:4], torch.zeros(4, 3))
    assert got[4, 0] < 0 < got[4, 1] and got[4, 2] == 0
    assert torch.isfinite(got).all()
    assert torch.equal(group_advantages(torch.ones(3, 1), scale), torch.zeros(3, 1))


def test_advantages_refuse():
    for bad in (torch.ones(4), torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"rewards must be floating point of shape \(P, G\)"):
            group_advantages(bad)
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="scale must be one of"):
        group_advantages(torch.ones(1, 2), "groups")


def test_worked_example_dapo():
    """log-probs -2.1, -1.8, -0.5, -1.2 against -2.3, -1.9, -0.6, -1.4, A = 0.6, epsilon 0.2 ->
    -0.6916."""
    logp = torch.tensor([-2.1, -1.8, -0.5, -1.2])
    old = torch.tensor([[-2.3, -1.9, -0.6, -1.4]])
    logits = torch.stack((logp, torch.log1p(-logp.exp())), -1)[None]
    ids = torch.zeros(1, 4, dtype=torch.long)
    loss, _ = policy_loss(logits, ids, torch.tensor([0.6]), old_logp=old)
    assert loss.item() == pytest.approx(-0.6916, abs=5e-5)
    one, _ = policy_loss(logits[:, :1], ids[:, :1], torch.tensor([0.2]), old_logp=old[:, :1] - 0.1)
    assert one.item() == pytest.approx(-0.24, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_aggregations_by_hand(loss_type):
    config = LossConfig(loss_type=loss_type, max_completion_length=5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    bounds = weights.boundaries(mask, None)
    got = weights.token_weights(config, mask.reshape(-1), bounds).view(3, 4)
    want = {
        "grpo": torch.tensor([[1 / 9] * 3 + [0], [1 / 3, 0, 0, 0], [0] * 4]),
        "bnpo": mask / 4,
        "dapo": mask / 4,
        "dr_grpo": mask / 15,
    }[loss_type]
    torch.testing.assert_close(got, want.float())
    assert weights.count(config, mask).item() == (4 if loss_type in ("bnpo", "dapo") else 3)
    given = weights.token_weights(config, mask.reshape(-1), bounds, denominator=12.0).view(3, 4)
    torch.testing.assert_close(given, got * weights.count(config, mask) / 12.0)


def numpy_loss(logp, old, ref, adv, mask, config):
    """A second, loop-by-loop reading of the definitions, in float64 numpy."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    totals, tokens = [], 0
    for b in range(len(logp)):
        steps = [t for t in range(len(logp[b])) if mask[b][t]]
        tokens += len(steps)
        gaps = [logp[b][t] - old[b][t] for t in steps]
        mean_gap = sum(gaps) / max(len(gaps), 1)
        total = 0.0
        for t, gap in zip(steps, gaps, strict=True):
            r = math.exp(mean_gap if config.importance_sampling_level == "sequence" else gap)
            if config.loss_type == "cispo":
                value = -min(r, high) * adv[b] * logp[b][t]
            else:
                capped = r if config.delta is None else min(r, config.delta)
                value = -min(capped * adv[b], min(max(r, 1 - config.epsilon), 1 + high) * adv[b])
            if ref is not None:
                d = ref[b][t] - logp[b][t]
                kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[config.kl_estimator]
                value += config.beta * kl * (r if config.use_bias_correction_kl else 1.0)
            total += value
        totals.append((total, len(steps)))
    if config.loss_type == "grpo":
        return sum(s / max(n, 1) for s, n in totals) / len(totals)
    if config.loss_type == "dr_grpo":
        return sum(s for s, _ in totals) / (len(totals) * config.max_completion_length)
    return sum(s for s, _ in totals) / max(tokens, 1)


@pytest.mark.parametrize("config, use_old, use_ref", configurations())
def test_reference_equals_numpy_and_torch_backend_in_float64(config, use_old, use_ref):
    case = make_case(dtype=torch.float64)
    loss, dhidden, dweight, _ = truth(case, config, use_old=use_old, use_ref=use_ref)
    clean = torch.where(case.mask[..., None], case.hidden, 0.0)
    logits = reference.head_logits(clean, case.weight)
    logp = reference.logprob(logits, case.ids.clamp(min=0), config.temperature)[0]
    by_hand = numpy_loss(
        logp.tolist(),
        (case.old_logp.double() if use_old else logp).tolist(),
        np.asarray(case.ref_logp.double()) if use_ref else None,
        case.advantages.double().tolist(),
        case.mask.tolist(),
        config,
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-11, abs=1e-13)

    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    got, _ = linear_policy_loss(
        hidden,
        weight,
        case.ids,
        case.advantages,
        config=config,
        mask=case.mask,
        old_logp=case.old_logp if use_old else None,
        ref_logp=case.ref_logp if use_ref else None,
    )
    got.backward()
    # what is left is fp32: the advantages, and the old and reference log-probs are given in it
    torch.testing.assert_close(hidden.grad, dhidden, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(weight.grad, dweight, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["clip", "cispo"])
def test_objective_slopes_are_their_derivatives(name):
    """The hand-written slope against autograd of the value, away from the kinks and exactly on
    them."""
    ratio = torch.tensor([0.3, 0.8, 1.0, 1.2, 1.5, 1.7], dtype=torch.float64)
    for sign in (1.0, -1.0, 0.0):
        log_ratio = ratio.log().requires_grad_()
        logp = torch.full_like(ratio, -1.3, requires_grad=True)
        r = log_ratio.exp()
        value, slope = getattr(objectives, name)(r, logp, torch.tensor(sign), 0.8, 1.2, 1.6)
        value.sum().backward()
        # cispo's value is differentiated with its ratio detached
        got = log_ratio.grad if name == "clip" else logp.grad
        torch.testing.assert_close(got, slope.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_slopes_are_their_derivatives(name):
    logp = torch.tensor([-0.1, -2.0, -30.0, -5.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-3.0, -2.0, -1.0, -5.5], dtype=torch.float64)
    value, slope = getattr(objectives, name)(logp, ref)
    value.sum().backward()
    torch.testing.assert_close(logp.grad, slope.detach())
    assert (value[1:2] == 0).all()


def test_everything_masked_is_exactly_zero():
    case = make_case()
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        for level in ("token", "sequence"):
            config = LossConfig(
                loss_type=loss_type, importance_sampling_level=level, max_completion_length=9
            )
            hidden = case.hidden.clone().requires_grad_()
            weight = case.weight.clone().requires_grad_()
            loss, metrics = linear_policy_loss(
                hidden,
                weight,
                case.ids,
                case.advantages,
                config=config,
                mask=torch.zeros_like(case.mask),
                old_logp=case.old_logp,
            )
            loss.backward()
            assert loss.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()
            assert all(torch.isfinite(v.float()) for v in metrics.values())


def test_denominator_makes_micro_batches_add_up():
    case = make_case()
    for loss_type in ("grpo", "dapo", "dr_grpo", "cispo"):
        config = LossConfig(loss_type=loss_type, epsilon_high=0.28, max_completion_length=9)
        weight = case.weight.clone().requires_grad_()
        whole = linear_policy_loss(
            case.hidden, weight, case.ids, case.advantages, config=config, mask=case.mask
        )[0]
        whole.backward()
        once, weight.grad = weight.grad, None
        total = weights.count(config, case.mask)
        parts = 0.0
        for row in range(4):
            s = slice(row, row + 1)
            part = linear_policy_loss(
                case.hidden[s],
                weight,
                case.ids[s],
                case.advantages[s].contiguous(),
                config=config,
                mask=case.mask[s],
                denominator=total,
            )[0]
            part.backward()
            parts += part.item()
        assert parts == pytest.approx(whole.item(), rel=1e-5, abs=1e-7)
        torch.testing.assert_close(weight.grad, once, rtol=1e-5, atol=1e-8)


def test_second_backward_is_refused_and_upstream_scales():
    case = make_case()
    weight = case.weight.clone().requires_grad_()
    args = (case.hidden, weight, case.ids, case.advantages)
    loss, _ = linear_policy_loss(*args, mask=case.mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()
    once, weight.grad = weight.grad, None
    # a gradient scaler's power of two must come through bit for bit
    (linear_policy_loss(*args, mask=case.mask)[0] * 2.0**16).backward()
    assert torch.equal(weight.grad, once * 2.0**16)


def test_inplace_gradient_tells_autograd():
    logits = torch.randn(2, 3, 11, requires_grad=True)
    ids = torch.randint(11, (2, 3))
    middle = logits * 1.0
    other = middle.square().sum()
    loss, _ = policy_loss(middle, ids, torch.ones(2), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()
