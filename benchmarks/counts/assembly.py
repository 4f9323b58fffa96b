"""Machine code as text -> instructions, the innermost loops, and which pipe each one uses.

Reads what `cuobjdump -sass` prints and the amdgcn text that Triton keeps.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

PIPES = ("fma", "alu", "mufu", "lsu", "shuffle", "barrier", "tensor", "uniform", "control")

# Opcodes of sm_80 to sm_120 up to the first dot. What is not named here and does not begin with U
# (the uniform path) is ALU: integers, comparisons, selections, moves, packed conversions.
_SASS_PIPES = {
    "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 FFMA32I FMUL32I FADD32I IMAD IDP HFMA2 HADD2 HMUL2",
    "mufu": "MUFU F2F F2I I2F I2I FRND",
    "lsu": "LDG STG LDS STS LDGSTS LDL STL LD ST LDC LDSM STSM ATOM ATOMG ATOMS RED CCTL UBLKCP",
    "shuffle": "SHFL VOTE MATCH REDUX",
    "barrier": "BAR MEMBAR DEPBAR LDGDEPBAR WARPSYNC ERRBAR FENCE SYNCS WARPGROUP",
    "tensor": "HMMA IMMA DMMA QMMA OMMA HGMMA QGMMA IGMMA UTCHMMA UTCQMMA",
    "uniform": "R2UR S2UR REDUX.U",
    "control": "BRA BRX JMP EXIT BSSY BSYNC BREAK CALL RET NOP YIELD BPT NANOSLEEP S2R CS2R KILL",
}
_SASS = {opcode: pipe for pipe, names in _SASS_PIPES.items() for opcode in names.split()}

# gfx9: the first pattern that fits decides. Cross-lane moves run on the VALU but are shuffles here.
_AMD = (
    ("tensor", r"v_s?mfma"),
    ("shuffle", r"\w*_dpp|v_(readlane|readfirstlane|writelane|permlane)|ds_(b?permute|swizzle)"),
    ("mufu", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("fma", r"v_(pk_)?(fma|fmac|mul|add|sub|mac|mad)\w*_f(16|32)"),
    ("alu", r"v_"),
    ("lsu", r"global_|buffer_|flat_|scratch_|ds_"),
    ("barrier", r"s_barrier"),
    ("control", r"s_(waitcnt|nop|branch|cbranch|endpgm|sleep|setprio|sethalt|inst_prefetch)"),
    ("uniform", r"s_"),
)


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    """Bytes from the start of the function; for amdgcn the number of the instruction."""
    opcode: str
    """With its suffixes, without predicate and operands: LDG.E.128, v_exp_f32_e32."""
    pipe: str
    """One of `PIPES`."""
    loads: int = 0
    """Bytes that a thread reads from global memory."""
    stores: int = 0
    """Bytes that a thread writes to global memory."""
    guarded: bool = False
    """Under a predicate; of amdgcn, which masks by its exec register, never known."""
    jump: int | None = None
    """Where a branch goes."""
    always: bool = False
    """Nothing behind it is reached from it: an unconditional branch, an end."""


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, and the loops that hold no other loop."""

    body: tuple[Instruction, ...]
    loops: tuple[tuple[Instruction, ...], ...]

    @property
    def outside(self) -> tuple[Instruction, ...]:
        """What is in none of the loops; a program runs it at most once."""
        inside = {i.address for loop in self.loops for i in loop}
        return tuple(i for i in self.body if i.address not in inside)


def by_pipe(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Instructions by pipe, those that occur, in the order of `PIPES`."""
    counts = Counter(i.pipe for i in instructions)
    return {pipe: counts[pipe] for pipe in PIPES if counts[pipe]}


def parse(text: str) -> Code:
    """Instructions and innermost loops of one kernel, SASS or amdgcn.

    A loop is what lies on a way from the target of a backward branch to that branch, wherever it
    stands in the text, and holds no other loop. The jump to itself behind the last instruction of
    a SASS function is none, nor are the NOPs behind that.

    Raises:
        ValueError: the text holds no instruction.
    """
    body = _amdgcn(text) if "amdgcn" in text else _sass(text)
    if not body:
        raise ValueError("text: expected the machine code of a kernel, got no instruction")
    return Code(tuple(body), tuple(_innermost(body)))


def _innermost(body: list[Instruction]) -> list[tuple[Instruction, ...]]:
    place = {i.address: k for k, i in enumerate(body)}
    after: list[list[int]] = []
    for k, i in enumerate(body):
        ways = [] if i.always or k + 1 == len(body) else [k + 1]
        ways += [place[i.jump]] if i.jump in place else []
        after.append(ways)
    before: list[list[int]] = [[] for _ in body]
    for k, ways in enumerate(after):
        for way in ways:
            before[way].append(k)
    loops: dict[int, set[int]] = {}
    for k, ways in enumerate(after):
        for head in ways:
            # a jump back to a block that two branches share is no loop: it never comes round
            if head <= k and k in (ahead := _reached(head, after, head)):
                behind = _reached(k, before, head)
                loops.setdefault(head, set()).update((ahead & behind) | {head, k})
    inner = [
        inside
        for head, inside in loops.items()
        if not any(other in inside and other != head for other in loops)
    ]
    return [tuple(body[k] for k in sorted(inside)) for inside in inner]


def _reached(start: int, ways: list[list[int]], stop: int) -> set[int]:
    """What can be reached from start, not through stop."""
    seen, waiting = {start}, [start]
    while waiting:
        here = waiting.pop()
        if here == stop and here != start:
            continue
        for there in ways[here]:
            if there not in seen:
                seen.add(there)
                waiting.append(there)
    return seen


def _sass(text: str) -> list[Instruction]:
    # with Triton 3.6 lines of sm_120 end in scheduling notes, `?trans1`, before the semicolon
    line = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T\d]\s+)?([A-Z][\w.]*)[^\S\n]*([^;/]*)")
    body: list[Instruction] = []
    for match in filter(None, map(line.match, text.splitlines())):
        address, guard, opcode, operands = int(match[1], 16), *match.groups()[1:]
        base = opcode.split(".")[0]
        jump = re.search(r"0x([0-9a-f]+)", operands) if base == "BRA" else None
        if jump and int(jump[1], 16) == address:
            break
        width = _sass_width(opcode)
        body.append(
            Instruction(
                address,
                opcode,
                _SASS.get(base, "uniform" if base[0] == "U" else "alu"),
                loads=width if base in ("LDG", "LDGSTS") else 0,
                stores=width if base == "STG" else 0,
                guarded=bool(guard),
                jump=int(jump[1], 16) if jump else None,
                # BRA.U !UP0, 0x10 has its condition among the operands
                always=not guard
                and (base == "EXIT" or (bool(jump) and not re.match("!?U?P", operands))),
            )
        )
    return body


def _sass_width(opcode: str) -> int:
    suffixes = opcode.split(".")[1:]
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[s] for s in suffixes if s in widths), 4)


def _amdgcn(text: str) -> list[Instruction]:
    # a label is the place of the next instruction
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for raw in text.splitlines():
        label = re.match(r"(\.LBB\w+):", raw)
        if label:
            labels[label[1]] = len(lines)
        # the metadata behind the code has no such line
        found = re.match(r"\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\b([^;]*)", raw)
        if found:
            lines.append((found[1], found[2]))
    body = []
    for place, (opcode, operands) in enumerate(lines):
        pipe = next(pipe for pipe, pattern in _AMD if re.match(pattern, opcode))
        # an LDS-direct load (`... lds`) reads global memory like any other
        memory = re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode)
        width = _amd_width(memory[2]) if memory else 0
        branch = re.match(r"\s+(\.LBB\w+)", operands) if "branch" in opcode else None
        body.append(
            Instruction(
                place,
                opcode,
                pipe,
                loads=width if memory and memory[1] == "load" else 0,
                stores=width if memory and memory[1] == "store" else 0,
                jump=labels.get(branch[1]) if branch else None,
                always=opcode in ("s_branch", "s_endpgm"),
            )
        )
    return body


def _amd_width(kind: str) -> int:
    widths: tuple[tuple[str, int], ...] = (
        ("dwordx4", 16),
        ("dwordx3", 12),
        ("dwordx2", 8),
        ("dword", 4),
        ("ushort", 2),
        ("sshort", 2),
        ("short", 2),
        ("ubyte", 1),
        ("sbyte", 1),
        ("byte", 1),
    )
    return next(width for name, width in widths if name in kind)


def widest(
    instructions: Iterable[Instruction], size: Callable[[Instruction], int]
) -> dict[int, int]:
    """Bytes of an access -> how often it occurs, widest first."""
    counts = Counter(filter(None, map(size, instructions)))
    return dict(sorted(counts.items(), reverse=True))
