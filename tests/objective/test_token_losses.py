"""Token losses from given log-probs against the float64 reference, with a weight for each token."""

import pytest
import torch
from loss_cases import configurations, make_case, relative

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss, reference
from grpo_fast.objective.token_losses import token_losses

BOUND = 2e-5


def weights(mask):
    return torch.rand(mask.shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("config, use_old, use_ref", configurations())
def test_token_losses_equal_reference(config, use_old, use_ref):
    case = make_case()
    mask, weight = case.mask, weights(case.mask)
    finite = torch.where(mask[..., None], case.hidden, torch.zeros_like(case.hidden))
    ids = torch.where(mask, case.ids, torch.zeros_like(case.ids))
    logits = reference.head_logits(finite, case.weight).double()
    exact = reference.logprob(logits, ids, config.temperature)[0].requires_grad_()
    # a leaf in fp32 holds other numbers than the one in fp64, so both start from the fp32 ones
    given = exact.detach().float()
    with torch.no_grad():
        exact.copy_(given)
    old = torch.where(mask, case.old_logp, torch.zeros_like(given)).double()
    old = old if use_old else exact.detach()
    advantages = case.advantages.double()[:, None].expand(mask.shape)
    want, ratio = reference._objective(config, exact, old, advantages, mask, None)
    if use_ref:
        ref = torch.where(mask, case.ref_logp.double(), exact.detach())
        kl = reference.kl_divergence(exact, ref, config.kl_estimator)
        if config.kl_gradient is not None:
            other = reference.kl_divergence(exact, ref, config.kl_gradient)
            kl = other + (kl - other).detach()
        want = want + config.beta * (ratio * kl if config.use_bias_correction_kl else kl)
    want = torch.where(mask, want, torch.zeros_like(want))
    (want * weight.double()).sum().backward()

    leaf = torch.where(mask, given, torch.full_like(given, torch.nan)).requires_grad_()
    got = token_losses(
        leaf,
        case.advantages,
        config=config,
        mask=mask,
        old_logp=case.old_logp if use_old else None,
        ref_logp=case.ref_logp if use_ref else None,
    )
    (got.loss * weight).sum().backward()
    assert relative(got.loss, want) < BOUND
    assert relative(leaf.grad, exact.grad) < BOUND
    assert not got.loss[~mask].any() and not leaf.grad[~mask].any()
    if use_ref:
        assert relative(got.kl[mask], kl[mask].detach()) < BOUND
    assert not got.kl[~mask].any() and not got.ratio[~mask].any() and not got.clipped[~mask].any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_mean_is_the_policy_loss(level):
    case = make_case()
    config = LossConfig(importance_sampling_level=level, beta=0.2, epsilon_high=0.28)
    logp_given = {"old_logp": case.old_logp, "ref_logp": case.ref_logp, "mask": case.mask}
    hidden = [case.hidden.clone().requires_grad_() for _ in range(2)]
    whole, metrics = linear_policy_loss(
        hidden[0], case.weight, case.ids, case.advantages, config=config, **logp_given
    )
    whole.backward()
    logp = linear_logprob(hidden[1], case.weight, case.ids, mask=case.mask).logp
    parts = token_losses(logp, case.advantages, config=config, **logp_given)
    mean = parts.loss.sum() / case.mask.sum()
    mean.backward()
    assert abs(mean.item() - whole.item()) < 1e-6
    assert relative(hidden[1].grad, hidden[0].grad) < 1e-6
    clipped = parts.clipped.sum() / case.mask.sum()
    assert 0 < clipped.item() < 1 and clipped.item() == metrics["clip_ratio"].item()
    assert abs(parts.kl.sum() / case.mask.sum() - metrics["kl"]) < 1e-6


def test_options_that_need_entropies_are_refused():
    logp = torch.full((2, 3), -1.0)
    for name, value in (("entropy_coef", 0.1), ("top_entropy_quantile", 0.5)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            token_losses(logp, torch.ones(2), config=LossConfig(**{name: value}))
    with pytest.raises(ValueError, match="^logp: expected floating-point tensor"):
        token_losses(logp[0], torch.ones(2))
    with pytest.raises(ValueError, match="^old_logp: "):
        token_losses(logp, torch.ones(2), old_logp=logp[:, :2])
