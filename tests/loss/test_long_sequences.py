"""Ratios of whole sequences of many tokens: their sums leave nothing of a systematic rounding."""

import pytest
import torch

from grpo_fast import LossConfig, linear_policy_loss


@pytest.mark.parametrize("length", (65_536, 262_144))
@pytest.mark.parametrize("loss_type", ("rloo", "vespo", "gspo", "gmpo"))
def test_dhidden_of_a_long_sequence(loss_type, length):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, length, 4, generator=g), torch.randn(8, 4, generator=g)
    ids = torch.randint(8, (1, length), generator=g)
    drift = 0.1 / length if loss_type in ("rloo", "vespo") else 0.05
    h = hidden.double().requires_grad_()
    logp = (h @ weight.double().T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old = (logp.detach() - drift).float()
    gap = logp - old.double()
    gap = gap.sum() if loss_type in ("rloo", "vespo") else gap.mean()
    if loss_type == "vespo":
        # phi = w^2 exp(3 (1 - w)) without a gradient
        (-(2 * gap + 3 - 3 * gap.exp()).exp().detach() * logp).mean().backward()
    else:
        # inside every clip, with A = 1
        (-gap.exp()).mean().backward()
    x = hidden.clone().requires_grad_()
    config = LossConfig(loss_type)
    linear_policy_loss(x, weight, ids, torch.ones(1), old_logp=old, config=config)[0].backward()
    error = (x.grad - h.grad).norm() / h.grad.norm()
    # fp32 logits are 1.9e-7 nats off at random, and a sum of 262k of them 1e-4
    summed = loss_type in ("rloo", "vespo") and length > 65_536
    assert error < (1e-4 if summed else 2e-5)
