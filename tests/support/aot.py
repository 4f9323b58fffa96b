"""Compile every kernel launch that ships, for every GPU we name, on a machine without one.

`python tests/support/aot.py` prints a markdown table of registers, spills, shared memory and loads;
`test_aot.py` holds the limits. The real launchers run on small CPU tensors, so that Triton's own
specialisation (pointer alignment, V % 16, the launch table) decides what is compiled; only the last
step, the launch, is left out. `TRITON_INTERPRET` must not be set in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import triton
from aot_cases import CASES, FEW_ROWS
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

KIB = 1024
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU family and the shared memory one program may use on it, in bytes."""

    gpu: GPUTarget
    shared_limit: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one launch became on one target; sizes in bytes."""

    kernel: str
    case: str
    target: str
    registers: int
    spill: int
    shared: int
    narrow_loads: int
    """Load instructions of less than 128 bits; a tile that is not vectorised adds one per logit."""
    fp_fusion: bool
    num_warps: int
    narrow_offsets: list[str]
    """32-bit products that reach a pointer; see `narrow_offsets`."""
    reductions: frozenset[str]
    """How a tile is spread over the threads when it is summed, which fixes the order of the sum."""


class _NoDevice:
    """The part of a Triton driver that compilation asks for, without a device behind it."""

    def __init__(self, gpu: GPUTarget):
        self.gpu = gpu

    def get_current_target(self):
        return self.gpu

    def get_current_device(self):
        # Kernels are cached per device, so each target has to look like another one.
        return str(self.gpu)

    def get_current_stream(self, device=None):
        return 0

    def is_active(self):
        return True


@contextlib.contextmanager
def compiling_for(gpu: GPUTarget) -> Iterator[list]:
    """Launches inside compile for `gpu` and run nothing; yields the list of compiled kernels."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    config = triton.runtime.driver
    before = config._active
    config.set_active(_NoDevice(gpu))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield compiled
    finally:
        config.set_active(before)


def compile_launch(launch: Callable[[], object], target: str, case: str = "") -> Compiled:
    """Compile the one kernel that `launch` launches for `TARGETS[target]`."""
    (kernel,) = compile_launches(launch, target, case)
    return kernel


def compile_launches(launch: Callable[[], object], target: str, case: str = "") -> list[Compiled]:
    """Compile every kernel that `launch` launches for `TARGETS[target]`."""
    with compiling_for(TARGETS[target].gpu) as kernels:
        launch()
    return [_read(kernel, target, case) for kernel in kernels]


def _read(kernel, target: str, case: str) -> Compiled:
    usage = _nvidia_usage if "cubin" in kernel.asm else _amd_usage
    registers, spill, narrow_loads = usage(kernel.asm)
    return Compiled(
        kernel=kernel.metadata.name,
        case=case,
        target=target,
        registers=registers,
        spill=spill,
        shared=kernel.metadata.shared,
        narrow_loads=narrow_loads,
        fp_fusion=kernel.metadata.enable_fp_fusion,
        num_warps=kernel.metadata.num_warps,
        narrow_offsets=narrow_offsets(kernel.asm["ttir"]),
        reductions=_reductions(kernel.asm["ttgir"]),
    )


def _nvidia_usage(asm) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{field}:(\d+)", text)[1]) for field in ("REG", "STACK", "LOCAL")
    )
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", asm["ptx"])
    return registers, stack + local, sum(int(n or 1) * int(bits) < 128 for n, bits in loads)


def _amd_usage(asm) -> tuple[int, int, int]:
    text = asm["amdgcn"]
    # The counts are in the metadata note at the end; scratch memory is where vector spills go.
    registers, scratch, scalar = (
        int(re.search(rf"^\s+\.{field}:\s+(\d+)", text, re.MULTILINE)[1])
        for field in ("vgpr_count", "private_segment_fixed_size", "sgpr_spill_count")
    )
    loads = re.findall(r"(?:global|buffer)_load_(\w+)", text)
    return registers, scratch + 4 * scalar, sum(load != "dwordx4" for load in loads)


def _reductions(ttgir: str) -> frozenset[str]:
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.MULTILINE))
    inputs = re.findall(r"}\) : \(tensor<(\S+?), (#.*)>\) ->", ttgir)
    return frozenset(f"{shape} {_threads(layout, layouts)}" for shape, layout in inputs)


def _threads(layout: str, layouts: dict[str, str]) -> str:
    """Elements of a thread, threads of a warp and warps, by dimension. A slice of a tile and a
    vector that lie alike read alike."""
    dropped = [int(dim) for dim in re.findall(r"dim = (\d)", layout)]
    parent = layouts[re.search(r"#\w+(?=}|$)", layout)[0]]
    spread = [
        [int(x) for x in re.search(rf"{field} = \[([^]]*)]", parent)[1].split(", ")]
        for field in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
    ]
    # the innermost slice is dropped first
    for dim in reversed(dropped):
        spread = [[x for i, x in enumerate(sizes) if i != dim] for sizes in spread]
    return str(spread)


_NAME = r"%[\w.$-]+"
_VALUE = rf"{_NAME}(?:#\d+)?"


def narrow_offsets(ttir: str) -> list[str]:
    """The 32-bit products in `ttir` that reach the offset of a pointer.

    Such a product is how `row * stride` wraps at 2^31 elements; a row offset has to be widened
    before it is multiplied. Values are followed through arithmetic, casts, branches and loops, not
    through memory or comparisons.
    """
    sources, offsets = _data_flow(ttir)
    found, seen = [], set()
    while offsets:
        name = offsets.pop()
        if name in seen or name not in sources:
            continue
        seen.add(name)
        line, origins = sources[name]
        if re.search(r"arith\.(muli|shli)\b.*:\s(?:i32|tensor<[^>]*xi32>)$", line):
            found.append(line)
        elif not re.search(r"= (tt\.load|arith\.cmp|tt\.get_program_id|arith\.constant)", line):
            offsets += origins
    return found


def _data_flow(ttir: str) -> tuple[dict[str, tuple[str, list[str]]], list[str]]:
    """For each SSA value its line and the values it comes from; and the offsets of all addptr."""
    sources: dict[str, tuple[str, list[str]]] = {}
    offsets: list[str] = []
    # Results of the region operations we are inside of, to be joined with what they yield.
    open_regions: list[list[str]] = []
    for raw in ttir.splitlines():
        line = re.sub(r"\s*loc\((?:[^()]|\([^()]*\))*\)$", "", raw.strip())
        if line.startswith("}") and open_regions and not line.endswith("{"):
            open_regions.pop()
        head = re.match(rf"({_NAME})(?::(\d+))? = ", line)
        results = []
        if head:
            name, count = head[1], head[2]
            results = [f"{name}#{i}" for i in range(int(count))] if count else [name]
            operands = re.findall(_VALUE, line[head.end() :])
            for result in results:
                sources[result] = (line, operands)
        address = re.search(rf"tt\.addptr {_VALUE}, ({_VALUE})", line)
        if address:
            offsets.append(address[1])
        if re.match(r"scf\.yield ", line) and open_regions:
            for result, value in zip(open_regions[-1], re.findall(_VALUE, line), strict=False):
                sources[result][1].append(value)
        if "scf.for" in line:
            _bind_loop(line, results, sources)
        if line.endswith(("{", "({")) and not line.startswith("}"):
            open_regions.append(results)
    return sources, offsets


def _bind_loop(line: str, results: list[str], sources: dict) -> None:
    """Loop variables come from their bounds or initial value, and from what the loop yields."""
    index = re.search(rf"scf\.for\s(?:unsigned )?({_VALUE}) = (.*?)(?: iter_args|\s*->|\s*:)", line)
    sources[index[1]] = ("loop variable", re.findall(_VALUE, index[2]))
    carried = re.search(r"iter_args\((.*?)\) ->", line)
    if carried:
        pairs = re.findall(rf"({_VALUE}) = ({_VALUE})", carried[1])
        for (argument, start), result in zip(pairs, results, strict=True):
            origins = [start]
            sources[argument] = (line, origins)
            sources[result] = (line, origins)


def table(results: list[Compiled]) -> str:
    """Markdown: one row per kernel, case and target."""
    lines = [
        "| case | target | kernel | warps | registers | spill B | shared B | narrow loads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r.case} | {r.target} | {r.kernel} | {r.num_warps} | {r.registers} | {r.spill} | "
            f"{r.shared} | {r.narrow_loads} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile everything, print the table and the time it took."""
    start = time.perf_counter()
    every = {**CASES, **FEW_ROWS}
    results = [
        kernel
        for case in every
        for target in TARGETS
        for kernel in compile_launches(every[case], target, case)
    ]
    print(table(results))
    seconds = time.perf_counter() - start
    print(f"\n{len(results)} kernels, Triton {triton.__version__}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
