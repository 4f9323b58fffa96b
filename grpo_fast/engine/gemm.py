"""The three matrix products of the lm_head, with fp32 results whatever the operands are stored in.

fp32 (and fp64) operands use `torch.mm` as it is. bf16 and fp16 operands on CUDA go to the tensor
cores with fp32 output, `out_dtype`; elsewhere they are upcast a slice of the vocabulary at a time,
which gives the same numbers (a product of two bf16 numbers is exact in fp32).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# fp32 bytes of the weight slice that is upcast at a time where there is no mixed-precision GEMM
SLICE_BYTES = 8 << 20


def _slices(weight: Tensor) -> Iterator[slice]:
    step = max(1, SLICE_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _mixed(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """True when the GEMM itself can take these operands to this output."""
    # ROCm builds below torch 2.10 refuse out_dtype for bf16 operands
    cuda = a.is_cuda and torch.version.hip is None
    return cuda and a.dtype == b.dtype and a.dtype != out.dtype


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (n, V) = hidden (n, H) @ weight.T (H, V) + bias (V,); out is fp32 or fp64."""
    if hidden.dtype == weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif _mixed(hidden, weight, out):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        upcast = hidden.to(out.dtype)
        for part in _slices(weight):
            torch.mm(upcast, weight[part].to(out.dtype).t(), out=out[:, part])
    if bias is not None:
        out.add_(bias)


def input_gradient(dlogits: Tensor, weight: Tensor, out: Tensor, *, first: bool = True) -> None:
    """out (n, H) = dlogits (n, V) @ weight (V, H); out is fp32 or fp64. first=False adds to it."""
    if dlogits.dtype == weight.dtype == out.dtype:
        torch.mm(dlogits, weight, out=out) if first else out.addmm_(dlogits, weight)
    elif _mixed(dlogits, weight, out):
        if first:
            torch.mm(dlogits, weight, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, dlogits, weight, out_dtype=out.dtype, out=out)
    else:
        if first:
            out.zero_()
        for part in _slices(weight):
            out.addmm_(dlogits[:, part].to(out.dtype), weight[part].to(out.dtype))


def weight_gradient(dlogits: Tensor, hidden: Tensor, out: Tensor, *, first: bool) -> None:
    """out (V, H) += dlogits.T (V, n) @ hidden (n, H); out is the fp32 (or fp64) accumulator.

    first: out holds nothing yet and is written without being read, which saves two passes over it.
    Then it may be narrow, as the operands are: fp32 sums, rounded once.
    """
    if out.dtype.itemsize == 2:
        assert first and dlogits.dtype == hidden.dtype == out.dtype
        _rounded(dlogits, hidden, out)
    elif dlogits.dtype == hidden.dtype == out.dtype:
        torch.mm(dlogits.t(), hidden, out=out) if first else out.addmm_(dlogits.t(), hidden)
    elif _mixed(dlogits, hidden, out):
        if first:
            torch.mm(dlogits.t(), hidden, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, dlogits.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        upcast = hidden.to(out.dtype)
        for part in _slices(out):
            left = dlogits[:, part].to(out.dtype).t()
            torch.mm(left, upcast, out=out[part]) if first else out[part].addmm_(left, upcast)


def _rounded(dlogits: Tensor, hidden: Tensor, out: Tensor) -> None:
    """out (V, H) = dlogits.T @ hidden, all of them bf16 or fp16, summed in fp32."""
    if out.is_cuda:
        with _whole_sums():
            torch.mm(dlogits.t(), hidden, out=out)
        return
    upcast = hidden.float()
    for part in _slices(out):
        out[part] = torch.mm(dlogits[:, part].float().t(), upcast)


@contextmanager
def _whole_sums() -> Iterator[None]:
    """Inside, a product that is split along its sum adds the parts in fp32; torch lets cuBLAS round
    each to the type of the result."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
