"""Gradients by finite differences in float64: log-prob operations with every option, and the losses
of which the value is what is differentiated. Those with a stop-gradient have no difference quotient
to agree with; `test_mathematics.py` has them against `oracle.py`, which freezes what is stopped."""

import pytest
import torch
from loss_cases import relative
from torch.autograd import gradcheck, gradgradcheck

from grpo_fast import (
    PRESETS,
    LossConfig,
    linear_logprob,
    linear_policy_loss,
    logprob,
    policy_loss,
    reference,
)
from grpo_fast.presets import OBJECTIVES

N, H, V, R = 6, 3, 5, 2
IDS = torch.tensor([0, 4, 3, 2, 2, 1])
MASK = torch.tensor([1, 1, 0, 1, 1, 1])


def leaf(*shape: int, seed: int = 0, trained: bool = True) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(trained)


def head(trained: tuple[str, ...] = ("hidden", "weight", "bias", "A", "B")) -> dict:
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,), "A": (R, H), "B": (V, R)}
    return {
        name: leaf(*shape, seed=i, trained=name in trained)
        for i, (name, shape) in enumerate(shapes.items())
    }


HEATS = 0.6 + torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": -1.7},
    "temperature": {"temperature": 0.7},
    "temperatures": {"temperature": HEATS},
    "mask": {"mask": MASK},
    "all": {"softcap": 2.0, "logit_scale": 0.6, "temperature": HEATS, "mask": MASK},
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_linear_logprob(option, bias, lora):
    """logp, entropy and lse by hidden, weight, bias and an adapter; then by hidden alone, where the
    forward keeps dlogp / dhidden."""
    for trained in (("hidden", "weight", "bias", "A", "B"), ("hidden",)):
        tensors = head(trained)

        def of(hidden, weight, b, A, B):
            return linear_logprob(
                hidden,
                weight,
                IDS,
                bias=b if bias else None,
                lora=(A, B, 1.3) if lora else None,
                entropy=True,
                **OPTIONS[option],
            )

        assert gradcheck(of, tuple(tensors.values()))
        # without the others logp takes the product that the forward kept
        assert gradcheck(lambda *x: of(*x).logp, tuple(tensors.values()))


@pytest.mark.parametrize("option", ["plain", "temperature", "temperatures", "mask"])
def test_logprob(option):
    assert gradcheck(lambda z: logprob(z, IDS, entropy=True, **OPTIONS[option]), (leaf(N, V),))


def loss_of(config: LossConfig, old: bool) -> dict:
    """Arguments of a packed call of two sequences; old and reference log-probs near nothing."""
    return {
        "ids": IDS,
        "advantages": torch.tensor([0.8, -1.1], dtype=torch.float64),
        "config": config,
        "cu_seqlens": torch.tensor([0, 2, 6]),
        "mask": MASK,
        "old_logp": -2.0 + 0.3 * leaf(N, seed=8, trained=False) if old else None,
        "ref_logp": -2.0 + 0.3 * leaf(N, seed=9, trained=False) if config.beta else None,
    }


def difference(call, leaves: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Largest distance of the gradient from a central difference along random directions, and its
    size. A loss has one backward, and torch's gradcheck asks for several."""
    names = [name for name, tensor in leaves.items() if tensor.requires_grad]
    loss = call(**leaves)
    grads = torch.autograd.grad(loss, [leaves[name] for name in names])
    errors, sizes, h = [], [], 1e-5
    for seed in range(4):
        way = {name: leaf(*leaves[name].shape, seed=50 + seed) for name in names}
        with torch.no_grad():
            ends = [
                call(**{k: v + sign * h * way[k] if k in way else v for k, v in leaves.items()})
                for sign in (1.0, -1.0)
            ]
        slope = sum((g * way[name]).sum() for g, name in zip(grads, names, strict=True))
        errors.append(abs((ends[0] - ends[1]) / (2 * h) - slope).item())
        sizes.append(abs(slope.item()))
    return max(errors), max(sizes)


def check_slopes(call, leaves: dict[str, torch.Tensor]) -> None:
    error, size = difference(call, leaves)
    assert error < 1e-7 * size


# the value itself is differentiated: no stop-gradient, and with one temperature for all
DIFFERENTIABLE = [
    (name, level)
    for name, preset in PRESETS.items()
    for level in preset.levels or (None,)
    if OBJECTIVES[preset.objective].through_ratio and level != "sequence_token"
]


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("loss_type, level", DIFFERENTIABLE)
def test_losses_without_a_stop_gradient(loss_type, level, beta):
    config = LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=0.5,
        beta=beta,
        entropy_coef=0.1,
        max_completion_length=5,
    )
    given = loss_of(config, old=True)
    tensors = head()

    def linear(hidden, weight, bias, A, B):
        more = {"bias": bias, "lora": (A, B, 1.3), "softcap": 2.0}
        return linear_policy_loss(hidden, weight, **more, **given)[0]

    check_slopes(linear, tensors)
    check_slopes(linear, head(("hidden",)))
    check_slopes(lambda z: policy_loss(z, **given)[0], {"z": leaf(N, V)})


def test_log_prob_losses_without_a_ratio():
    """reinforce, gpg and reward_weighted have no stop-gradient either."""
    for loss_type in ("reinforce", "gpg", "reward_weighted"):
        given = loss_of(LossConfig(loss_type=loss_type, entropy_coef=0.1), old=False)
        check_slopes(lambda z, given=given: policy_loss(z, **given)[0], {"z": leaf(N, V)})
        tensors = {k: v for k, v in head(("hidden",)).items() if k in ("hidden", "weight")}
        check_slopes(lambda given=given, **x: linear_policy_loss(**x, **given)[0], tensors)


def test_a_difference_quotient_sees_a_stop_gradient():
    """cispo's value has another derivative than its gradient: the test above could have failed."""
    given = loss_of(LossConfig(loss_type="cispo", epsilon_high=5.0), old=True)
    error, size = difference(lambda z: policy_loss(z, **given)[0], {"z": leaf(N, V)})
    assert error > 0.1 * size


def test_double_backward_is_refused_by_name():
    hidden, weight = head()["hidden"], head()["weight"]
    given = loss_of(LossConfig(), old=True)
    for call in (
        lambda h, w: linear_logprob(h, w, IDS).logp,
        lambda h, w: logprob(h @ w.T, IDS).logp,
        lambda h, w: linear_policy_loss(h, w, **given)[0],
        lambda h, w: policy_loss(h @ w.T, **given)[0],
    ):
        with pytest.raises(RuntimeError, match="double backward"):
            gradgradcheck(call, (hidden, weight))
        # also where the upstream gradient needs none, as in a gradient penalty
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(call(hidden, weight).sum(), hidden, create_graph=True)


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids="-".join)
def test_second_backward(trained):
    """Through a loss it is refused; through log-probs it gives the same again."""
    given = loss_of(LossConfig(loss_type="gspo"), old=True)
    tensors = head(trained)
    hidden, weight = tensors["hidden"], tensors["weight"]
    for loss in (
        linear_policy_loss(hidden, weight, **given)[0],
        policy_loss(hidden @ weight.T, **given)[0],
    ):
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="call the loss again"):
            loss.backward()
    out = linear_logprob(hidden, weight, IDS, temperature=HEATS, entropy=True)
    logits = reference.head_logits(hidden, weight) / HEATS[:, None]
    exact = reference.logprob(logits, IDS)
    for with_entropy in (0.0, 1.0):
        grads = []
        for logp, entropy, _ in (out, out, exact):
            total = (logp * HEATS).sum()
            total = total + entropy.sum() if with_entropy else total
            grads.append(torch.autograd.grad(total, hidden, retain_graph=True)[0])
        assert torch.equal(*grads[:2]) and relative(grads[0], grads[2]) < 1e-12
