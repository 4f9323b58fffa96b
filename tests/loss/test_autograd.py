"""What the losses and log-probs do under autograd besides giving the right gradient: second
backwards, other users of a tensor, changes in place, autocast and loss scales."""

import pytest
import torch
from loss_cases import make_case, relative

from grpo_fast import LossConfig, linear_logprob, linear_policy_loss, logprob, policy_loss
from grpo_fast.objective.token_losses import token_losses
from grpo_fast.reference import head_logits

DOUBLE = "does not support double backward"
VERSION = "modified by an inplace operation"


def inputs_of(case, frozen=False):
    hidden = torch.nan_to_num(case.hidden).requires_grad_()
    weight = case.weight.clone().requires_grad_(not frozen)
    return hidden, weight


def linear_loss(hidden, weight, case, **given):
    args = (case.ids, case.advantages)
    return linear_policy_loss(hidden, weight, *args, mask=case.mask, **given)[0]


def logits_loss(logits, case, **given):
    args = (case.ids, case.advantages)
    return policy_loss(logits, *args, mask=case.mask, **given)[0]


def scalar(name, case):
    """One of the four functions as a scalar of hidden states."""
    hidden, weight = inputs_of(case)
    middle = hidden * 1.0
    logits = middle @ weight.T
    return hidden, {
        "linear_policy_loss": lambda: linear_loss(middle, weight, case, old_logp=case.old_logp),
        "policy_loss": lambda: logits_loss(logits, case, old_logp=case.old_logp),
        "linear_logprob": lambda: linear_logprob(middle, weight, case.ids, mask=case.mask).logp,
        "logprob": lambda: logprob(logits, case.ids, mask=case.mask).logp,
    }[name]().sum()


NAMES = ("linear_policy_loss", "policy_loss", "linear_logprob", "logprob")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_double_backward_says_that_there_is_none(name, weighted):
    hidden, value = scalar(name, make_case())
    # an upstream gradient that needs one itself, and one that is a constant
    factor = torch.tensor(2.0, requires_grad=weighted)
    with pytest.raises(RuntimeError, match=DOUBLE):
        torch.autograd.grad(value * factor, hidden, create_graph=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_token_losses_have_no_double_backward_either(weighted):
    logp = torch.full((2, 3), -1.5, requires_grad=True)
    value = token_losses(logp, torch.tensor([1.0, -1.0]), old_logp=torch.full((2, 3), -1.4)).loss
    factor = torch.tensor(2.0, requires_grad=weighted)
    with pytest.raises(RuntimeError, match=DOUBLE):
        torch.autograd.grad(value.sum() * factor, logp, create_graph=True)


@pytest.mark.parametrize("name", ["linear_policy_loss", "policy_loss"])
def test_a_second_backward_through_a_loss_is_refused(name):
    hidden, value = scalar(name, make_case())
    value.backward(retain_graph=True)
    first = hidden.grad.clone()
    with pytest.raises(RuntimeError, match="call the loss again for a second one"):
        value.backward()
    assert torch.equal(hidden.grad, first)


@pytest.mark.parametrize("frozen", [False, True])
def test_log_probs_can_be_differentiated_again(frozen):
    case = make_case()
    hidden, weight = inputs_of(case, frozen)
    out = linear_logprob(hidden, weight, case.ids, mask=case.mask)
    out.logp.sum().backward(retain_graph=True)
    first = hidden.grad.clone()
    out.logp.sum().backward(retain_graph=True)
    assert torch.equal(hidden.grad, 2 * first)
    # the results are not what is saved
    with torch.no_grad():
        out.logp.zero_()
        out.lse.zero_()
    out.logp.sum().backward()
    assert torch.equal(hidden.grad, 3 * first)


def test_logits_have_a_second_consumer():
    case = make_case()
    alone = torch.nan_to_num(head_logits(case.hidden, case.weight)).requires_grad_()
    logits_loss(alone, case).backward()
    leaf = alone.detach().clone().requires_grad_()
    logits = leaf * 1.0
    (logits_loss(logits, case) + logits.square().sum()).backward()
    torch.testing.assert_close(leaf.grad, alone.grad + 2 * leaf.detach())


def test_inplace_gradients_are_announced_to_a_second_consumer():
    case = make_case()
    leaf = torch.nan_to_num(head_logits(case.hidden, case.weight)).requires_grad_()
    logits = leaf * 1.0
    other, version = logits.square().sum(), logits._version
    loss = logits_loss(logits, case, inplace=True)
    assert logits._version > version
    with pytest.raises(RuntimeError, match=VERSION):
        (loss + other).backward()
    # without a gradient nothing is written
    logits, kept = logits.detach(), logits.detach().clone()
    logits_loss(logits, case, inplace=True)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("changed", ["hidden", "weight"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_saved_head_changed_in_place_is_noticed(changed, frozen):
    case = make_case()
    hidden, weight = inputs_of(case, frozen)
    middle = hidden * 1.0
    out = linear_logprob(middle, weight, case.ids, mask=case.mask).logp.sum()
    with torch.no_grad():
        (middle if changed == "hidden" else weight).mul_(2.0)
    with pytest.raises(RuntimeError, match=VERSION):
        out.backward()


def test_saved_logits_changed_in_place_are_noticed():
    leaf = torch.randn(4, 9, requires_grad=True)
    logits = leaf * 1.0
    out = logprob(logits, torch.tensor([1, 2, 3, 4])).logp.sum()
    logits.add_(1.0)
    with pytest.raises(RuntimeError, match=VERSION):
        out.backward()


def test_a_finished_loss_does_not_mind_later_changes():
    case = make_case()
    hidden, weight = inputs_of(case)
    want = torch.autograd.grad(linear_loss(hidden, weight, case), (hidden, weight))
    loss = linear_loss(hidden, weight, case)
    # its gradients were computed in the forward pass, with the values of then
    with torch.no_grad():
        weight.zero_()
    got = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("leaves", [torch.float32, torch.bfloat16])
def test_autocast_on_a_cpu_keeps_the_precision_of_the_operands(level, leaves):
    case = make_case()
    config = LossConfig(importance_sampling_level=level)
    given = {"config": config, "old_logp": case.old_logp}
    hidden, weight = (t.detach().to(leaves).requires_grad_() for t in inputs_of(case))
    plain = linear_loss(hidden, weight, case, **given)
    want = torch.autograd.grad(plain, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_loss(hidden, weight, case, **given)
    got = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(hidden, weight, case.ids, mask=case.mask)
        again = logprob(head_logits(hidden, weight), case.ids, mask=case.mask)
    assert out.logp.dtype == again.logp.dtype == torch.float32
    exact = linear_logprob(hidden, weight, case.ids, mask=case.mask)
    assert torch.equal(out.logp, exact.logp)


def test_autocast_takes_a_layer_of_bf16_beside_a_weight_of_fp32():
    case = make_case()
    hidden, weight = inputs_of(case)
    low = hidden.detach().bfloat16().requires_grad_()
    with pytest.raises(ValueError, match="weight: expected the dtype of hidden"):
        linear_loss(low, weight, case)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_loss(low, weight, case)
    got = torch.autograd.grad(loss, (low, weight))
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32]
    exact = low.detach().float().requires_grad_()
    want = torch.autograd.grad(linear_loss(exact, weight, case), (exact, weight))
    # one rounding to bf16 is at most 2^-9 of each number
    assert relative(got[0], want[0]) < 2**-9 and torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_scale_is_a_factor(name, dtype):
    """As GradScaler's: 2^16 is above fp16's largest number, the scaled gradients are not."""
    case = make_case()
    found = []
    for scale in (1.0, 2.0**16):
        hidden, weight = (t.detach().to(dtype) for t in inputs_of(case))
        logits = head_logits(hidden.float(), weight.float()).to(dtype)
        leaves = [logits] if name in ("policy_loss", "logprob") else [hidden, weight]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        value = {
            "linear_policy_loss": lambda h, w: linear_loss(h, w, case) * 0.05,
            "policy_loss": lambda z: logits_loss(z, case) * 0.05,
            "linear_logprob": lambda h, w: (
                linear_logprob(h, w, case.ids, mask=case.mask).logp.mean() * 0.01
            ),
            "logprob": lambda z: logprob(z, case.ids, mask=case.mask).logp.mean() * 0.01,
        }[name](*leaves)
        grads = torch.autograd.grad(value * scale, leaves)
        assert all(g.dtype == dtype and g.isfinite().all() for g in grads)
        found.append([g.double() / scale for g in grads])
    # what is rounded is the scaled gradient, and without a scale fp16 has lost the small ones
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2e-3}[dtype]
    assert all(relative(*pair) < bound for pair in zip(*found, strict=True))
