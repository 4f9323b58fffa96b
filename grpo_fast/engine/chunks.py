"""The chunk loop: rows of hidden states -> logits, one workspace at a time. It exists once,
here."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.checks import fail

from . import gemm
from .backend import Backend
from .parallel import VocabularyShard

# Rows of a GEMM are padded to a multiple of this. MKL switches kernels, and with them the order of
# the sums, at 1, 2, 3, 5, 7 and 9 rows; multiples of 16 gave bit-equal rows for every batch tried.
ROW_MULTIPLE = 16
# On 2 CPU cores the products ran at 75 % of their best rate with 128 rows, at 95 % with 512, which
# are 0.3 GiB of a 152k vocabulary
DEFAULT_WORKSPACE = {"cpu": 384 << 20, "cuda": 1 << 30}
# Rows that the default makes room for. A chunk of 1,024 adds 24 % to the time of the products by
# reading and writing dweight on an H200 at V = 152k, H = 4096 (derived), one of 2,048 12 %.
DEFAULT_ROWS = {"cuda": 2048}
# Below this many rows in a chunk backward goes through the vocabulary instead, at 8NHV: 1,024 rows
# cost 24 % of 6NHV by dweight traffic, 512 would cost 48 %, the eighth product 33 % (derived)
COLUMNS_FIRST = {"cuda": 1024}
# scratch of the torch rows (6 MiB), one upcast weight slice (8 MiB), and what BLAS packs beside
# them: 20 to 30 MiB of RSS that no allocator shows, seen at H = 576 with 570 rows
FIXED_BYTES = 48 << 20


def round_up(n: int) -> int:
    """n to the next multiple of ROW_MULTIPLE."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def chunk_size(budget: int | None, V: int, H: int, itemsize: int, device: str) -> tuple[int, int]:
    """The workspace in bytes, its default where None, and the rows of a chunk it has room for.

    Args:
        itemsize: bytes of a logit, 4 or 8. device: type of the device, "cuda", "cpu" and so on.
    """
    # what rounds a row up to 64 bytes is within FIXED_BYTES
    per_row = itemsize * (V + 3 * H)
    least = FIXED_BYTES + ROW_MULTIPLE * per_row
    if budget is None:
        budget = DEFAULT_WORKSPACE.get(device, 384 << 20)
        budget = max(budget, FIXED_BYTES + DEFAULT_ROWS.get(device, ROW_MULTIPLE) * per_row)
    if not isinstance(budget, int) or budget < least:
        fail("workspace_bytes", f"an integer >= {least} for V = {V}, H = {H}", repr(budget))
    rows = (budget - FIXED_BYTES) // per_row
    step = 64 if rows >= 64 else ROW_MULTIPLE
    return budget, rows // step * step


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """The operand type of the lm_head inside a CUDA autocast region; None elsewhere.

    On CPU there is no mixed-precision product to gain from, so operands keep their precision.
    """
    active = hidden.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if active and hidden.dtype != torch.float64 else None


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Products inside choose their own precision."""
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


class _Kept(threading.local):
    """The buffers of a thread, by device and stream."""

    def __init__(self) -> None:
        self.buffers = _Buffers()
        _THREADS.add(self.buffers)


class _Buffers:
    def __init__(self) -> None:
        self.kept: dict[tuple[torch.device, int], Tensor] = {}


# those of every living thread, so that any thread can give all of them back
_THREADS: weakref.WeakSet[_Buffers] = weakref.WeakSet()
_KEPT = _Kept()


def workspace(like: Tensor, n_bytes: int, limit: int) -> Tensor:
    """n_bytes of memory on the device of like, kept for the next call of this thread and stream.

    On CPU the first touch of 138 MiB costs a tenth of the product that fills them; on an
    accelerator peaks do not depend on the order of calls. What is kept is never above limit.
    """
    device = like.device
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    # a fake tensor or the pool of a graph that is being captured is not for others to use
    if capturing or type(like) not in (Tensor, torch.nn.Parameter):
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if like.is_cuda else 0
    kept = _KEPT.buffers.kept
    buffer = kept.get((device, stream))
    if buffer is None or not n_bytes <= buffer.numel() <= max(limit, n_bytes):
        kept.pop((device, stream), None)
        # the old one goes before the new one comes
        buffer = None
        buffer = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        kept[device, stream] = buffer
    return buffer[:n_bytes]


def release_workspace() -> None:
    """Give back the memory that calls keep for the next ones, those of other threads too.

    A call that is under way in another thread keeps its own until it returns.
    """
    for buffers in list(_THREADS):
        buffers.kept.clear()


class Lora(NamedTuple):
    """An adapter of the lm_head: weight + scale * B @ A."""

    A: Tensor
    """(r, H)."""
    B: Tensor
    """(V, r)."""
    scale: float


class Needs(NamedTuple):
    """Which tensors of a head want a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_A: bool = False
    lora_B: bool = False


@dataclass
class Chunk:
    """One visit of the loop."""

    rows: slice
    """Its place among the listed rows."""
    hidden: Tensor
    """(n, H) hidden states."""
    logits: Tensor
    """(1, n, V) fp32 in the workspace; the caller may overwrite it."""
    place: Tensor | slice
    """The rows of hidden (N, H) these are."""
    transform: dict[str, object]
    """Arguments of the row functions that turn a stored logit into z."""


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
    lora: Lora | None = None
    inv_temperature: Tensor | None = None
    """(N,) fp32, in place of the one temperature."""
    shard: VocabularyShard | None = None
    """Where weight and bias are one rank's rows of the vocabulary."""
    mask: Tensor | None = None
    """(N,) bool: rows that may hold anything where it is False, though they are visited."""
    dtype: torch.dtype = field(init=False)
    """fp32, or fp64 for fp64 inputs: logits, statistics and accumulators."""
    budget: int = field(init=False)
    """Bytes of logits and scratch."""
    chunk_rows: int = field(init=False)
    width: int = field(init=False)
    """H: columns of hidden that are not the adapter's."""
    stored: torch.dtype = field(init=False)
    """Of the weight, outside of autocast."""

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        self.stored = self.weight.dtype
        if self.autocast_dtype is not None:
            self.hidden = self.hidden.to(self.autocast_dtype)
            self.weight = self.weight.to(self.autocast_dtype)
        self.width = self.hidden.shape[1]
        if self.lora is not None:
            self._adapt(self.lora)
        V, H = self.weight.shape
        if self.shard is not None:
            # every rank has to make the same chunks
            V = self.shard.widest
        kind = self.hidden.device.type
        self.budget, rows = chunk_size(self.workspace_bytes, V, H, self.dtype.itemsize, kind)
        self.chunk_rows = min(rows, round_up(max(1, self.hidden.shape[0])))

    def _adapt(self, lora: Lora) -> None:
        """hidden (N, H + r) = [h, s h A^T] and weight (V, H + r) = [W, B]: one product gives the
        logits of W + s B A.

        The copy of the weight costs 2 V H elements of traffic; a second product into the logits
        would read and write N V fp32 ones.
        """
        kind = self.hidden.dtype
        self.lora = lora = Lora(lora.A.to(kind), lora.B.to(kind), lora.scale)
        inner = (self.hidden @ lora.A.t()) * lora.scale
        self.hidden = torch.cat((self.hidden, inner), 1)
        self.weight = torch.cat((self.weight, lora.B), 1)

    def by_columns(self, needs: Needs, n: int) -> bool:
        """Backward of n rows by slices of the vocabulary: with so few rows in a chunk, reading and
        writing an fp32 dweight for each costs an accelerator more than the logits of an extra
        product."""
        few = self.chunk_rows < COLUMNS_FIRST.get(self.hidden.device.type, 0)
        return few and needs.weight and n > self.chunk_rows

    @property
    def narrow(self) -> torch.dtype | None:
        """Type in which the kernels leave dlogits for the tensor cores; None when it stays fp32."""
        low = self.weight.dtype in (torch.float16, torch.bfloat16)
        return self.weight.dtype if low and self.backend.name == "triton" else None

    def transform(self, place: Tensor | slice) -> dict[str, object]:
        """Arguments of the row functions for some rows of hidden."""
        inverse = 1.0 / self.temperature
        if self.inv_temperature is not None:
            inverse = self.inv_temperature[place].to(self.dtype)
        return {"inv_temperature": inverse, "scale": self.logit_scale, "softcap": self.softcap}

    def scratch(self, n_bytes: int) -> Tensor:
        """n_bytes of the workspace."""
        return workspace(self.hidden, n_bytes, self.budget - FIXED_BYTES)

    def logits_buffer(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) of the workspace, whose rows begin at multiples of 64 bytes: elsewhere
        the kernels load single logits, and a product writes them slower."""
        stride = round_up(columns)
        flat = self.scratch(rows * stride * self.dtype.itemsize).view(self.dtype)
        return flat.view(rows, stride)[:, :columns]

    def gather(self, index: Tensor | None, start: int, stop: int) -> tuple[Tensor, Tensor | slice]:
        """Hidden states (m, H) of the listed rows start to stop, m padded with zeros to a multiple
        of ROW_MULTIPLE, and the rows of hidden that they are."""
        k = stop - start
        padded = round_up(k)
        place = slice(start, stop) if index is None else index[start:stop]
        if index is None and k == padded and self.mask is None:
            return self.hidden[place], place
        hidden = self.hidden.new_zeros(padded, self.hidden.shape[1])
        hidden[:k] = self.hidden[place]
        if self.mask is not None:
            hidden[:k].masked_fill_(~self.mask[place][:, None], 0.0)
        return hidden, place

    def chunks(
        self, index: Tensor | None, n: int, cuts: list[int] | None = None
    ) -> Iterator[Chunk]:
        """Logits of the n rows listed by index (None: rows 0 to n), a workspace at a time.

        cuts: where chunks end, each at most chunk_rows from the last; None: every chunk_rows.
        """
        if n == 0:
            return
        V = self.weight.shape[0]
        # chunks of one size: 16 rows that are left over cost a visit to the whole weight
        size = min(self.chunk_rows, round_up(-(-n // -(-n // self.chunk_rows))))
        buffer = self.logits_buffer(min(self.chunk_rows, round_up(n)) if cuts else size, V)
        start = 0
        for stop in cuts or [*range(size, n, size), n]:
            k = stop - start
            hidden, place = self.gather(index, start, stop)
            gemm.project(hidden, self.weight, self.bias, buffer[: hidden.shape[0]])
            rows = slice(start, stop)
            yield Chunk(rows, hidden[:k], buffer[None, :k], place, self.transform(place))
            start = stop

    def gradient_view(self, logits: Tensor) -> Tensor:
        """Where a row kernel leaves dlogits: over the logits, in their bytes as the narrow type if
        any."""
        if self.narrow is None:
            return logits
        return logits.view(self.narrow)[..., : logits.shape[-1]]
