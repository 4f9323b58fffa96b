"""Triton's CPU interpreter, corrected and instrumented, so that a kernel test means something.

As shipped, the interpreter reads and writes any address it is given, wraps 32-bit integers in
silence, runs the programs of a grid in one fixed order and computes on the bit patterns of
bfloat16 as if they were integers. `install()` puts a checking builder in its place:

- bfloat16 is widened to float32 for arithmetic and rounded to nearest, ties to even, after it;
- a load or store outside the elements of the tensor that its pointer came from raises and names
  that tensor. Gaps between the rows of a strided view count as outside, so passing `wide[:, :V]`
  shows a read that runs past the end of a row;
- 32-bit integer overflow and `tl.device_assert` raise;
- `program_order("reverse")` runs the same grid in another order: a kernel whose programs do not
  depend on each other gives the same bits;
- maximum, minimum and clamp treat NaN as a GPU does, on every supported version.

What it cannot show: races inside a program, tf32 and tensor-core rounding, approximate exp and
log, alignment faults, launch limits. `TRITON_INTERPRET=1` must be set before triton is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

# The stock code differs between versions: this shim was read and tested against exactly these, so
# anything else is refused rather than half patched.
SUPPORTED = ((3, 6), (3, 7), (3, 8), (3, 9))


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns (uint16); exact, shape kept."""
    wide = np.asarray(bits).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) of float32 values: nearest, ties to even, NaN to 0x7FC0."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    tie = (bits >> np.uint32(16)) & np.uint32(1)
    # A carry out of the mantissa moves to the next exponent, which is how 3.4e38 becomes inf.
    rounded = ((bits + np.uint32(0x7FFF) + tie) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@dataclasses.dataclass(frozen=True)
class Region:
    """The bytes of one tensor's elements: `base + sum(index_d * stride_d)`, widest stride first."""

    name: str
    base: int
    itemsize: int
    dims: tuple[tuple[int, int], ...]

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Region:
        size = tensor.element_size()
        layout = sorted(
            ((stride * size, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True)),
            reverse=True,
        )
        dims: list[tuple[int, int]] = []
        for stride, n in layout:
            if n == 1 or stride == 0:
                continue
            if dims and dims[-1][0] < stride * n:
                # Rows that overlap (as_strided) have no unique index: fall back to the span.
                span = sum((m - 1) * s for s, m in layout) + size
                return Region(name, tensor.data_ptr(), size, ((size, span // size),))
            if dims and dims[-1][0] == stride * n:
                dims[-1] = (stride, dims[-1][1] * n)
            else:
                dims.append((stride, n))
        return Region(name, tensor.data_ptr(), size, tuple(dims))

    @property
    def end(self) -> int:
        return self.base + self.itemsize + sum((n - 1) * stride for stride, n in self.dims)

    def contains(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which of the accesses of `width` bytes lie wholly inside one element."""
        rest = addresses.astype(np.int64) - self.base
        inside = rest >= 0
        for stride, n in self.dims:
            index, rest = np.divmod(rest, stride)
            inside &= index < n
        return inside & (rest + width <= self.itemsize)


class CheckedBuilder(stock.InterpreterBuilder):
    """The interpreter's operations with bfloat16 arithmetic, bounds checks and program order."""

    regions: tuple[Region, ...] = ()
    order: str = "forward"
    seed: int = 0

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx, ny, nz)
        self._visits = list(range(nx * ny * nz))
        if self.order == "reverse":
            self._visits.reverse()
        elif self.order == "random":
            random.Random(self.seed).shuffle(self._visits)

    def set_grid_idx(self, x, y, z):
        _, ny, nz = self.grid_dim
        rest, z = divmod(self._visits[(x * ny + y) * nz + z], nz)
        super().set_grid_idx(*divmod(rest, ny), z)

    def _origin(self, pointers) -> tuple[Region, ...]:
        """The tensors a pointer was derived from; all of the launch's where that was lost."""
        known = pointers.attr.get("origin")
        if known is None and pointers.data.size:
            start = int(pointers.data.flat[0])
            known = tuple(region for region in self.regions if region.base == start)
        return known or self.regions

    def _check(self, what, pointers, mask, width):
        addresses = np.asarray(pointers.data)
        active = np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)
        addresses = addresses[active]
        regions = self._origin(pointers)
        ok = np.zeros(addresses.shape, dtype=bool)
        for region in regions:
            ok |= region.contains(addresses, width)
        if not ok.all():
            where = _describe(int(addresses[~ok][0]), regions)
            raise IndexError(
                f"{what} out of bounds in {int((~ok).sum())} of {ok.size} lanes of program "
                f"{self.grid_idx}; the first is {where}"
            )

    def create_addptr(self, ptr, offset):
        out = super().create_addptr(ptr, offset)
        out.attr["origin"] = self._origin(ptr)
        return out

    # Shape operations hand on where a pointer came from; their value is the stock one.
    def create_splat(self, ret_ty, arg):
        return _same_origin(super().create_splat(ret_ty, arg), arg)

    def create_broadcast(self, arg, shape):
        return _same_origin(super().create_broadcast(arg, shape), arg)

    def create_expand_dims(self, arg, axis):
        return _same_origin(super().create_expand_dims(arg, axis), arg)

    def create_masked_load(self, ptrs, mask, *rest, **options):
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        self._check("load", ptrs, mask, width)
        return super().create_masked_load(ptrs, mask, *rest, **options)

    def create_masked_store(self, ptrs, value, mask, *rest, **options):
        self._check("store", ptrs, mask, value.data.itemsize)
        return super().create_masked_store(ptrs, value, mask, *rest, **options)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        self._check("atomic", ptr, mask, val.data.itemsize)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        everywhere = stock.TensorHandle(np.ones_like(ptr.data, dtype=bool), tl.int1)
        self._check("atomic", ptr, everywhere, val.data.itemsize)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def get_bf16(self, value):
        return _narrow(self.get_fp32(value))

    def binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs):
            return super().binary_op(lhs, rhs, op)
        out = super().binary_op(_widen(lhs), _widen(rhs), op)
        # A comparison gives booleans, which the stock code labels with the operands' type.
        if out.data.dtype == np.bool_:
            return stock.TensorHandle(out.data, tl.int1)
        return _narrow(out)

    def unary_op(self, arg, op):
        if not _is_bf16(arg):
            return super().unary_op(arg, op)
        return _narrow(super().unary_op(_widen(arg), op))

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        return _narrow(super().create_fma(_widen(x), _widen(y), _widen(z)))

    def create_dot(self, a, b, d, *options):
        return super().create_dot(_widen(a), _widen(b), d, *options)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16:
            return super().cast_impl(_widen(src), dst_type)
        if _is_bf16(src):
            return src
        return _narrow(super().cast_impl(src, tl.float32))

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        nearest = rounding_mode in (None, stock._ir.ROUNDING_MODE.RTNE)
        if not nearest or src.dtype.scalar.is_fp8() or dst_type.scalar.is_fp8():
            raise NotImplementedError("bfloat16 casts to or from fp8, or not rounding to nearest")
        return self.cast_impl(src, dst_type)

    # A GPU drops NaN here unless asked to propagate it; Triton 3.6 and 3.7 interpret otherwise.
    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        drop = propagate_nans == stock._ir.PROPAGATE_NAN.NONE
        low, high = (np.fmax, np.fmin) if drop else (np.maximum, np.minimum)
        return self.binary_op(self.binary_op(arg, lo, low), hi, high)


def _same_origin(out, pointers):
    if "origin" in pointers.attr:
        out.attr["origin"] = pointers.attr["origin"]
    return out


def _describe(address: int, regions: tuple[Region, ...]) -> str:
    """Where an address lies, in bytes from the nearest of the tensors it could belong to."""
    if not regions:
        return "in a launch without tensors"
    near = min(regions, key=lambda r: max(r.base - address, address - r.end + 1, 0))
    if address >= near.end:
        return f"{address - near.end} bytes after the end of `{near.name}`"
    if address < near.base:
        return f"{near.base - address} bytes before `{near.name}`"
    return f"between the elements of `{near.name}`"


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    if not _is_bf16(handle):
        return handle
    return stock.TensorHandle(bf16_to_f32(handle.data), tl.float32)


def _narrow(handle):
    return stock.TensorHandle(f32_to_bf16(handle.data), tl.bfloat16)


class CheckedExecutor(stock.GridExecutor):
    """A launch: notes which memory the kernel may touch, and is as quiet about inf as a GPU."""

    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        stock.interpreter_builder.regions = tuple(
            Region.of(name, tensor)
            for name, value in named
            for tensor in _tensors(value)
            if tensor.numel()
        )
        return args, kwargs

    def __call__(self, *args, **kwargs):
        _patched.clear()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            # Triton 3.6 reads scalars in a way that numpy will drop.
            warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)
            return super().__call__(*args, **kwargs)


def _tensors(value) -> list[torch.Tensor]:
    """The tensors in one kernel argument: itself, in a tuple, or the base of a wrapper."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    base = getattr(value, "base", None)
    return [base] if isinstance(base, torch.Tensor) else []


# Language modules that the current launch has already pointed at the interpreter.
_patched: set[int] = set()


def _patch_lang_once(fn):
    """As stock, which repeats it for every call of a device function: half of a test's time."""
    langs = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
    if langs <= _patched:
        return stock._LangPatchScope()
    _patched.update(langs)
    return _stock_patch_lang(fn)


def _check_reduction(self, inputs):
    _stock_check_tensor(self, inputs)
    if any(tensor.dtype == tl.bfloat16 for tensor in inputs):
        raise NotImplementedError("a bfloat16 reduction or scan: cast to float32 after the load")


_stock_check_tensor = stock.ReduceScanOpInterface.check_tensor
_stock_patch_lang = stock._patch_lang


def check_versions(triton_version: str, numpy_version: str) -> None:
    """Raises RuntimeError for a Triton (or numpy beside it) that this shim was not written for."""
    release = tuple(int(part) for part in triton_version.split("+")[0].split(".")[:2])
    if release not in SUPPORTED:
        known = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise RuntimeError(
            f"the interpreter shim knows Triton {known}, not {triton_version}: read "
            "triton/runtime/interpreter.py of that version, then extend SUPPORTED"
        )
    numpy_release = tuple(int(part) for part in numpy_version.split(".")[:2])
    if release == (3, 6) and numpy_release >= (2, 4):
        raise RuntimeError(f"Triton 3.6 interprets with numpy < 2.4 only, not {numpy_version}")


def install() -> None:
    """Put the checks in place for every later launch of this process; harmless when repeated."""
    check_versions(triton.__version__, np.__version__)
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    # get_bf16 is the one method that older versions lack; every other must replace something.
    ours = {name for name in vars(CheckedBuilder) if name.startswith(("create_", "set_"))}
    missing = ours - set(dir(stock.InterpreterBuilder))
    if missing:
        names = ", ".join(sorted(missing))
        raise RuntimeError(f"Triton {triton.__version__} interprets without {names}")
    builder = stock.interpreter_builder
    # The builder is referenced from several modules, so it changes its class, not its identity.
    builder.__class__ = CheckedBuilder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)
    stock.GridExecutor = CheckedExecutor
    stock._patch_lang = _patch_lang_once
    stock.ReduceScanOpInterface.check_tensor = _check_reduction


@contextlib.contextmanager
def program_order(order: str, seed: int = 0) -> Iterator[None]:
    """Run the programs of every launch inside in `order`: "forward", "reverse" or "random"."""
    if order not in ("forward", "reverse", "random"):
        raise ValueError(f'order: expected "forward", "reverse" or "random", got {order!r}')
    builder = stock.interpreter_builder
    before = builder.order, builder.seed
    builder.order, builder.seed = order, seed
    try:
        yield
    finally:
        builder.order, builder.seed = before


def far_rows(rows: int, width: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    """A zero (rows, width) tensor whose rows lie `stride` elements apart, for int64 offset tests.

    It costs address space, not memory: only the pages of the rows themselves are ever touched.
    """
    elements = (rows - 1) * stride + width
    # MAP_NORESERVE (0x4000 on Linux) keeps small machines from refusing gigabytes of nothing.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, width), (stride, 1))
