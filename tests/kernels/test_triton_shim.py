"""The interpreter shim itself: each check is shown to fire, and to stay quiet when all is well."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from interpreter import (  # noqa: E402
    Region,
    check_versions,
    f32_to_bf16,
    far_rows,
    program_order,
)
from triton.runtime.errors import InterpreterError  # noqa: E402

pytestmark = [pytest.mark.kernels, pytest.mark.triton]


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, EXPLICIT: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < n)
    if EXPLICIT:
        x = x.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + cols, x, mask=cols < n)


def cast(x, dtype, explicit=True):
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, y, x.numel(), explicit, BLOCK=triton.next_power_of_2(x.numel()))
    return y


def same_bits(got, want):
    nan = torch.isnan(want)
    ints = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float16: torch.int16}
    bits = ints[want.dtype]
    assert torch.equal(torch.isnan(got), nan)
    return torch.equal(got.view(bits)[~nan], want.view(bits)[~nan])


def all_bf16():
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("explicit", [True, False])
def test_float32_to_bfloat16_rounds_to_nearest_even_everywhere(explicit):
    # Every sign, exponent and kept mantissa, each with dropped halves around the tie.
    high = torch.arange(2**16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] + low).flatten()
    x = (bits - (bits >= 2**31).long() * 2**32).to(torch.int32).view(torch.float32)
    want = x.to(torch.bfloat16)
    assert torch.isinf(want[torch.isfinite(x)]).any() and torch.isnan(want).any()
    assert same_bits(cast(x, torch.bfloat16, explicit), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_bfloat16_widens_exactly(dtype):
    x = all_bf16()
    got, want = cast(x, dtype), x.to(dtype)
    assert torch.equal(torch.nan_to_num(got, 7.0), torch.nan_to_num(want, 7.0))


def test_integers_become_bfloat16():
    x = torch.arange(-4096, 4096, dtype=torch.int32) * 1237
    assert same_bits(cast(x, torch.bfloat16), x.to(torch.bfloat16))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    y = tl.load(y_ptr + cols)
    tl.store(out_ptr + cols, x + y)
    tl.store(out_ptr + n + cols, x - y)
    tl.store(out_ptr + 2 * n + cols, x * y)
    tl.store(out_ptr + 3 * n + cols, -x + 1.5)
    tl.store(out_ptr + 4 * n + cols, tl.where((x < y) & (x != 0.0), x, y))
    tl.store(out_ptr + 5 * n + cols, tl.maximum(tl.abs(x), y))


def test_bfloat16_arithmetic_rounds_after_each_operation():
    n = 1024
    x, y = (torch.randn(n) * 3).bfloat16(), torch.randn(n).bfloat16()
    out = torch.empty(6, n, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, n, BLOCK=n)
    chosen = torch.where((x < y) & (x != 0), x, y)
    want = torch.stack([x + y, x - y, x * y, -x + 1.5, chosen, torch.maximum(x.abs(), y)])
    assert same_bits(out, want)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    a = tl.load(a_ptr + rows * BLOCK + cols)
    b = tl.load(b_ptr + rows * BLOCK + cols)
    tl.store(out_ptr + rows * BLOCK + cols, tl.dot(a, b))


def test_bfloat16_dot_accumulates_in_float32():
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, BLOCK=32)
    want = a.double() @ b.double()
    assert ((out - want).norm() / want.norm()).item() < 1e-6


@triton.jit
def reduce_kernel(x_ptr, out_ptr, SUM: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    if SUM:
        tl.store(out_ptr, tl.sum(x, axis=0))
    else:
        tl.store(out_ptr, tl.max(x, axis=0))


def test_bfloat16_reductions_are_right_or_refused():
    x, out = torch.randn(64).bfloat16(), torch.zeros(1)
    reduce_kernel[(1,)](x, out, SUM=False, BLOCK=64)
    assert out.item() == x.max().item()
    with pytest.raises(InterpreterError, match="cast to float32"):
        reduce_kernel[(1,)](x, out, SUM=True, BLOCK=64)


@triton.jit
def nan_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    tl.store(out_ptr + cols, tl.maximum(x, -1.0))
    tl.store(out_ptr + n + cols, tl.minimum(x, 1.0))
    tl.store(out_ptr + 2 * n + cols, tl.clamp(x, -1.0, 1.0))


def test_maximum_minimum_and_clamp_drop_nan_as_a_gpu_does():
    x, out = torch.tensor([float("nan"), 3.0, -3.0, 0.5]), torch.empty(3, 4)
    nan_kernel[(1,)](x, out, 4, BLOCK=4)
    assert out.tolist() == [[-1, 3, -1, 0.5], [1, 1, -3, 0.5], [-1, 1, -1, 0.5]]


@triton.jit
def copy_rows_kernel(x_ptr, out_ptr, stride_x, stride_out, shift, n, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + cols + shift, mask=cols < n, other=0)
    tl.store(out_ptr + row * stride_out + cols, x, mask=cols < V)


def copy_rows(x, out, shift=0, n=None, block=None):
    width = x.shape[1]
    block = block or triton.next_power_of_2(width)
    copy_rows_kernel[(x.shape[0],)](
        x, out, x.stride(0), out.stride(0), shift, width if n is None else n, width, BLOCK=block
    )


def test_accesses_inside_the_tensors_pass():
    x, out = torch.randn(3, 10), torch.zeros(3, 10)
    copy_rows(x, out)
    assert torch.equal(out, x)
    wide = torch.zeros(3, 25)
    copy_rows(x, wide[:, 5:15])
    assert torch.equal(wide[:, 5:15], x) and wide[:, 15:].eq(0).all()


@pytest.mark.parametrize(
    ("shift", "n", "message"),
    [(0, 16, "6 of 16 lanes.*after the end of `x_ptr`"), (-100, 10, "before `x_ptr`")],
)
def test_a_load_outside_the_launch_is_caught(shift, n, message):
    with pytest.raises(InterpreterError, match=f"load out of bounds in.*{message}"):
        copy_rows(torch.randn(1, 10), torch.zeros(1, 16), shift, n)


def test_a_load_past_a_row_of_a_wider_tensor_is_caught():
    x = torch.randn(3, 16)[:, :10]
    with pytest.raises(InterpreterError, match=r"load.*6 of 16 lanes.*between the elements"):
        copy_rows(x, torch.zeros(3, 10), n=16)


def test_an_offset_from_one_tensor_into_another_is_caught():
    both = torch.randn(2, 16)
    with pytest.raises(InterpreterError, match=r"load.*4 of 16 lanes.*0 bytes after.*`x_ptr`"):
        copy_rows(both[:1], both[1:], shift=4)


def test_a_store_outside_the_launch_is_caught():
    with pytest.raises(InterpreterError, match=r"store out of bounds.*`out_ptr`"):
        copy_rows(torch.randn(2, 10), torch.zeros(1, 10))


@triton.jit
def count_kernel(out_ptr, index):
    tl.atomic_add(out_ptr + index, 1)


def test_an_atomic_outside_the_launch_is_caught():
    out = torch.zeros(4, dtype=torch.int32)
    count_kernel[(5,)](out, 2)
    assert out.tolist() == [0, 0, 5, 0]
    with pytest.raises(InterpreterError, match="atomic out of bounds"):
        count_kernel[(5,)](out, 4)


def test_region_knows_the_elements_of_a_strided_view():
    base = torch.zeros(6, 8, 5)
    view = base[::2, 1:4].transpose(0, 2)
    region = Region.of("view", view)
    inside = {view[i, j, k].data_ptr() for i in range(5) for j in range(3) for k in range(3)}
    every = torch.arange(-8, 6 * 8 * 5 * 4 + 8).numpy() + base.data_ptr()
    assert {int(a) for a in every[region.contains(every, 1)]} == {
        a + byte for a in inside for byte in range(4)
    }
    assert {int(a) for a in every[region.contains(every, 4)]} == inside


@triton.jit
def offset_kernel(x_ptr, out_ptr, stride_x, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out_ptr + row, tl.load(x_ptr + row * stride_x))


@pytest.mark.parametrize("stride", [2**30, 2**31 - 1])
def test_a_32_bit_row_offset_overflows_and_a_64_bit_one_does_not(stride):
    x, out = far_rows(4, 1, stride, torch.int8), torch.zeros(4, dtype=torch.int8)
    x += torch.arange(1, 5, dtype=torch.int8)[:, None]
    offset_kernel[(4,)](x, out, stride, WIDE=True)
    assert out.tolist() == [1, 2, 3, 4]
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation mul"):
        offset_kernel[(4,)](x, out, stride, WIDE=False)


@triton.jit
def assert_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "x is not positive")


def test_device_assert_raises():
    assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(InterpreterError, match="x is not positive"):
        assert_kernel[(1,)](torch.zeros(1))


@triton.jit
def visit_kernel(visits_ptr, last_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    program = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(visits_ptr + program, tl.load(visits_ptr + program) + 1)
    tl.store(last_ptr, program)


def test_program_order_shows_a_last_writer_and_visits_every_program_once():
    lasts = {}
    for order in ("forward", "reverse", "random"):
        visits, last = torch.zeros(24, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with program_order(order, seed=3):
            visit_kernel[(2, 3, 4)](visits, last)
        assert visits.eq(1).all()
        lasts[order] = last.item()
    assert (lasts["forward"], lasts["reverse"]) == (23, 0)
    assert lasts["random"] not in (0, 23)


def test_program_order_rejects_an_unknown_order_and_restores_the_old_one():
    with (
        pytest.raises(ValueError, match="order: expected .* got 'backward'"),
        program_order("backward"),
    ):
        pass
    visits, last = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    visit_kernel[(4, 1, 1)](visits, last)
    assert last.item() == 3


def test_unknown_versions_are_refused():
    for version in ("3.6.0", "3.7.1", "3.8.0", "3.9.0", "3.9.1+git123"):
        check_versions(version, "2.3.5")
    with pytest.raises(RuntimeError, match=r"knows Triton 3\.6.*not 3\.10\.0"):
        check_versions("3.10.0", "2.3.5")
    with pytest.raises(RuntimeError, match=r"numpy < 2\.4"):
        check_versions("3.6.0", "2.4.1")


def test_zero_dimensional_values_round_too():
    assert f32_to_bf16(1.00390625).shape == () and int(f32_to_bf16(1.00390625)) == 0x3F80
