"""Advantages, weights, objectives and the whole loss against numbers worked out by hand or by
`oracle.py`."""

from dataclasses import replace

import oracle
import pytest
import torch
from correction_cases import (
    CORRECTIONS,
    Correction,
    arguments,
    correction_case,
    expected,
    make_extras,
)
from loss_cases import configurations, make_case, relative

from grpo_fast import PRESETS, LossConfig, linear_policy_loss, policy_loss, reference
from grpo_fast.advantages.group import group_advantages
from grpo_fast.objective import objectives, weights
from grpo_fast.objective.token_losses import token_losses
from grpo_fast.presets import KL_ESTIMATORS, OBJECTIVES


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
        with pytest.raises(ValueError, match=r"rewards: expected floating-point tensor \(P, G\)"):
            group_advantages(bad)
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(ValueError, match="scale: expected"):
        group_advantages(torch.ones(1, 2), "groups")


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


def tokens_of(case, extras, correction, config, old, ref, advantages) -> oracle.Tokens:
    """The call of `correction_cases.expected` as the oracle takes it, from float64 log-probs."""
    clean = torch.where(case.mask[..., None], case.hidden, 0.0).double()
    logits = reference.head_logits(clean, case.weight.double())
    temperature = extras.temperature[correction.temperature]
    if temperature is None:
        temperature = torch.tensor(config.temperature, dtype=torch.float64)
    while temperature.dim() < 3:
        temperature = temperature[..., None]
    logits = logits / temperature.double()
    logp, entropy, _ = reference.logprob(logits, case.ids.clamp(min=0))
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand_as(logp)
    return oracle.Tokens(
        logp.tolist(),
        entropy.tolist(),
        advantages.double().tolist(),
        case.mask.tolist(),
        case.old_logp.double().tolist() if old else None,
        case.ref_logp.double().tolist() if ref else None,
        extras.rollout_logp.double().tolist() if correction.rollout else None,
        threshold=correction.threshold,
    )


def check_oracle(case, correction, config, old, ref, per_token=False, slopes=False) -> None:
    """The reference's value, and its derivative by each log-prob, against the oracle."""
    extras = make_extras(case)
    common = (old, ref, extras.advantages if per_token else case.advantages)
    want = tokens_of(case, extras, correction, config, *common)
    got, _, _, logits = expected(case, extras, correction, config, *common)
    assert got.item() == pytest.approx(oracle.loss(config, want), rel=1e-11, abs=1e-13)
    if not slopes:
        return
    config = replace(config, entropy_coef=0.0)
    logits = expected(case, extras, correction, config, *common)[3]
    # dlogits of the target is dlogp (1 - p) / temperature
    mask, ids = case.mask, case.ids.clamp(min=0)[..., None]
    heat = extras.temperature[correction.temperature]
    heat = (
        torch.tensor(config.temperature, dtype=torch.float64)
        if heat is None
        else heat.nan_to_num(1.0).double()
    )
    heat = heat[:, None] if heat.dim() == 1 else heat
    dlogp = logits.grad.gather(-1, ids)[..., 0] * heat / -torch.tensor(want.logp).double().expm1()
    slope = torch.tensor(oracle.derivative(config, want), dtype=torch.float64)
    torch.testing.assert_close(dlogp[mask], slope[mask], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("config, use_old, use_ref", configurations())
def test_reference_equals_the_oracle(config, use_old, use_ref):
    case = correction_case(torch.float64)
    check_oracle(case, Correction(), config, use_old, use_ref, slopes=True)
    check_oracle(case, Correction(), config, use_old, use_ref, per_token=True)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", PRESETS)
def test_reference_equals_the_oracle_with_corrections(loss_type, old):
    case = correction_case(torch.float64)
    for name, correction in CORRECTIONS.items():
        config = correction.config(loss_type)
        check_oracle(
            case,
            correction,
            config,
            old,
            ref=config.beta > 0,
            per_token=name.startswith("token"),
            slopes=name.startswith(("together", "off_policy")),
        )


@pytest.mark.parametrize("config, use_old, use_ref", configurations())
def test_torch_backend_in_float64_equals_reference(config, use_old, use_ref):
    check_float64(Correction(), config, use_old, use_ref)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", PRESETS)
def test_torch_backend_in_float64_equals_reference_with_corrections(loss_type, old):
    for correction in CORRECTIONS.values():
        config = correction.config(loss_type)
        check_float64(correction, config, old, config.beta > 0)


def check_float64(correction, config, old, ref) -> None:
    """Loss and gradients of `linear_policy_loss`, of inputs that are all float64."""
    case = correction_case(torch.float64)
    extras = make_extras(case)
    wide = {
        k: None if v is None else v.double()
        for k, v in arguments(case, extras, correction, config, old, ref, case.advantages).items()
        if k not in ("config", "ids", "mask", "entropy_threshold")
    }
    given = arguments(case, extras, correction, config, old, ref, case.advantages) | wide
    loss, dhidden, dweight, _ = expected(
        case, extras, correction, config, old, ref, case.advantages
    )
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    got, _ = linear_policy_loss(hidden, weight, **given)
    got.backward()
    assert got.item() == pytest.approx(loss.item(), rel=1e-11, abs=1e-13)
    assert relative(hidden.grad, dhidden.grad) < 1e-11
    assert relative(weight.grad, dweight.grad) < 1e-11


# numbers at which the grids below have values on both sides and on the kinks
NUMBERS = {
    "clip": (0.8, 1.2, 1.6, 0.0),
    "sapo": (1.0, 1.05, 0.0, 0.0),
    "cispo": (0.9, 1.2, 0.0, 0.0),
    "vespo": (2.0, 3.0, 3.0, 2.0),
    "dppo_tv": (0.05, 0.07, 1.4, 0.0),
    "dppo_kl": (0.01, 0.02, 1.4, 0.0),
}
RATIOS = (0.3, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 1.7)


def frozen_value(name: str, ratio, logp, advantage):
    """Values of an objective whose stop-gradient factor, or mask, is a constant."""
    objective, numbers = getattr(objectives, name), NUMBERS.get(name, (0.0,) * 4)
    if OBJECTIVES[name].through_ratio:
        return objective(ratio, logp.detach(), advantage, *numbers)[0]
    still = objective(ratio.detach(), logp.detach(), advantage, *numbers)[0] / logp.detach()
    return still * logp


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_slopes_are_their_derivatives(name, sign):
    """The hand-written slope against autograd of the value, away from the kinks and exactly on
    them."""
    log_ratio = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    logp = torch.full((len(RATIOS),), -1.3, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor(sign, dtype=torch.float64)
    frozen_value(name, log_ratio.exp(), logp, advantage).sum().backward()
    numbers = NUMBERS.get(name, (0.0,) * 4)
    value, slope = getattr(objectives, name)(
        log_ratio.detach().exp(), logp.detach(), advantage, *numbers
    )
    through = OBJECTIVES[name].through_ratio
    got, other = (log_ratio.grad, logp.grad) if through else (logp.grad, log_ratio.grad)
    torch.testing.assert_close(got, slope.expand_as(got), rtol=1e-12, atol=1e-12)
    assert other is None or not other.any()
    assert slope.any() == (sign != 0)
    if not through:
        torch.testing.assert_close(value, slope.expand_as(value) * -1.3, rtol=1e-12, atol=0)


def test_clip_slopes_by_hand():
    """A tie is unclipped; below, above and beyond the cap by the side of the advantage."""
    ratio = torch.tensor([0.3, 0.8, 1.0, 1.2, 1.5, 1.7], dtype=torch.float64)
    logp = torch.zeros(6, dtype=torch.float64)
    up = objectives.clip(ratio, logp, torch.tensor(1.0), 0.8, 1.2, 1.6, 0.0)
    down = objectives.clip(ratio, logp, torch.tensor(-1.0), 0.8, 1.2, 1.6, 0.0)
    assert up[0].tolist() == [-0.3, -0.8, -1.0, -1.2, -1.2, -1.2]
    assert up[1].tolist() == [-0.3, -0.8, -1.0, -1.2, 0.0, 0.0]
    assert down[0].tolist() == [0.8, 0.8, 1.0, 1.2, 1.5, 1.6]
    assert down[1].tolist() == [0.0, 0.8, 1.0, 1.2, 1.5, 0.0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_homogeneous_in_the_advantage(name, sign):
    """f(c A) = c f(A) for c >= 0: what lets a correction be a factor of the advantage."""
    objective, numbers = getattr(objectives, name), NUMBERS.get(name, (0.0,) * 4)
    ratio = torch.tensor(RATIOS, dtype=torch.float64)
    logp = torch.linspace(-3.0, -0.01, len(RATIOS), dtype=torch.float64)
    advantage = sign * torch.tensor(0.7, dtype=torch.float64)
    one = objective(ratio, logp, advantage, *numbers)
    assert one[0].any()
    for c in (0.0, 1e-3, 0.25, 1.0, 2.5, 40.0):
        for scaled, plain in zip(objective(ratio, logp, c * advantage, *numbers), one, strict=True):
            torch.testing.assert_close(scaled, c * plain, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_slopes_are_their_derivatives(name):
    logp = torch.tensor([-0.1, -2.0, -30.0, -5.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-3.0, -2.0, -1.0, -5.5], dtype=torch.float64)
    value, slope = getattr(objectives, name)(logp, ref)
    value.sum().backward()
    want = torch.ones_like(ref) if name == "k1" else logp.grad
    if name == "absolute":
        # where() has no subgradient of its own at 0; torch's abs has 0, as ours
        want = torch.tensor([1.0, 0.0, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(slope.detach(), want)
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


@pytest.mark.parametrize("sign, loss", [(1.0, -3.2), (-1.0, 3.2)])
def test_a_cap_of_a_preset_is_never_inside_the_clip(sign, loss):
    """ppo's dual clip of 3 is for A < 0 alone: a ratio of 3.2 inside 1 + epsilon_high = 3.5 is its
    own, on either side."""
    config = LossConfig("ppo", epsilon_high=2.5)
    assert config.ratio_cap == 3.5 and LossConfig("ppo").ratio_cap == 3.0
    logp = torch.zeros(1, 1, requires_grad=True)
    old = -torch.tensor([[3.2]]).log()
    out = token_losses(logp, torch.tensor([sign]), old_logp=old, config=config)
    out.loss.sum().backward()
    assert out.loss.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(loss)
