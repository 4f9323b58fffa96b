"""Every shipped launch compiles for every GPU we name, without spills and within its memory.

Runs without a GPU and without the interpreter; the toy kernels below show that each measure works.
"""

import functools
import os
import re

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, so needs TRITON_INTERPRET unset", allow_module_level=True)

import torch

triton = pytest.importorskip("triton")
import aot  # noqa: E402
import aot_cases  # noqa: E402
import triton.language as tl  # noqa: E402
from aot_cases import CASES, FEW_ROWS  # noqa: E402

from grpo_fast.kernels import configs  # noqa: E402
from grpo_fast.objective import objectives  # noqa: E402
from grpo_fast.presets import KL_ESTIMATORS, OBJECTIVES  # noqa: E402

# Scalars of a row: id, mask, target logit, temperature, old, reference and rollout log-prob,
# advantage and weight, or statistics and upstream gradients, and the two loops over a far row. A
# loop that lost its vectorisation adds 8 or more to at least 3, and its masked twin as many.
SCALAR_LOADS = 12


@functools.cache
def compiled(case: str, target: str) -> aot.Compiled:
    return aot.compile_launch(CASES[case], target, case)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_shipped_launch_fits(case, target):
    result = compiled(case, target)
    assert result.spill == 0
    assert result.shared <= aot.TARGETS[target].shared_limit
    assert result.narrow_offsets == []


@pytest.mark.parametrize("case", CASES)
def test_backward_rounds_a_logit_as_forward_does(case):
    # Fusion turns `logit * inv_temperature - max` into one rounding in backward, two in forward.
    assert not compiled(case, "sm_90").fp_fusion


@pytest.mark.parametrize("case", [case for case in CASES if "V=151936" in case])
def test_aligned_rows_are_read_128_bits_at_a_time(case):
    assert compiled(case, "sm_90").narrow_loads <= SCALAR_LOADS


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(
    ("forward", "policy"),
    [
        ("fwd bf16 V=151936", "policy bf16 V=151936 on-policy"),
        ("fwd bf16 V=50257 full", "policy bf16 V=50257 full"),
        ("fwd f32 V=151936 full", "policy f32 V=151936 full"),
        ("fwd f32 V=151936 full", "policy f32 V=151936 full, bf16 out"),
        ("fwd f32 V=151936 full", "policy f32 V=151936 full, no gradient"),
        ("fwd f16 V=500", "policy f16 V=500 cispo full"),
        ("fwd f32 V=151936 full, by row", "policy f32 V=151936 vespo full, extras"),
    ],
)
def test_one_pass_and_two_pass_routes_sum_a_row_in_the_same_order(forward, policy, target):
    # Otherwise the ratio of equal weights would not be exactly 1.
    layouts = compiled(forward, target).reductions
    assert len(layouts) > 2 and layouts == compiled(policy, target).reductions


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", FEW_ROWS)
def test_few_rows_fit_and_are_summed_in_the_same_order(case, target):
    """What the programs of the segments and that of the row sum, one program does alike."""
    results = aot.compile_launches(FEW_ROWS[case], target, case)
    for result in results:
        assert result.spill == 0 and result.narrow_offsets == []
    parts, row, *gradient = results
    assert parts.kernel == "row_parts_kernel"
    assert [r.kernel for r in gradient] == ["logprob_bwd_kernel"] * ("extras" in case)
    full = "full" in case
    dtype = torch.float32 if "f32" in case else torch.bfloat16
    V = int(re.search(r"V=(\d+)", case)[1])
    alone = aot.compile_launch(lambda: aot_cases.forward(dtype, V, full=full), target)
    assert parts.reductions | row.reductions == alone.reductions


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("name", configs.CANDIDATES)
def test_candidates_of_the_launch_table_fit(name, target, monkeypatch):
    """Among them those whose rows in flight stay in L2: the loads that say so are as wide."""
    for field, value in configs.CANDIDATES[name].items():
        assert value != getattr(configs, field)
        monkeypatch.setattr(configs, field, value)
    result = aot.compile_launch(CASES["policy bf16 V=151936 on-policy"], target)
    threads = configs.CANDIDATES[name]["WIDE_THREADS"]
    assert result.spill == 0 and result.num_warps == threads // 32
    # as many rows of 64 registers as the name says
    assert 65536 // (64 * threads) == {"one": 1, "two": 2}[name.split()[0]]
    assert result.registers <= 64 and result.narrow_loads <= SCALAR_LOADS


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_fits(objective, target):
    i = list(OBJECTIVES).index(objective)
    names = [KL_ESTIMATORS[(i + k) % len(KL_ESTIMATORS)] for k in range(2)]
    kl, kl_gradient = (getattr(objectives, name) for name in names)
    options = {"objective": objective, "kl": kl, "kl_gradient": kl_gradient}
    result = aot.compile_launch(
        lambda: aot_cases.policy(torch.float16, 500, full=True, extras=True, **options), target
    )
    assert result.spill == 0


@triton.jit
def offset_kernel(x_ptr, stride, n, WIDE: tl.constexpr, HOW: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    if HOW == "direct":
        tl.store(x_ptr + row * stride, 1.0)
    elif HOW == "block":
        cols = tl.arange(0, 128)
        tl.store(x_ptr + (row * stride + cols), 1.0, mask=cols < n)
    elif HOW == "loop":
        offset = row * 0
        for i in range(n):
            tl.store(x_ptr + offset, 1.0)
            offset += (row + i) * stride
    else:
        offset = row
        if n > 7:
            offset = (row + n) * stride
        tl.store(x_ptr + offset, 1.0)


@pytest.mark.parametrize("how", ["direct", "block", "loop", "branch"])
def test_lint_finds_a_32_bit_row_offset_and_accepts_a_64_bit_one(how):
    def launch(wide):
        offset_kernel[(4,)](torch.zeros(8), 3, 5, WIDE=wide, HOW=how)

    (found,) = aot.compile_launch(lambda: launch(False), "sm_90").narrow_offsets
    assert "arith.muli" in found
    assert aot.compile_launch(lambda: launch(True), "sm_90").narrow_offsets == []


@triton.jit
def greedy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols)
    tl.store(y_ptr + cols, x - tl.sum(x, 0))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spills_and_wide_loads_are_seen(target):
    def launch(block):
        x = torch.zeros(block)
        greedy_kernel[(1,)](x, x, BLOCK=block, num_warps=1)

    small = aot.compile_launch(lambda: launch(1024), target)
    assert small.spill == 0 and small.narrow_loads == 0
    assert aot.compile_launch(lambda: launch(32768), target).spill > 100


@triton.jit
def dot_kernel(x_ptr, y_ptr, steps, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(steps):
        x = tl.load(x_ptr + rows * BLOCK + cols)
        acc = tl.dot(x, x, acc)
        x_ptr += BLOCK * BLOCK
    tl.store(y_ptr + rows * BLOCK + cols, acc)


def test_shared_memory_is_seen():
    x = torch.zeros(128, 128, dtype=torch.bfloat16)
    result = aot.compile_launch(
        lambda: dot_kernel[(1,)](x, torch.zeros(128, 128), 9, BLOCK=128, num_warps=8), "sm_90"
    )
    assert result.shared >= 128 * 128 * 2


def test_nothing_is_launched_and_the_driver_is_restored():
    before = triton.runtime.driver._active
    x = torch.zeros(16)
    with aot.compiling_for(aot.TARGETS["sm_80"].gpu) as kernels:
        greedy_kernel[(1,)](x, x, BLOCK=16)
    assert len(kernels) == 1 and x.eq(0).all()
    assert triton.runtime.driver._active is before


def test_the_gpu_benchmarks_launch_nothing_that_is_not_compiled_here():
    """Every vocabulary of the set gives the kernels of V = 151936, which the cases above cover."""
    from benchmarks.cases import CASES as BENCHMARKS

    sizes = {case.V for cases in BENCHMARKS["gpu"].values() for case in cases}
    assert len(sizes) > 4
    with aot.compiling_for(aot.TARGETS["sm_90"].gpu) as kernels:
        for V in sorted(sizes):
            for dtype, out in ((torch.float32, torch.bfloat16), (torch.bfloat16, None)):
                for full in (False, True):
                    aot_cases.policy(dtype, V, full=full, out=out)
                    aot_cases.policy(dtype, V, full=full, gradient=False)
            aot_cases.forward(torch.float32, V, full=False)
            aot_cases.backward(torch.float32, V, full=False, out=torch.bfloat16)
    assert len({kernel.hash for kernel in kernels}) == len(kernels) / len(sizes)


@pytest.mark.parametrize("rows", [(1, 3, 16, 263), (264, 512, 1000, 2048)], ids=["few", "many"])
@pytest.mark.parametrize("operation", ["forward", "backward", "policy"])
@pytest.mark.parametrize("by_row", [False, True])
def test_no_length_alignment_or_number_compiles_again(operation, by_row, rows):
    """Chunks of any rows, slices that start anywhere, other temperatures: the same kernels. Few
    rows are shared between programs: a kernel for the parts of a row, and a gradient by itself."""
    starts, numbers = (0, 1, 4, 16), (1.0, 0.0, 0.7, 2.0)
    with aot.compiling_for(aot.TARGETS["sm_90"].gpu) as kernels:
        for n, start, number in zip(rows, starts, numbers, strict=True):
            aot_cases.launch_rows(operation, n, start, number, by_row=by_row)
    few = {"forward": 2, "backward": 1, "policy": 3}
    launches = few[operation] if rows[0] == 1 else 1
    assert len(kernels) == 4 * launches
    assert len({kernel.hash for kernel in kernels}) == launches
