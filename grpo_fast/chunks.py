"""The chunk loop: rows of hidden states -> logits, one workspace at a time. It exists once,
here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import gemm
from .backend import Backend
from .inputs import fail
from .parallel import VocabularyShard

# Rows of a GEMM are padded to a multiple of this. MKL switches kernels, and with them the order of
# the sums, at 1, 2, 3, 5, 7 and 9 rows; multiples of 16 gave bit-equal rows for every batch tried.
ROW_MULTIPLE = 16
# 1,024 rows of a 152k vocabulary are 0.6 GiB in fp32; under 1,024 rows dweight traffic outweighs
# the GEMMs. On 2 CPU cores the products ran at 75 % of their best rate with 128 rows, at 95 % with
# 512
DEFAULT_WORKSPACE = {"cpu": 384 << 20, "cuda": 1 << 30}
# scratch of the torch rows (6 MiB), one upcast weight slice (8 MiB), and what BLAS packs beside
# them: 20 to 30 MiB of RSS that no allocator shows, seen at H = 576 with 570 rows
FIXED_BYTES = 48 << 20


def round_up(n: int) -> int:
    """n to the next multiple of ROW_MULTIPLE."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """The operand type of the lm_head inside a CUDA autocast region; None elsewhere.

    On CPU there is no mixed-precision product to gain from, so operands keep their precision.
    """
    active = hidden.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if active and hidden.dtype != torch.float64 else None


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Products inside choose their own precision."""
    with torch.autocast(device.type, enabled=False):
        yield


@dataclass
class Chunk:
    """One visit of the loop."""

    rows: slice
    """Its place among the listed rows."""
    hidden: Tensor
    """(n, H) hidden states."""
    logits: Tensor
    """(1, n, V) fp32 in the workspace; the caller may overwrite it."""


@dataclass
class LinearHead:
    """hidden (N, H) and the lm_head of one call, with the workspace its logits live in."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    backend: Backend
    workspace_bytes: int | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    autocast_dtype: torch.dtype | None = None
    """From `autocast_dtype`: what the operands of the products are cast to; gradients stay fp32."""
    shard: VocabularyShard | None = None
    """Where weight and bias are one rank's rows of the vocabulary."""
    dtype: torch.dtype = field(init=False)
    """fp32, or fp64 for fp64 inputs: logits, statistics and accumulators."""
    chunk_rows: int = field(init=False)
    buffer: Tensor | None = field(init=False, default=None)
    """(chunk_rows, V) logits of the chunk that is being worked on."""

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        if self.autocast_dtype is not None:
            self.hidden = self.hidden.to(self.autocast_dtype)
            self.weight = self.weight.to(self.autocast_dtype)
        V, H = self.weight.shape
        if self.shard is not None:
            # every rank has to make the same chunks
            V = self.shard.widest
        budget = self.workspace_bytes
        if budget is None:
            budget = DEFAULT_WORKSPACE.get(self.hidden.device.type, 384 << 20)
        width = self.dtype.itemsize
        per_row = width * (V + 3 * H)
        least = FIXED_BYTES + ROW_MULTIPLE * per_row
        if not isinstance(budget, int) or budget < least:
            fail("workspace_bytes", f"an integer >= {least} for V = {V}, H = {H}", repr(budget))
        rows = (budget - FIXED_BYTES) // per_row
        step = 64 if rows >= 64 else ROW_MULTIPLE
        self.chunk_rows = min(rows // step * step, round_up(max(1, self.hidden.shape[0])))

    @property
    def transform(self) -> dict[str, float | None]:
        """Arguments of the row functions that turn a stored logit into z."""
        return {
            "inv_temperature": 1.0 / self.temperature,
            "scale": self.logit_scale,
            "softcap": self.softcap,
        }

    @property
    def narrow(self) -> torch.dtype | None:
        """Type in which the kernels leave dlogits for the tensor cores; None when it stays fp32."""
        low = self.weight.dtype in (torch.float16, torch.bfloat16)
        return self.weight.dtype if low and self.backend.name == "triton" else None

    def chunks(self, index: Tensor | None, n: int) -> Iterator[Chunk]:
        """Logits of the n rows listed by index (None: rows 0 to n), a workspace at a time."""
        if n == 0:
            return
        V, H = self.weight.shape
        size = min(self.chunk_rows, round_up(n))
        # one for all passes over the rows: on CPU the first touch of 138 MiB costs as much as a
        # tenth of the product that fills it
        if self.buffer is None or self.buffer.shape[0] < size:
            self.buffer = None
            self.buffer = torch.empty(size, V, dtype=self.dtype, device=self.hidden.device)
        buffer = self.buffer
        for start in range(0, n, size):
            k = min(size, n - start)
            padded = round_up(k)
            if index is None and k == padded:
                hidden = self.hidden[start : start + k]
            else:
                hidden = self.hidden.new_zeros(padded, H)
                part = slice(start, start + k)
                hidden[:k] = self.hidden[part] if index is None else self.hidden[index[part]]
            gemm.project(hidden, self.weight, self.bias, buffer[:padded])
            yield Chunk(slice(start, start + k), hidden[:k], buffer[None, :k])

    def gradient_view(self, logits: Tensor) -> Tensor:
        """Where a row kernel leaves dlogits: over the logits, in their bytes as the narrow type if
        any."""
        if self.narrow is None:
            return logits
        return logits.view(self.narrow)[..., : self.weight.shape[0]]


@dataclass
class HeadGradients:
    """fp32 accumulators of dhidden, dweight and dbias; one downcast each, at the end."""

    head: LinearHead
    needs: tuple[bool, bool, bool]
    scale: Tensor | None = None
    """Power of two by which the upstream gradient was multiplied to survive fp16, 0-d; None for
    1."""
    dhidden: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    empty: bool = True
    """No chunk was added so far, and dweight holds whatever its memory held."""

    def __post_init__(self) -> None:
        head, dtype = self.head, self.head.dtype
        if self.needs[0]:
            # fp32 until the upstream scalar (a loss scale, say) has been applied: 1 / tokens times
            # a probability is below fp16's smallest number
            self.dhidden = torch.zeros(head.hidden.shape, dtype=dtype, device=head.hidden.device)
        if self.needs[1]:
            # fp32 (V, H) whatever the weight is stored in: summed over chunks, downcast once by the
            # caller
            self.dweight = torch.empty_like(
                head.weight, dtype=dtype, memory_format=torch.contiguous_format
            )
        if self.needs[2]:
            self.dbias = torch.zeros(head.weight.shape[0], dtype=dtype, device=head.hidden.device)

    def add(self, chunk: Chunk, dlogits: Tensor, index: Tensor | None) -> None:
        """Add the products of one chunk: dlogits (1, n, V) in the memory of its logits."""
        dlogits = dlogits[0]
        if self.dhidden is not None:
            # rows are written once, by one full-width product each
            if index is None:
                out = self.dhidden[chunk.rows]
            else:
                out = self.dhidden.new_empty(chunk.hidden.shape)
            gemm.input_gradient(dlogits, self.head.weight, out)
            if self.scale is not None:
                out.div_(self.scale)
            if index is not None:
                self.dhidden[index[chunk.rows]] = out
        if self.dweight is not None:
            gemm.weight_gradient(dlogits, chunk.hidden, self.dweight, first=self.empty)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.head.dtype)
        self.empty = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden, dweight and dbias in fp32, with the scale taken out."""
        if self.empty and self.dweight is not None:
            self.dweight.zero_()
        if self.scale is not None:
            for grad in (self.dweight, self.dbias):
                if grad is not None:
                    grad.div_(self.scale)
        if self.head.shard is not None and self.dhidden is not None:
            self.head.shard.reduce(self.dhidden)
        return self.dhidden, self.dweight, self.dbias


def fp16_scale(dtype: torch.dtype | None, upstream: Tensor) -> Tensor | None:
    """Power of two that lifts the largest |upstream| near 1, for fp16 dlogits; None for other
    types.

    A token's gradient is near 1 / tokens: times a probability it falls below fp16's 6e-8.
    """
    if dtype != torch.float16 or upstream.numel() == 0:
        return None
    peak = upstream.abs().amax()
    usable = torch.isfinite(peak) & (peak > 0)
    return torch.exp2(-torch.floor(torch.log2(torch.where(usable, peak, torch.ones_like(peak)))))
