"""Log-prob operations on the torch backend, and what belongs to no backend."""

import pytest
import row_checks
import torch
from op_checks import (
    check_extreme_ratios_are_clamped_and_counted,
    check_logprob,
    check_low_precision,
    check_nan_is_seen,
    check_row_statistics_do_not_depend_on_batch,
    check_small_gradients_survive_fp16,
    check_stable_ends,
    check_transforms,
)

from grpo_fast import linear_logprob, logprob


@pytest.mark.parametrize("n, V", [(1, 1), (3, 2), (63, 77), (1000, 129), (5, 32001), (2, 151936)])
def test_logprob_equals_float64(n, V):
    check_logprob(n, V)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logprob_of_half_precision_logits(dtype):
    check_logprob(63, 1000, dtype)


def test_stable_ends():
    check_stable_ends()


def test_transforms():
    check_transforms()


def test_nan_is_seen_unmasked_and_invisible_masked():
    check_nan_is_seen()


def test_row_statistics_do_not_depend_on_batch():
    check_row_statistics_do_not_depend_on_batch()


def test_extreme_ratios_are_clamped_and_counted():
    check_extreme_ratios_are_clamped_and_counted()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_rule(dtype, level):
    check_low_precision(dtype, level)


def test_small_gradients_survive_fp16():
    check_small_gradients_survive_fp16()


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_row_temperature(softcap):
    row_checks.check_row_temperature(softcap)
    row_checks.check_equal_row_temperatures_change_no_bit(softcap)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_entropy_bonus_of_the_one_pass_loss(softcap, by_row):
    row_checks.check_entropy_bonus(softcap, by_row)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_rollout_weight_of_the_one_pass_loss(masks, on_policy):
    row_checks.check_rollout_weight(masks, on_policy)


def test_float64_gradcheck():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.tensor([0, 6, 3, 2, 2]), torch.tensor([1, 1, 0, 1, 1])

    def head(h, w, b):
        return linear_logprob(
            h, w, ids, bias=b, mask=mask, temperature=0.8, softcap=3.0, entropy=True
        )

    assert torch.autograd.gradcheck(head, (hidden, weight, bias))
    logits = torch.randn(5, 7, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: logprob(z, ids, mask=mask, temperature=0.8, entropy=True), (logits,)
    )


def test_strides_and_layouts_do_not_change_a_bit():
    g = torch.Generator().manual_seed(4)
    base = torch.randn(3, 6, 40, generator=g)
    ids = torch.randint(40, (3, 5), generator=g)
    want = logprob(base[:, :-1].contiguous(), ids)
    sliced = logprob(base[:, :-1], ids)
    swapped = logprob(base.transpose(0, 1).contiguous().transpose(0, 1)[:, :-1], ids)
    expanded = logprob(base[:1, :-1].expand(3, -1, -1), ids[:1].expand(3, -1))
    assert torch.equal(want.logp, sliced.logp) and torch.equal(want.logp, swapped.logp)
    assert torch.equal(expanded.logp, want.logp[:1].expand(3, -1))
    hidden, weight = torch.randn(8, 5, generator=g).T, torch.randn(8, 40, generator=g).T
    one = linear_logprob(hidden, weight, ids[0])
    two = linear_logprob(hidden.contiguous(), weight.contiguous(), ids[0])
    torch.testing.assert_close(one.logp, two.logp, rtol=1e-6, atol=1e-6)


def test_second_consumer_and_double_backward():
    logits = torch.randn(4, 9, requires_grad=True)
    ids = torch.tensor([1, 2, 3, 4])
    middle = logits * 1.0
    (logprob(middle, ids).logp.sum() + middle.square().sum()).backward(retain_graph=True)
    expected = torch.nn.functional.one_hot(ids, 9) - logits.softmax(-1) + 2 * logits
    torch.testing.assert_close(logits.grad, expected.detach())
    weighted = logprob(logits, ids).logp @ torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(weighted, logits, create_graph=True)
    changed = logits * 1.0
    out = logprob(changed, ids).logp.sum()
    changed.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
