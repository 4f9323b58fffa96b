"""Other libraries' kernels as their own functions launch them: what ours are compared with.

Their functions run on a few rows; the launches are caught, so that the tensors hold nothing. One
that is not installed or does not run here is listed with its reason.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from .launches import WIDE, Case

ROWS = 4
# Whole tiles of cut-cross-entropy's kernels, so that logits per thread come out right.
CCE_ROWS, CCE_COLUMNS = 1024, 4096
# Kernels that read a column or an element of a row and no row of logits.
NO_LOGITS = {"_indexed_neg_dot_forward_kernel", "element_mul_kernel"}
_BF16, _F32 = torch.bfloat16, torch.float32


def _liger_grpo(dtype: torch.dtype) -> None:
    grpo = importlib.import_module("liger_kernel.transformers.grpo_loss")
    logits = torch.zeros(1, ROWS + 1, WIDE, dtype=dtype, requires_grad=True)
    ids = torch.zeros(1, ROWS, dtype=torch.int64)
    vector = torch.zeros(1, ROWS)
    loss = grpo.triton_grpo_loss(
        logits, vector, vector, ids, torch.zeros(1), vector, temperature=0.7, reduce=True
    )[0]
    loss.backward()


def _liger_cross_entropy(dtype: torch.dtype) -> None:
    ce = importlib.import_module("liger_kernel.ops.cross_entropy")
    logits = torch.zeros(ROWS, WIDE, dtype=dtype, requires_grad=True)
    ids = torch.zeros(ROWS, dtype=torch.int64)
    ce.LigerCrossEntropyFunction.apply(logits, ids, None)


def _trl_logits(dtype: torch.dtype, entropy: bool) -> None:
    trl = importlib.import_module("trl.kernels.logprob_entropy")
    logits = torch.zeros(ROWS, WIDE, dtype=dtype, requires_grad=True)
    logp, spread = trl.selective_log_softmax_and_entropy(
        logits, torch.zeros(ROWS, dtype=torch.int64), 0.7
    )
    (logp + spread if entropy else logp).sum().backward()


def _trl_chunked(dtype: torch.dtype, entropy: bool) -> None:
    chunked = importlib.import_module("trl.kernels.chunked_logprob")
    # the width of one chunk, and a head that costs nothing
    hidden = torch.zeros(ROWS, 16, dtype=dtype, requires_grad=True)
    weight = torch.zeros(chunked_width(), 16, dtype=dtype, requires_grad=True)
    ids = torch.zeros(ROWS, dtype=torch.int64)
    outputs = ("entropy",) if entropy else ()
    with mock.patch.object(chunked, "_use_triton", lambda device: True):
        logp, spread, *_ = chunked.ChunkedLogProbFunction.apply(
            hidden, weight, None, ids, 0.7, chunked_width(), None, 1.0, outputs
        )
        (logp + spread if entropy else logp).sum().backward()


def chunked_width() -> int:
    """Columns of a chunk of TRL's chunked log-probs."""
    return 32768


def _flash(dtype: torch.dtype) -> None:
    logits = torch.zeros(ROWS, WIDE, dtype=dtype, requires_grad=True)
    ids = torch.zeros(ROWS, dtype=torch.int64)
    # it asks for the index of a device, which the CPU has not
    with mock.patch.object(torch.cuda, "device", lambda index: contextlib.nullcontext()):
        losses, _ = _flash_module().cross_entropy_loss(
            logits, ids, logit_scale=1.0 / 0.7, inplace_backward=True
        )
        losses.sum().backward()


def _flash_module() -> ModuleType:
    """The file itself: the package imports its CUDA extension, which is not built here."""
    package = importlib.util.find_spec("flash_attn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'flash_attn'")
    path = Path(package.origin).parent / "ops" / "triton" / "cross_entropy.py"
    spec = importlib.util.spec_from_file_location("flash_cross_entropy", path)
    module = importlib.util.module_from_spec(spec)
    # Triton looks a kernel's module up by its name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _cut_cross_entropy(dtype: torch.dtype) -> None:
    cce = importlib.import_module("cut_cross_entropy")
    hidden = torch.zeros(CCE_ROWS, 64, dtype=dtype, requires_grad=True)
    weight = torch.zeros(CCE_COLUMNS, 64, dtype=dtype, requires_grad=True)
    ids = torch.zeros(CCE_ROWS, dtype=torch.int64)
    cce.linear_cross_entropy(hidden, weight, ids).backward()


# contestant, what is called, dtype, options, columns, the call
_TABLE: tuple[tuple[str, str, torch.dtype, str, int, Callable[[], None]], ...] = (
    ("Liger", "triton_grpo_loss", _BF16, "", WIDE, lambda: _liger_grpo(_BF16)),
    ("Liger", "triton_grpo_loss", _F32, "", WIDE, lambda: _liger_grpo(_F32)),
    ("Liger", "cross_entropy", _BF16, "", WIDE, lambda: _liger_cross_entropy(_BF16)),
    ("Liger", "cross_entropy", _F32, "", WIDE, lambda: _liger_cross_entropy(_F32)),
    ("TRL", "logprob_entropy", _BF16, "", WIDE, lambda: _trl_logits(_BF16, False)),
    ("TRL", "logprob_entropy", _BF16, "dentropy", WIDE, lambda: _trl_logits(_BF16, True)),
    ("TRL", "chunked_logprob", _BF16, "", chunked_width(), lambda: _trl_chunked(_BF16, False)),
    (
        "TRL",
        "chunked_logprob",
        _BF16,
        "dentropy",
        chunked_width(),
        lambda: _trl_chunked(_BF16, True),
    ),
    ("flash-attn", "cross_entropy", _BF16, "", WIDE, lambda: _flash(_BF16)),
    ("flash-attn", "cross_entropy", _F32, "", WIDE, lambda: _flash(_F32)),
    (
        "CCE",
        "linear_cross_entropy",
        _BF16,
        "",
        CCE_COLUMNS,
        lambda: _cut_cross_entropy(_BF16),
    ),
)


def cases() -> Iterator[Case]:
    """All of theirs."""
    for contestant, kernel, dtype, options, V, launch in _TABLE:
        rows = CCE_ROWS if contestant == "CCE" else ROWS
        yield Case(contestant, kernel, V, dtype, dtype, options, launch, rows)
