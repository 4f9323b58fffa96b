"""A kernel's machine code -> instructions and bytes per logit -> the share of the copy rate that
they leave room for.

    time per logit = max over pipes of (instructions / lanes per clock) / (SMs * clock * efficiency)
                     against (bytes / copy rate)

A launch that reads its rows and then reads and writes them is two passes, whose times add up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .assembly import Instruction, by_pipe, widest
from .compile import Kernel
from .machines import Machine

READ, REWRITE, WRITE = "read", "read and write", "write"
# Row work of a kernel that makes the logits itself, beside its products; nothing of them moves.
BESIDE = "beside the products"
# What joins the statistics of several programs of a row; it reads none of the row.
MERGE = "merge of parts"
# Share of the issue slots that a kernel fills. One public timing reaches all of them (`reported`).
EFFICIENCY = 0.8


@dataclass(frozen=True)
class Pass:
    """One visit to the rows: its main loop, or the whole of a program that has no loop."""

    kind: str
    """`READ`, `REWRITE`, `WRITE`, `BESIDE` or `MERGE`."""
    logits: float
    """Of one thread in one trip."""
    threads: int
    instructions: float
    pipes: dict[str, float]
    barriers: int
    loads: dict[int, int]
    """Bytes of a load -> how many of them a trip has."""
    bytes_per_logit: float
    """Read and written."""
    looped: bool
    odd: float = 0.0
    """Instructions per logit of the longest other loop of the kind, 0 where there is none."""

    @property
    def per_logit(self) -> float:
        """Instructions per logit."""
        return self.instructions / self.logits

    @property
    def barriers_per_1024(self) -> float:
        """Barriers of a program per 1,024 logits."""
        return 1024 * self.barriers / (self.logits * self.threads)

    def pipe(self, name: str) -> float:
        """Instructions of one pipe per logit."""
        return self.pipes.get(name, 0) / self.logits

    def seconds(self, machine: Machine, efficiency: float, clock: float) -> float:
        """Per logit, bound by the busiest of issue, FMA, ALU and MUFU; no memory."""
        slots = machine.sms * clock * efficiency
        issued = self.per_logit
        if machine.warp == 64:
            # scalar, memory and branch instructions of other waves start in the same clock
            vector = ("fma", "alu", "mufu", "shuffle", "tensor")
            issued = sum(self.pipe(name) for name in vector)
        lanes = (
            issued / machine.issue,
            self.pipe("fma") / machine.fma,
            self.pipe("alu") / machine.alu,
            self.pipe("mufu") / machine.mufu,
        )
        return max(lanes) / slots


def passes(
    kernel: Kernel, itemsize: int, out_itemsize: int, logits: float, warp: int = 32
) -> list[Pass]:
    """The visits of a kernel to its rows, one of each kind, in the order in which they come.

    Of several loops of a kind the one counts that has most logits in a trip; of equal ones one that
    loads without a predicate, as a masked loop is for the target's tile and the last one; then the
    longest. amdgcn does not show masks: there the shortest counts. Where a kernel multiplies
    matrices, what stands outside its loops is its row work.

    Args:
        itemsize: bytes of a logit as read. out_itemsize: of its gradient.
        logits: of all rows, shared out over programs and threads for a kernel without loops.
    """
    threads = kernel.num_warps * warp
    each = logits / kernel.programs / threads
    if any(i.pipe == "tensor" for loop in kernel.code.loops for i in loop):
        return [_pass(BESIDE, each, threads, kernel.code.outside, 0.0, False)]
    found: dict[str, list[tuple[tuple[float, bool, int], Pass]]] = {}
    for loop in kernel.code.loops:
        loaded, stored = sum(i.loads for i in loop), sum(i.stores for i in loop)
        if not (loaded or stored):
            continue
        kind = (READ if not stored else REWRITE) if loaded else WRITE
        size = itemsize if loaded else out_itemsize
        width = (loaded or stored) / size
        one = _pass(kind, width, threads, loop, (loaded + stored) / width, True)
        masked = any(i.guarded for i in loop if i.loads)
        order = (one.logits, not masked, one.instructions * (1 if warp == 32 else -1))
        found.setdefault(kind, []).append((order, one))
    if not found:
        body = kernel.code.body
        stored = max((i.stores for i in body), default=0)
        # statistics of a row are stored one at a time, a gradient in wide stores
        kind, moved = (REWRITE, itemsize + out_itemsize) if stored > 4 else (READ, itemsize)
        return [_pass(kind, each, threads, body, moved, False)]
    out = []
    for loops in found.values():
        loops.sort(key=lambda entry: entry[0])
        # a loop of smaller tiles is for rows that hardly ever occur, beyond 2^20 nats
        others = [one.per_logit for _, one in loops[:-1] if one.logits == loops[-1][1].logits]
        out.append(replace(loops[-1][1], odd=max(others, default=0.0)))
    return out


def merge(kernel: Kernel, logits: float, warp: int = 32) -> Pass:
    """All of a kernel that joins parts, its loops counted once, over the logits of its rows."""
    threads = kernel.num_warps * warp
    return _pass(MERGE, logits / kernel.programs / threads, threads, kernel.code.body, 0.0, False)


def _pass(
    kind: str,
    logits: float,
    threads: int,
    code: Iterable[Instruction],
    moved: float,
    looped: bool,
) -> Pass:
    code = tuple(code)
    barriers = sum(i.opcode.startswith(("BAR", "s_barrier")) for i in code)
    loads = widest(code, lambda i: i.loads)
    if not looped:
        # the others are scalars of the row
        loads = dict(list(loads.items())[:1]) if moved else {}
    return Pass(kind, logits, threads, len(code), by_pipe(code), barriers, loads, moved, looped)


def share(
    visits: Iterable[Pass], machine: Machine, efficiency: float = EFFICIENCY, boost: bool = False
) -> float:
    """Predicted share of the copy rate over some passes: their bytes, at the copy rate, over the
    time that they take."""
    clock = machine.boost if boost else machine.clock
    moved = taken = 0.0
    for visit in visits:
        memory = visit.bytes_per_logit / machine.copy_rate
        moved += memory
        taken += max(memory, visit.seconds(machine, efficiency, clock))
    return moved / taken


def room(bytes_per_logit: float, machine: Machine, efficiency: float = 1.0) -> float:
    """Instructions per logit that fit while a logit's bytes move at the copy rate."""
    lanes = machine.sms * machine.clock * machine.issue * efficiency
    return bytes_per_logit / machine.copy_rate * lanes


def waves(kernel: Kernel, machine: Machine, programs: float) -> float:
    """Rounds in which that many programs run; above 1, a fraction is time of idle SMs."""
    resident = machine.resident(kernel.registers, kernel.num_warps, kernel.shared)
    return programs / (resident * machine.sms)
