"""Losses of a whole sequence at lengths where a running sum in fp32 loses digits."""

import pytest
import torch

from grpo_fast import LossConfig, linear_policy_loss
from grpo_fast.objective.weights import sequence_sum

# promised of dhidden, as relative L2 against float64
BOUND = 2e-5


def gradient(loss_type, dtype, hidden, weight, ids, old):
    """dhidden in plain torch of a loss inside every clip, A = 1, one sequence."""
    h = hidden.to(dtype).requires_grad_()
    logp = (h @ weight.to(dtype).T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    gap = logp - old.to(dtype)
    if loss_type == "vespo":
        w = gap.sum()
        # -stop_gradient(w^2 e^(3 (1 - w))) A logp, averaged over the tokens
        (-(2 * w + 3 - 3 * w.exp()).exp().detach() * logp).mean().backward()
    else:
        (-(gap.sum() if loss_type == "rloo" else gap.mean()).exp()).backward()
    return h.grad.double() * (ids.numel() if loss_type == "luspo" else 1)


def distance(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("length", [65_536, 262_144])
@pytest.mark.parametrize("loss_type", ["gspo", "luspo", "gspo_token", "gmpo", "rloo", "vespo"])
def test_gradients_of_long_sequences_keep_their_digits(loss_type, length):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, length, 4), torch.randn(8, 4)
    ids = torch.randint(8, (1, length))
    logp = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    product = loss_type in ("rloo", "vespo")
    old = (logp - (0.1 / length if product else 0.05)).float()
    given = (hidden, weight, ids, old)
    want = gradient(loss_type, torch.float64, *given)
    leaf = hidden.clone().requires_grad_()
    config = LossConfig(loss_type)
    linear_policy_loss(leaf, weight, ids, torch.ones(1), old_logp=old, config=config)[0].backward()
    allowed = BOUND
    if product:
        # the roundings of n fp32 log-probs of 2e-7 each add up to 2e-7 sqrt(n), however well they
        # are added: 1e-4 at 262k, of which the sum may be off by 4; vespo's weight goes as 1.3 w
        rounded = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        spread = (rounded.double() - logp).norm().item()
        allowed = max(allowed, 4 * spread * (1.32 if loss_type == "vespo" else 1.0))
    assert distance(leaf.grad.double(), want) < allowed


def test_a_sum_has_one_rounding_and_does_not_know_its_neighbours():
    torch.manual_seed(0)
    lengths = [1, 70_000, 0, 333]
    parts = [torch.randn(n) + 1.7 for n in lengths]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    together = sequence_sum(torch.cat(parts), bounds)
    alone = [sequence_sum(part, torch.tensor([0, len(part)])) for part in parts]
    assert torch.equal(together, torch.cat(alone))
    exact = torch.stack([part.double().sum() for part in parts]).float()
    assert torch.equal(together, exact)
    assert together.dtype == torch.float32
