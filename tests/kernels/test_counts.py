"""The counter of benchmarks/counts on machine code counted by hand, and its bounds on our kernels.

Runs without a GPU and without the interpreter, as test_aot.py does.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, so needs TRITON_INTERPRET unset", allow_module_level=True)

import torch

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]

from benchmarks.counts import contestants, launches, linear, result  # noqa: E402
from benchmarks.counts.assembly import by_pipe, parse, widest  # noqa: E402
from benchmarks.counts.bounds import BARRIERS, BOUNDS  # noqa: E402
from benchmarks.counts.compile import Kernel  # noqa: E402
from benchmarks.counts.machines import MACHINES  # noqa: E402
from benchmarks.counts.model import READ, REWRITE, WRITE, passes, room, share, waves  # noqa: E402
from benchmarks.counts.page import page  # noqa: E402
from benchmarks.counts.records import (  # noqa: E402
    Count,
    _count,
    as_json,
    counts,
    from_json,
    launch_ms,
    whole,
)

# Two loops over rows of bf16: 0x20 to 0xa0 reads 8 logits with 9 instructions, its masked twin at
# 0xd0 to 0x140 has 8 for as many; a loop of one trip over zeros; then the end of every function.
SASS = """
        Function : toy_kernel
        /*0000*/                   S2R R0, SR_CTAID.X ;              /* 0x0000000000007919 */
                                                                     /* 0x000e2e0000002500 */
        /*0010*/              @!P0 BRA 0xb0 ;                        /* 0x0000001000408947 */
        /*0020*/                   LDG.E.128 R4, desc[UR8][R2.64] ;  /* 0x0000000802047981 */
        /*0030*/                   IMAD.U32 R8, R4, 0x10000, RZ ;    /* 0x0001000004087824 */
        /*0040*/                   FFMA R8, R8, R9, -R10 ;           /* 0x0000000908087223 */
        /*0050*/                   MUFU.EX2 R8, R8 ;                 /* 0x0000000800087308 */
        /*0060*/                   FADD R11, R11, R8 ;               /* 0x000000080b0b7221 */
        /*0070*/                   SHFL.BFLY PT, R12, R11, 0x10, 0x1f ; /* 0x0e001f00 */
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;     /* 0x0000000000007b1d */
        /*0090*/                   ISETP.GE.AND P0, PT, R13, R14, PT ; /* 0x0000000e0d00720c */
        /*00a0*/              @!P0 BRA 0x20 ;                        /* 0xffffffec00fc8947 */
        /*00b0*/                   MOV R1, R2 ;                      /* 0x0000000200017202 */
        /*00c0*/                   BRA.U !UP0, 0x150 ;               /* 0x0000000d08c87547 */
        /*00d0*/              @!P1 LDG.E.128 R4, desc[UR8][R2.64] ;  /* 0x0000000802047981 */
        /*00e0*/                   FSEL R8, R8, RZ, P1 ;             /* 0x000000ff08087208 */
        /*00f0*/                   FSETP.GT.AND P2, PT, R8, RZ, PT ; /* 0x000000ff0800720b */
        /*0100*/                   FMNMX R8, R8, R9, !PT ;           /* 0x0000000908087209 */
        /*0110*/                   UIADD3 UR4, UR4, 0x800, URZ ;     /* 0x0000080004047890 */
        /*0120*/                   STS [R3], R8 ;                    /* 0x0000000803007388 */
        /*0130*/                   LDS R8, [R3] ;                    /* 0x0000000003087984 */
        /*0140*/                   BRA.U !UP0, 0xd0 ;                /* 0xfffffff108787547 */
        /*0150*/                   STG.E.U16 desc[UR8][R2.64], R5 ;  /* 0x0000000502007986 */
        /*0160*/                   STG.E.64 desc[UR8][R2.64], RZ ;   /* 0x000000ff02007986 */
        /*0170*/               @P3 BRA 0x160 ;                       /* 0xfffffff400508947 */
        /*0180*/                   EXIT ;                            /* 0x000000000000794d */
        /*0190*/                   BRA 0x190;                        /* 0xfffffffc00fc7947 */
        /*01a0*/                   NOP;                              /* 0x0000000000007918 */
"""
AMDGCN = """
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
toy_kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	s_branch .LBB0_2
.LBB0_1:                                ; a block that two branches share, before both of them
	s_endpgm
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	.loc	2 116 16                        ; lang.py:116:16
	buffer_load_dwordx4 v[0:3], v4, s[20:23], 0 offen
	s_waitcnt vmcnt(0)
	v_pk_mul_f32 v[0:1], v[0:1], v[2:3]
	v_exp_f32_e32 v0, v0
	v_mov_b32_dpp v1, v0 row_shr:8 row_mask:0xf bank_mask:0xf bound_ctrl:1
	v_cmp_gt_i32_e32 vcc, s12, v22
	s_barrier
	s_cbranch_scc1 .LBB0_2
	v_log_f32_e32 v0, v0
	s_cbranch_scc0 .LBB0_1
	s_branch .LBB0_1
    .vgpr_count:     7
"""


def toy(text: str, warps: int = 2) -> Kernel:
    return Kernel("toy_kernel", "sm_90", 4, warps, 32, 0, 0, {}, parse(text))


def test_sass_is_read_as_counted_by_hand():
    code = parse(SASS)
    assert len(code.body) == 25 and [len(loop) for loop in code.loops] == [9, 8, 2]
    fast, masked, zeros = code.loops
    assert by_pipe(fast) == {
        "fma": 3, "alu": 1, "mufu": 1, "lsu": 1, "shuffle": 1, "barrier": 1, "control": 1,
    }  # fmt: skip
    assert by_pipe(masked) == {"alu": 3, "lsu": 3, "uniform": 1, "control": 1}
    assert widest(fast, lambda i: i.loads) == {16: 1} and not widest(fast, lambda i: i.stores)
    assert widest(zeros, lambda i: i.stores) == {8: 1}
    assert [i.guarded for i in masked] == [True, *[False] * 7]
    assert [i.opcode for i in code.outside][-2:] == ["STG.E.U16", "EXIT"]
    with pytest.raises(ValueError, match="no instruction"):
        parse("nothing to see")


def test_amdgcn_is_read_as_counted_by_hand():
    code = parse(AMDGCN)
    # what jumps back to .LBB0_1 never comes round again
    (loop,) = code.loops
    assert len(code.body) == 14 and len(loop) == 8
    assert by_pipe(loop) == {
        "fma": 1, "alu": 1, "mufu": 1, "lsu": 1, "shuffle": 1, "barrier": 1, "control": 2,
    }  # fmt: skip
    assert widest(loop, lambda i: i.loads) == {16: 1}


def test_an_outer_loop_is_not_counted_as_one():
    nested = SASS.replace("                   EXIT ;", "              @P1 BRA 0x0 ;")
    code = parse(nested)
    assert code.body[-1].jump == 0 and [len(loop) for loop in code.loops] == [9, 8, 2]


def test_a_pass_is_its_unmasked_loop_per_logit():
    visits = {v.kind: v for v in passes(toy(SASS), 2, 2, 1e6)}
    assert set(visits) == {READ, WRITE}
    read = visits[READ]
    assert read.logits == 8 and read.per_logit == 9 / 8 and read.odd == 1.0
    assert read.bytes_per_logit == 2 and read.barriers_per_1024 == 1024 / (8 * 64)
    assert read.pipe("mufu") == 1 / 8
    # fp32 rows: the same 16 bytes are four logits
    assert next(iter(passes(toy(SASS), 4, 2, 1e6))).per_logit == 9 / 4


def test_a_kernel_without_loops_is_counted_whole():
    straight = "\n".join(line for line in SASS.splitlines() if "BRA" not in line)
    straight = straight.replace("STG.E.64", "STG.E.128")
    # four programs of 64 threads share 2,048 logits: 8 for each
    (visit,) = passes(toy(straight), 2, 2, 2048)
    assert visit.kind == REWRITE and visit.logits == 8 and visit.bytes_per_logit == 4
    # the NOP stands there for what BRA hid before
    assert visit.instructions == 21 and not visit.looped


def test_the_model_against_numbers_worked_out_by_hand():
    h200 = MACHINES["sm_90"]
    # 2 B / 4.3 TB/s * 132 SMs * 1.755 GHz * 128 lanes
    assert room(2, h200) == pytest.approx(13.79, abs=0.01)
    assert room(2, MACHINES["sm_100"]) == pytest.approx(9.24, abs=0.01)
    (read,) = [v for v in passes(toy(SASS), 2, 2, 1e6) if v.kind == READ]
    assert share([read], h200) == 1.0
    # registers go to a warp in units of 256, 65,536 of them: 8, 5 and 3 programs of 8 warps
    assert [h200.resident(r, 8, 0) for r in (32, 48, 80)] == [8, 5, 3]
    assert h200.resident(32, 1, 0) == 32 and h200.resident(32, 8, 100 * 1024) == 2
    # 2,048 programs, 16 on each of 132 SMs (eight warps each would be 8)
    kernel = Kernel("k", "sm_90", 2048, 4, 32, 0, 0, {}, parse(SASS))
    assert waves(kernel, h200, 2048) == pytest.approx(2048 / (16 * 132))


def one(kind: str, instructions: float, moved: float, share_80: float) -> Count:
    """A count of which only these matter."""
    issue_ms = 1e3 * 8192 * 151936 * instructions / (132 * 128 * 1.98e9)
    shares = [share_80] * 4
    row, odd, warps = instructions, 0.0, 8
    rest = [32, 0, 0, 8, 2048, 1.94, *shares, issue_ms]
    return Count(
        "grpo_fast", "policy bf16 V=151936", "sm_90", "k", kind, instructions, {}, moved,
        {"16": 1}, 0.0, odd, 8.0, row, warps, *rest,
    )  # fmt: skip


def test_two_passes_add_up_their_times():
    both = [one(READ, 32.1, 2, 13.79 * 0.8 / 32.1), one(REWRITE, 21.5, 4, 1.0)]
    # 41.4 instructions' worth of bytes over 40.1 + 27.6 instructions' worth of time
    assert whole(both, 0.8) == pytest.approx(0.611, abs=0.002)
    assert whole(both[:1], 0.8) is None
    # 1.2447e9 logits: 1.683 ms of issue, and 1.158 ms of memory, of which L2 may save half
    assert launch_ms(both, second_read_in_l2=False) == pytest.approx(1.685 + 1.158, abs=0.003)
    assert launch_ms(both, second_read_in_l2=True) == pytest.approx(1.685 + 1.128, abs=0.003)


def test_the_linear_path_as_derived_by_hand():
    shape, rates = linear.Shape(), linear.Rates()
    by_name = {d.name: linear.shares(shape, d, rates) for d in linear.DESIGNS}
    assert linear.floor(shape, rates) == pytest.approx(38.82e-3, abs=1e-5)
    before = linear.DESIGNS[0]
    assert by_name[before.name] == pytest.approx((0.88, 0.79), abs=0.005)
    assert by_name["today"] == pytest.approx((0.927, 0.896), abs=0.002)
    assert by_name["today, and one visit to a row"] == pytest.approx((0.953, 0.920), abs=0.002)
    # the peak does not grow
    peaks = [sum(linear.peak_bytes(shape, d).values()) for d in (before, linear.TODAY)]
    assert peaks[1] <= peaks[0]
    # 16 rows behind 2,048 wait for dW and the head's bytes
    lone = linear.Shape(N=2064)
    assert linear.chunks(lone, before) == [2048, 16]
    assert linear.chunks(lone, linear.TODAY) == [1040, 1024]
    # what the model says of the engine is what the engine does
    assert linear.chunks(linear.Shape(N=20_000), linear.TODAY)[0] == 2000
    many = linear.Shape(N=20_000)
    assert linear._groups(many, linear.TODAY, linear.chunks(many, linear.TODAY)) == [4000] * 5

    def least(N: int, design: linear.Design) -> float:
        return sum(t.least for t in linear.terms(linear.Shape(N=N), design, rates))

    assert least(2064, before) - least(2048, before) == pytest.approx(1.73e-3, abs=1e-4)
    assert least(2064, linear.TODAY) - least(2048, linear.TODAY) < 2e-4


def test_more_rows_than_a_group_come_in_groups():
    target = linear.DESIGNS[-1]
    shape = linear.Shape(N=20000)
    names = [t.what for t in linear.terms(shape, target, linear.Rates())]
    assert "fp32 dW of every part" in names
    assert "dW, fp32" in linear.peak_bytes(shape, target)


@functools.cache
def counted(name: str) -> dict[str, Count]:
    (case,) = [case for case in launches.cases() if case.name == name]
    return {count.kind: count for count in counts(case, "sm_90")}


@pytest.mark.parametrize("name", BOUNDS)
def test_our_kernels_stay_below_their_bounds(name):
    found = counted(name)
    assert set(found) == set(BOUNDS[name])
    for kind, bound in BOUNDS[name].items():
        count = found[kind]
        assert count.instructions <= bound, kind
        # a bound far above its count holds nothing
        assert count.instructions > 0.8 * bound - 0.3, kind
        assert count.barriers <= BARRIERS[kind] and count.spill == 0
        if int(name.split("V=")[1].split()[0]) % 8 == 0 and kind in (READ, REWRITE):
            assert count.wide and count.bytes == int(count.bytes)


def test_a_row_is_its_loop_two_odd_tiles_and_the_rest_once_a_program():
    case = launches.Case("grpo_fast", "toy", 4096, torch.bfloat16, None, "", lambda: None, rows=2)
    two, four = (dataclasses.replace(toy(SASS), programs=n) for n in (2, 4))
    (visit,) = [v for v in passes(two, 2, 2, 2 * 4096) if v.kind == READ]
    # 64 threads, 512 logits in a tile, 64 of a thread in its row; six instructions in no loop
    whole_row = _count(case, two, visit, MACHINES["sm_90"]).row
    assert whole_row == pytest.approx(9 / 8 + 2 * (1 - 9 / 8) * 512 / 4096 + 6 / 64)
    # two programs a row: what is in no loop twice, the odd tiles not
    halves = _count(case, four, visit, MACHINES["sm_90"])
    assert halves.row - whole_row == pytest.approx(6 / 64)
    assert halves.share_row == halves.share_80 == 1.0


def test_rows_that_break_16_bytes_are_read_narrow():
    (read,) = counted("logprob_fwd bf16 V=50257").values()
    assert not read.wide and read.bytes == 2


@pytest.mark.skipif(triton.__version__ != "3.9.0", reason="the counts are of Triton 3.9.0")
def test_another_librarys_kernels_count_as_by_hand():
    pytest.importorskip("liger_kernel")
    case = next(case for case in contestants.cases() if case.contestant == "Liger")
    found = {count.kind: count for count in counts(case, "sm_90")}
    assert case.name == "triton_grpo_loss bf16 V=151936"
    # 2048 logits for 32 threads, 772 instructions; 4096 for 512, 141
    assert found[READ].instructions == pytest.approx(12.06, abs=0.01)
    assert found[REWRITE].instructions == pytest.approx(17.62, abs=0.01)
    assert found[READ].barriers == 0 and found[READ].programs == launches.ROWS


COMMITTED = ROOT / "benchmarks" / "results" / "counts" / "floors.json"


def test_the_committed_page_is_that_of_its_data():
    data = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert COMMITTED.with_suffix(".md").read_text(encoding="utf-8") == page(data)
    assert not data["dirty"] and len(data["ours"]) == 2 and not data["skipped"]
    runs = [from_json(run) for run in data["ours"].values()]
    assert {count.target for count in runs[0]} == set(MACHINES)


def test_a_file_of_other_fields_is_refused():
    good = as_json([one(READ, 32.1, 2, 0.3)])
    assert from_json(json.loads(json.dumps(good)))[0].kind == READ
    with pytest.raises(ValueError, match="speed"):
        from_json({**good, "fields": [*good["fields"], "speed"]})
    text = result.text({"ours": good})
    assert json.loads(text) == json.loads(json.dumps({"ours": good}))
