"""out = x * factor, of a finished gradient and an upstream factor that only the device knows.

Bytes per element of e bytes: nothing where the factor is exactly 1 and out is x, else reads e and
writes those of out.
"""

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.configs import (
    ENABLE_FP_FUSION,
    SCALE_BLOCK,
    SCALE_PROGRAMS,
    current_target,
    is_aligned,
)
from grpo_fast.kernels.lang import row_pointer


@triton.jit
def store_scaled(x_ptr, out_ptr, factor, left, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """One block, by way of fp32: a loss scale of 65536 is inf in fp16, the product need not be."""
    cols = tl.arange(0, BLOCK)
    mask = cols < left if MASKED else None
    x = tl.load(x_ptr + cols, mask=mask).to(tl.float32)
    tl.store(out_ptr + cols, (x * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows", "T", "V", "stride_b", "stride_t", "stride_out_b", "stride_out_t"],
    do_not_specialize_on_alignment=["factor_ptr"],
)
def scale_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    rows,
    T,
    V,
    stride_b,
    stride_t,
    stride_out_b,
    stride_out_t,
    IN_PLACE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[b, t, :] = x[b, t, :] * factor. A few programs go over all blocks of all rows, so that a
    factor of 1 costs as little as a launch."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if (factor != 1.0) | (not IN_PLACE):
        blocks = tl.cdiv(V, BLOCK).to(tl.int64)
        for i in range(tl.program_id(0).to(tl.int64), rows * blocks, tl.num_programs(0)):
            row = i // blocks
            first = (i % blocks) * BLOCK
            x_start = row_pointer(x_ptr, row, T, stride_b, stride_t, VEC) + first
            out_start = row_pointer(out_ptr, row, T, stride_out_b, stride_out_t, VEC) + first
            left = V - first
            if left >= BLOCK:
                store_scaled(x_start, out_start, factor, left, False, BLOCK)
            else:
                store_scaled(x_start, out_start, factor, left, True, BLOCK)


def scale(x: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
    """out = x * factor in fp32, rounded once; nothing is done where the factor is exactly 1 and out
    is x. The host waits for nothing.

    Args:
        x: fp32, fp16 or bf16, contiguous of any shape, or (B, T, V) or (N, V) with stride 1 over V.
        factor: 0-d floating tensor on the device of x.
        out: shaped like x, x itself or memory of its own, of any of these types.
    """
    if x.numel() == 0:
        return
    if x.is_contiguous() and out.is_contiguous():
        x, out = x.view(1, 1, -1), out.view(1, 1, -1)
        aligned = x.data_ptr() % 16 == out.data_ptr() % 16 == 0
    else:
        if x.dim() == 2:
            x, out = x[None], out[None]
        aligned = is_aligned(x) and is_aligned(out)
    B, T, V = x.shape
    assert V == 1 or x.stride(2) == out.stride(2) == 1
    blocks = B * T * triton.cdiv(V, SCALE_BLOCK)
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(x):
        scale_kernel[(min(blocks, SCALE_PROGRAMS),)](
            x_ptr=x,
            factor_ptr=factor,
            out_ptr=out,
            rows=B * T,
            T=T,
            V=V,
            stride_b=x.stride(0),
            stride_t=x.stride(1),
            stride_out_b=out.stride(0),
            stride_out_t=out.stride(1),
            IN_PLACE=x.data_ptr() == out.data_ptr() and x.dtype == out.dtype,
            VEC=16 // min(x.element_size(), out.element_size()) if aligned else 1,
            BLOCK=SCALE_BLOCK,
            enable_fp_fusion=ENABLE_FP_FUSION,
            num_warps=SCALE_BLOCK // 16 // current_target()[1],
        )
