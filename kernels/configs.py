"""Launch table of the row kernels. Fixed, so that a user's first call never tunes; dated rows.

A tile of logits is STRIPS strips of THREADS threads with VEC neighbours each, which is one load of
16 bytes for a thread and strip. Counted on sm_90 (2026-11, V = 151936, nothing timed):

    forward bf16, 2 strips   9.8 instructions per logit, 6.8 without entropy; 4 strips: 9.3, 6.3,
                             but over 96 registers: 2 programs of 256 threads on an SM, not 4
    forward fp32, 4 strips   8.5, 5.4 without entropy, 64 registers
    backward, 4 strips       5.6 bf16, 4.4 fp32 -> bf16, with dentropy 7.6 and 6.3; 2 strips: 6.3

64 registers give 4 programs on an SM, 528 on 132 of them: a chunk of 2,048 rows is 3.9 waves, of
which the last is nearly full. 80 registers give 3 programs and 5.2 waves.
"""

import functools

import torch
import triton

# A row is summed in segments of so many logits, whoever sums them: a program for each segment,
# where there are few rows, finds the same bits as one for all. A multiple of every tile.
SEGMENT = 65536

# Fewer rows than this are shared between programs: 2 on each of 132 SMs. One alone has 16 KB in
# flight, where 4.3 TB/s at a latency of 0.8 us need 26 KB on every SM.
FEW_ROWS = 264

# Programs of a gradient that are aimed at, 8 on each of 132 SMs, and most tiles of one of them: a
# bf16 row of V = 151936 is 3 programs, so that the last wave of a chunk is short. Beside its loop a
# program has about 350 instructions, 1.4 per logit at 8 tiles.
GRADIENT_PROGRAMS = 1056
GRADIENT_TILES = 8

# A row that is read twice is kept in L2 between, where all rows in flight fit there: 40 of the 50
# MB of an H100. 528 programs: up to V = 38000 in bf16. A wider row is read from memory twice.
L2_BYTES = 40_000_000
ROWS_IN_FLIGHT = 528

# By bytes of a logit as stored: strips of a tile that is read, and of one that is written.
FORWARD_STRIPS = {2: 2, 4: 4}
GRADIENT_STRIPS = {2: 4, 4: 4}

# `scale`: elements of a block, 16 for each thread, and programs that go over them, 8 on each of 132
# SMs. One for each block would cost 0.15 ms at 0.6e9 elements to find that the factor is 1.
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 1056

# Most registers of a thread. Left to itself ptxas aims at 32, 40, 64 or 80 in turn and spills up to
# 32 bytes in four of 20 kernels; told the bound it spills nothing. A gradient uses 40 to 64, and
# spilled 8 bytes at a bound of 64 on sm_100.
FORWARD_REGISTERS, GRADIENT_REGISTERS = 64, 80

# Threads of a program whose row is wider than 4,096 logits. They decide the order in which a row is
# summed, so they may depend on the vocabulary and never on the number of rows.
WIDE_THREADS = 256

# Other values of the table that a first run on a GPU should time. One row to an SM: 132 rows of
# V = 151936 are 40 MB in bf16, so the second read of `policy` could come from L2, 4 bytes for a
# logit instead of 6, or 1.16 instead of 1.74 ms for 8,192 rows at 4.3 TB/s. What it may lose: an SM
# has no other row to work on while one is reduced, and half of L2 is far from each SM.
CANDIDATES = {
    "one row to an SM": {"WIDE_THREADS": 1024, "ROWS_IN_FLIGHT": 132},
    "two rows to an SM": {"WIDE_THREADS": 512, "ROWS_IN_FLIGHT": 264},
}

# Launch option of every row kernel: a fused multiply-add that the compiler chooses would differ
# between forward and backward. Those that are wanted are written out.
ENABLE_FP_FUSION = False


@functools.cache
def _target(device: object) -> tuple[str, int]:
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.warp_size


def current_target() -> tuple[str, int]:
    """Triton's backend for the current device, and the threads of a warp: 32, on AMD's data-centre
    GPUs 64."""
    if triton.knobs.runtime.interpret:
        return "interpreter", 32
    return _target(triton.runtime.driver.active.get_current_device())


def is_aligned(x: torch.Tensor) -> bool:
    """Whether every row of x (B, T, V) starts at a multiple of 16 bytes."""
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:2]))
    return all(step % 16 == 0 for step in steps)


def _tile(
    V: int, strips: int, vec: int, softcap: float | None, registers: int
) -> dict[str, object]:
    """STRIPS, THREADS, VEC and options of a launch; a tile is less than twice a short row."""
    # rows that start anywhere: one logit for a load, and as many loads in flight as registers allow
    strips = strips * 4 if vec == 1 else strips
    # tanh needs registers, and twice the instructions anyway
    strips = strips if softcap is None else max(1, strips // 2)
    threads = 128 if V <= 4096 else WIDE_THREADS
    backend, warp = current_target()
    while strips > 1 and strips * threads * vec >= 2 * V:
        strips //= 2
    return {
        "STRIPS": strips,
        "THREADS": threads,
        "VEC": vec,
        "num_warps": threads // warp,
        "enable_fp_fusion": ENABLE_FP_FUSION,
        # an option of NVIDIA's compiler alone
        **({"maxnreg": registers} if backend == "cuda" else {}),
    }


def forward_launch(logits: torch.Tensor, softcap: float | None) -> dict[str, object]:
    """Launch that reads rows of logits (B, T, V). Nothing in it depends on how many there are."""
    size = logits.element_size()
    vec = 16 // size if is_aligned(logits) else 1
    tile = _tile(logits.shape[2], FORWARD_STRIPS[size], vec, softcap, FORWARD_REGISTERS)
    return {"SEGMENT": SEGMENT, **tile}


def gradient_launch(
    logits: torch.Tensor, out: torch.Tensor, softcap: float | None
) -> dict[str, object]:
    """Launch that reads rows of logits and writes their gradient to out, both (B, T, V)."""
    size = out.element_size()
    vec = 16 // size if is_aligned(logits) and is_aligned(out) else 1
    return _tile(logits.shape[2], GRADIENT_STRIPS[size], vec, softcap, GRADIENT_REGISTERS)


def gradient_tiles(rows: int, V: int, launch: dict[str, object]) -> tuple[int, int]:
    """Programs for each row of a gradient, and tiles for each of them."""
    total = triton.cdiv(V, launch["STRIPS"] * launch["THREADS"] * launch["VEC"])
    tiles = min(GRADIENT_TILES, max(1, total * rows // GRADIENT_PROGRAMS))
    return triton.cdiv(total, tiles), tiles


def segments(V: int) -> int:
    """Segments of a row."""
    return triton.cdiv(V, SEGMENT)


def stays_in_l2(logits: torch.Tensor) -> bool:
    """Whether the rows that are in flight at once fit into L2."""
    return logits.shape[2] * logits.element_size() * ROWS_IN_FLIGHT <= L2_BYTES
