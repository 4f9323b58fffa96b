"""Real launches, compiled and disassembled for a GPU that is not there.

The launchers run on CPU tensors, so that Triton's own specialisation (alignment, V % 16) and our
launch table decide what is compiled; only the last step, the launch, is left out.
`TRITON_INTERPRET` must not be set in this process.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .assembly import Code, parse

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Kernel:
    """What one launch became on one target."""

    name: str
    target: str
    programs: int
    """Programs of the launch."""
    num_warps: int
    registers: int
    """Of a thread."""
    spill: int
    """Bytes of a thread in local memory."""
    shared: int
    """Bytes of a program."""
    constants: dict[str, object]
    """The compile-time arguments that are numbers."""
    code: Code


class _NoDevice:
    """The part of a Triton driver that compilation asks for, without a device behind it."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # kernels are cached per device, so each target has to look like another one
        return str(self.target)

    def get_current_stream(self, device=None):
        return 0

    def is_active(self):
        return True


@contextlib.contextmanager
def _compile_only(target: str) -> Iterator[list[tuple[object, int, dict[str, object]]]]:
    """Launches inside compile for the target and run nothing; yields (kernel, programs, arguments)
    of each."""
    launches = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = [p.name for p in self.params]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        sizes = grid(given) if callable(grid) else grid
        programs = 1
        for size in sizes:
            programs *= size
        launches.append((kernel, programs, given))
        return kernel

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_NoDevice(TARGETS[target]))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield launches
    finally:
        driver.set_active(before)


def compiled(launch: Callable[[], object], target: str) -> list[Kernel]:
    """The kernels that `launch` launches, in order, each once.

    Args:
        target: a key of `TARGETS`.
    """
    with _compile_only(target) as launches:
        launch()
    kernels: dict[str, Kernel] = {}
    for kernel, programs, given in launches:
        if kernel.hash not in kernels:
            kernels[kernel.hash] = _read(kernel, target, programs, given)
    return list(kernels.values())


def _read(kernel, target: str, programs: int, given: dict[str, object]) -> Kernel:
    read = _nvidia if "cubin" in kernel.asm else _amd
    text, registers, spill = read(kernel.asm)
    return Kernel(
        name=kernel.metadata.name,
        target=target,
        programs=programs,
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        spill=spill,
        shared=kernel.metadata.shared,
        constants={k: v for k, v in given.items() if k.isupper() and isinstance(v, (int, float))},
        code=parse(text),
    )


def _nvidia(asm) -> tuple[str, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"\b{field}:(\d+)", text)[1]) for field in ("REG", "STACK", "LOCAL")
    )
    return text, registers, stack + local


def _amd(asm) -> tuple[str, int, int]:
    text = asm["amdgcn"]
    # the counts are in the metadata note at the end; scratch memory is where vector spills go
    registers, scratch, scalar = (
        int(re.search(rf"^\s+\.{field}:\s+(\d+)", text, re.MULTILINE)[1])
        for field in ("vgpr_count", "private_segment_fixed_size", "sgpr_spill_count")
    )
    return text, registers, scratch + 4 * scalar
