"""The kernels on a real GPU: the same checks as in the interpreter, and what only a GPU can
show."""

import pytest
import torch
from checks import (
    check_beyond_the_clamp,
    check_everything_together,
    check_linear,
    check_logits,
    check_zero_advantages_leave_the_backward,
)
from loss_cases import configurations, make_case
from op_checks import (
    check_extreme_ratios_are_clamped_and_counted,
    check_half_precision_logits,
    check_logprob,
    check_low_precision,
    check_nan_is_seen,
    check_row_statistics_do_not_depend_on_batch,
    check_small_gradients_survive_fp16,
    check_stable_ends,
    check_steep_ratios_in_fp16,
    check_transforms,
)

from grpo_fast import linear_policy_loss, logprob
from grpo_fast.backend import select

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_gpu():
    assert select("cuda").name == "triton"
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("config, old, ref", configurations())
def test_losses_equal_reference(config, old, ref):
    check_linear(config, old, ref, packed=old)
    check_logits(config, old, ref, inplace=old)


@pytest.mark.parametrize("n, V", [(1, 1), (63, 77), (1000, 129), (64, 32001), (64, 151936)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logprob_equals_float64(n, V, dtype):
    check_logprob(n, V, dtype)


@pytest.mark.parametrize(
    "check",
    [
        check_stable_ends,
        check_transforms,
        check_nan_is_seen,
        check_row_statistics_do_not_depend_on_batch,
        check_extreme_ratios_are_clamped_and_counted,
        check_small_gradients_survive_fp16,
    ],
    ids=lambda check: check.__name__,
)
def test_operation(check):
    check()


@pytest.mark.parametrize("V", [500, 32001])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_rule(dtype, level, V):
    check_low_precision(dtype, level, V)


def test_more_elements_than_int32_holds():
    """16,384 rows of 151,936 logits: 2.5e9 elements; the last rows against float64."""
    n, V = 16384, 151936
    logits = torch.randn(n, V, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(V, (n,))
    out = logprob(logits, ids)
    want = torch.log_softmax(logits[-64:].detach().double(), -1).gather(1, ids[-64:, None])[:, 0]
    torch.testing.assert_close(out.logp[-64:].double(), want, rtol=1e-5, atol=1e-5)
    out.logp[-1].backward()
    assert not logits.grad[:-1].any() and logits.grad[-1, ids[-1]] > 0


def test_repeats_are_bit_equal():
    case = make_case(V=32001, H=64, dtype=torch.bfloat16)
    first = None
    for _ in range(50):
        weight = case.weight.clone().requires_grad_()
        loss, _ = linear_policy_loss(
            case.hidden, weight, case.ids, case.advantages, mask=case.mask, old_logp=case.old_logp
        )
        loss.backward()
        first = weight.grad if first is None else first
        assert torch.equal(weight.grad, first)


def test_peak_memory_stays_within_the_workspace():
    N, V, H, workspace = 8192, 65536, 1024, 512 << 20
    hidden = torch.randn(N, H, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=True)
    ids, advantages = torch.randint(V, (N,)), torch.randn(N)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = linear_policy_loss(hidden, weight, ids, advantages, workspace_bytes=workspace)
    loss.backward()
    used = torch.cuda.max_memory_allocated() - before
    # fp32 accumulators and the downcast gradients
    assert used <= 1.1 * ((4 + 2) * (N + V) * H + workspace)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("objective", ["dapo", "grpo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_everything_together(level, objective, frozen):
    check_everything_together(level, objective, frozen)


def test_zero_advantages_leave_the_backward():
    check_zero_advantages_leave_the_backward()


def test_beyond_the_clamp():
    check_beyond_the_clamp()


@pytest.mark.parametrize("upstream", [1 / 7, 32768.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype, upstream):
    check_half_precision_logits(dtype, upstream)


def test_steep_ratios_in_fp16():
    check_steep_ratios_in_fp16()
