"""Log-prob operations on the Triton kernels, in Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import op_checks
import row_checks

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from grpo_fast.kernels.lang import one_minus_exp  # noqa: E402
from grpo_fast.objective import objectives  # noqa: E402
from grpo_fast.presets import OBJECTIVES  # noqa: E402


@triton.jit
def one_minus_exp_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < n, other=0.0)
    tl.store(out_ptr + place, one_minus_exp(x), mask=place < n)


def test_one_minus_exp_is_the_same_in_both_languages():
    """The series stands in the objectives, for torch, and in the kernels' vocabulary, for Triton:
    neither may import the other. Within 2 ulp of each other and 3 of float64, on both branches."""
    x = -torch.cat((torch.logspace(-30, 2, 4001), torch.linspace(0.49, 0.51, 95))).float()
    got = torch.empty_like(x)
    one_minus_exp_kernel[(1,)](x, got, x.numel(), BLOCK=4096)
    exact = -torch.expm1(x.double())
    ulp = torch.finfo(torch.float32).eps
    for name, value in (("triton", got), ("torch", objectives.one_minus_exp(x))):
        assert ((value.double() - exact).abs() / exact).max() <= 3 * ulp, name
    assert ((got - objectives.one_minus_exp(x)).abs() / exact).max() <= 2 * ulp


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")


@pytest.mark.parametrize("n, V", [(1, 1), (3, 2), (63, 77), (200, 129), (3, 32001), (1, 151936)])
def test_logprob_equals_float64(n, V):
    op_checks.check_logprob(n, V)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logprob_of_half_precision_logits(dtype):
    op_checks.check_logprob(63, 1000, dtype)


@pytest.mark.parametrize(
    "check",
    [
        op_checks.check_stable_ends,
        op_checks.check_transforms,
        op_checks.check_nan_is_seen,
        op_checks.check_row_statistics_do_not_depend_on_batch,
        op_checks.check_extreme_ratios_are_clamped_and_counted,
        op_checks.check_small_gradients_survive_fp16,
        op_checks.check_int64_rows,
    ],
    ids=lambda check: check.__name__,
)
def test_operation(check):
    check()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_rule(dtype, level):
    op_checks.check_low_precision(dtype, level)


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


@pytest.mark.parametrize("objective", row_checks.PARAMETERS)
def test_objective_equals_the_torch_backend(objective):
    row_checks.check_objective_equals_the_torch_backend(objective)


def test_every_objective_is_compared():
    assert set(row_checks.PARAMETERS) == set(OBJECTIVES)
