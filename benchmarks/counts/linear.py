"""The linear path's time beside its floor, from named parameters: hidden states (N, H) and the
head (V, H), one pass, trainable head, bf16 with fp32 logits.

    floor = 6 N H V / rate; time = products + traffic that no product hides

Traffic that a product's epilogue may hide gives a range: hidden all, hidden none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grpo_fast.engine.chunks import chunk_size, round_up
from grpo_fast.engine.held import held_rows

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Rates:
    """What the machine does; an H200 by default."""

    flops: float = 788e12
    """Of bf16 products, per second."""
    copy: float = 4.3e12
    """Bytes per second, read and written."""
    launch: float = 5e-6
    """Seconds of a launch that nothing hides."""
    sync: float = 30e-6
    """Seconds of one wait of the host."""


@dataclass(frozen=True)
class Shape:
    """One call."""

    N: int = 8192
    H: int = 4096
    V: int = 151936


@dataclass(frozen=True)
class Design:
    """What the engine does; the defaults are what it does today."""

    name: str = "today"
    chunk_rows: int | None = None
    """None: what `grpo_fast.engine.chunks.chunk_size` gives by default on a GPU."""
    equal_chunks: bool = True
    """Chunks of one size, in place of full ones and a rest."""
    one_product: bool = True
    """dlogits of `engine.held.held_rows` wait in a narrow buffer, and from them comes dW in one
    product, in place of an fp32 dW that every chunk adds to. dX is a product of every chunk."""
    scale_and_cast: bool = True
    """The upstream factor and the rounding of an fp32 gradient in one kernel, none at all where
    the gradient is narrow and the factor 1."""
    one_visit: bool = False
    """Rows are read once: statistics and the narrow exponentials in one visit."""


TODAY = Design()
_BEFORE = {"one_product": False, "equal_chunks": False}
DESIGNS = (
    Design("as it was: fp32 dW, two passes to finish it", scale_and_cast=False, **_BEFORE),
    Design("fp32 dW, scaled and cast at once", **_BEFORE),
    TODAY,
    Design("today, and one visit to a row", one_visit=True),
)


@dataclass(frozen=True)
class Term:
    """A line of the sum, in seconds."""

    what: str
    formula: str
    least: float
    most: float
    """Where no product hides it."""


def chunks(shape: Shape, design: Design) -> list[int]:
    """Rows of each chunk."""
    rows = design.chunk_rows or chunk_size(None, shape.V, shape.H, FP32, "cuda")[1]
    count = -(-shape.N // rows)
    if design.equal_chunks:
        rows = min(rows, round_up(-(-shape.N // count)))
    full, rest = divmod(shape.N, rows)
    return [rows] * full + ([rest] if rest else [])


def _product(rows: int, shape: Shape, rates: Rates, traffic: float) -> float:
    """Seconds of 2 rows H V FLOPs; few rows wait for the head's bytes instead."""
    return max(2 * rows * shape.H * shape.V / rates.flops, traffic / rates.copy)


def terms(shape: Shape, design: Design, rates: Rates) -> Iterator[Term]:
    """Every line of the sum, in the order in which the engine works."""
    N, H, V = shape.N, shape.H, shape.V
    parts = chunks(shape, design)
    groups = _groups(shape, design, parts)
    head = V * H * BF16
    # what an accumulating product of few rows reads and writes of the fp32 dW
    fp32_dw = V * H * FP32
    products = sum(_product(n, shape, rates, head) for n in parts)
    both = parts if not design.one_product else groups
    products += sum(_product(n, shape, rates, head) for n in parts)
    products += sum(_product(n, shape, rates, 0.0) for n in both)
    yield Term("products", "6 N H V / rate, or the head's bytes", products, products)
    yield _moved("fp32 logits written by the product", "4 N V", N * V * FP32, rates, hidden=True)
    row, formula = (FP32 + BF16, "4 + 2") if design.one_visit else (2 * FP32 + BF16, "4 + 4 + 2")
    yield _moved("row kernel", f"({formula}) N V", row * N * V, rates)
    visits = 2 * len(both) - 1
    if design.one_product and len(groups) == 1:
        yield _moved("dW written by its product", "2 V H", head, rates, hidden=True)
    else:
        yield _dw_traffic(visits, fp32_dw, both, shape, rates)
    wide = not design.one_product or len(groups) > 1
    for name, size in (("dW", V * H), ("dX", N * H)):
        yield _finish(name, size, wide, design, rates)
    yield _moved("dX written by its product", "4 N H", N * H * FP32, rates, hidden=True)
    launches = len(parts) * 3 + len(both) + 6
    waits = launches * rates.launch + rates.sync
    yield Term("launches and one wait", f"{launches} launches", waits, waits)


def _groups(shape: Shape, design: Design, parts: list[int]) -> list[int]:
    """Rows of each product that gives dW."""
    waiting = held_rows(shape.N, max(parts), shape.H) if design.one_product else 0
    if waiting == 0:
        return parts
    # a group ends where the next chunk does not fit
    size = waiting if waiting >= shape.N else waiting // parts[0] * parts[0]
    full, rest = divmod(shape.N, size)
    return [size] * full + ([rest] if rest else [])


def _moved(what: str, formula: str, size: float, rates: Rates, hidden: bool = False) -> Term:
    seconds = size / rates.copy
    return Term(what, formula, 0.0 if hidden else seconds, seconds)


def _dw_traffic(visits: int, size: float, parts: list[int], shape: Shape, rates: Rates) -> Term:
    """The fp32 dW: written by the first part, read and written by every other one. A product that
    is shorter than its own traffic cannot hide it."""
    seconds = size / rates.copy
    least = 0.0
    for place, rows in enumerate(parts):
        passes = 1 if place == 0 else 2
        least += max(0.0, passes * seconds - _product(rows, shape, rates, 0.0))
    return Term("fp32 dW of every part", f"{visits} x 4 V H", least, visits * seconds)


def _finish(name: str, size: int, wide: bool, design: Design, rates: Rates) -> Term:
    """The upstream factor and the cast of a finished gradient."""
    letters = "V H" if name == "dW" else "N H"
    if not design.scale_and_cast:
        return _moved(f"{name} times the factor, then cast", f"(8 + 6) {letters}", 14 * size, rates)
    if wide or name == "dX":
        return _moved(f"{name} scaled and cast", f"(4 + 2) {letters}", 6 * size, rates)
    return Term(f"{name} is narrow, the factor 1", "0", 0.0, 0.0)


def floor(shape: Shape, rates: Rates) -> float:
    """6NHV at the rate of the products, in seconds."""
    return 6 * shape.N * shape.H * shape.V / rates.flops


def shares(shape: Shape, design: Design, rates: Rates) -> tuple[float, float]:
    """Floor over time: epilogues all hidden, none hidden."""
    lines = list(terms(shape, design, rates))
    best, worst = sum(t.least for t in lines), sum(t.most for t in lines)
    return floor(shape, rates) / best, floor(shape, rates) / worst


def peak_bytes(shape: Shape, design: Design) -> dict[str, int]:
    """What is held at once when dW is finished, above hidden states and head."""
    parts = chunks(shape, design)
    held = {"logits of a chunk, fp32": max(parts) * shape.V * FP32}
    groups = _groups(shape, design, parts)
    if max(groups) > max(parts):
        held["dlogits of a group, bf16"] = max(groups) * shape.V * BF16
    if not design.one_product or len(groups) > 1:
        held["dW, fp32"] = shape.V * shape.H * FP32
    held["dW, bf16"] = shape.V * shape.H * BF16
    held["dX, fp32"] = shape.N * shape.H * FP32
    return held


def from_logits(shape: Shape, rates: Rates, factor_bytes: int, row_bytes: int = 6) -> float:
    """Seconds of the loss from bf16 logits: the row kernel and the upstream factor.

    Args:
        factor_bytes: per logit, 20 through fp32 in blocks, 4 in one pass, 0 where it is 1.
        row_bytes: per logit, 6, or 4 where the second read hits L2.
    """
    return (row_bytes + factor_bytes) * shape.N * shape.V / rates.copy
