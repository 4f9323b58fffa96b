"""What the kernels compute apart from the torch backend, in Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from grpo_fast.kernels.lang import one_minus_exp  # noqa: E402
from grpo_fast.objective import objectives  # noqa: E402

pytestmark = [pytest.mark.kernels, pytest.mark.triton]


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
