"""Divergence, barriers, calls, warp operations, races."""

import numpy as np
import pytest

from ptxsim import Device, PTXError, Unsupported
from ptxsim.testing import assemble

STORE_R2 = """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
    st.global.u32 [%rd1], %r2;"""


def run(module, threads, fill=7, **options):
    """What kernel k stores for each thread of one block."""
    device = Device()
    out = device.buffer(np.full(threads, fill, np.uint32))
    module.launch("k", 1, threads, [out], device, **options)
    return out.array.tolist()


def test_divergent_loop_and_early_exit():
    """Thread t loops t times, odd threads leave early, and the rest meet at a barrier."""
    module = assemble(
        ["u64"],
        f"""mov.u32 %r1, %tid.x; mov.u32 %r2, 0; mov.u32 %r3, 0;
        and.b32 %r4, %r1, 1; setp.eq.u32 %p1, %r4, 1; @%p1 bra $out;
        $loop: setp.ge.u32 %p2, %r3, %r1; @%p2 bra $done; add.u32 %r2, %r2, %r3; add.u32 %r3, %r3, 1; bra.uni $loop;
        $done: bar.sync 0;
        {STORE_R2}
        $out: ret;""",
    )
    assert run(module, 96) == [t * (t - 1) // 2 if t % 2 == 0 else 7 for t in range(96)]


def test_results_do_not_depend_on_how_blocks_are_grouped():
    """Waves of one block, of some, and of all; in order and shuffled."""
    module = assemble(
        ["u64"],
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ctaid.y;
        mad.lo.u32 %r4, %r3, %r2, %r1; mov.u32 %r5, %ntid.x; mov.u32 %r6, %tid.x; mad.lo.u32 %r7, %r4, %r5, %r6;
        mul.wide.u32 %rd2, %r7, 4; add.s64 %rd1, %rd1, %rd2; mul.lo.u32 %r8, %r7, 3; st.global.u32 [%rd1], %r8; ret;""",
    )
    for options in ({}, {"max_lanes": 1}, {"max_lanes": 128}, {"seed": 3}, {"seed": 3, "max_lanes": 100}):
        device = Device()
        out = device.zeros(5 * 3 * 40, np.uint32)
        module.launch("k", (5, 3), 40, [out], device, track=True, **options)
        assert (out.array == 3 * np.arange(600)).all()
        assert (out.writes == 1).all()


def test_branch_table():
    """brx.idx sends each thread elsewhere; an index beyond the table is an error."""
    body = f"""mov.u32 %r1, %tid.x; and.b32 %r3, %r1, {{mask}};
        table: .branchtargets $zero, $one, $two;
        brx.idx %r3, table;
        $zero: mov.u32 %r2, 10; bra.uni $end; $one: mov.u32 %r2, 11; bra.uni $end; $two: mov.u32 %r2, 12;
        $end: {STORE_R2} ret;"""
    assert run(assemble(["u64"], body.format(mask=1)), 40) == [10 + t % 2 for t in range(40)]
    with pytest.raises(PTXError, match=r"index out of range.*thread \(3,0,0\)"):
        run(assemble(["u64"], body.format(mask=3)), 40)


def test_calls_are_inlined():
    """Functions that call functions, in divergent code, with a return in the middle."""
    functions = """
    .func (.param .b32 out) twice(.param .b32 in) {
      .reg .b32 %r<3>; .reg .pred %p<2>;
      ld.param.u32 %r1, [in]; setp.gt.u32 %p1, %r1, 20; @%p1 bra $big;
      shl.b32 %r2, %r1, 1; st.param.b32 [out], %r2; ret;
      $big: st.param.b32 [out], %r1; ret; }
    .func (.param .b32 out) four_times(.param .b32 in) {
      .reg .b32 %r<4>; ld.param.u32 %r1, [in];
      { .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), twice, (a); ld.param.b32 %r2, [b]; }
      { .param .b32 a; .param .b32 b; st.param.b32 [a], %r2; call.uni (b), twice, (a); ld.param.b32 %r3, [b]; }
      st.param.b32 [out], %r3; ret; }"""
    call = (
        "{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), four_times, (a); ld.param.b32 %r2, [b]; }"
    )
    got = run(assemble(["u64"], f"mov.u32 %r1, %tid.x; {call} {STORE_R2} ret;", functions), 64)
    assert got == [t if t > 20 else 2 * t if t > 10 else 4 * t for t in range(64)]
    printf = ".extern .func (.param .b32 r) vprintf (.param .b64 f, .param .b64 a);"
    call = "{ .param .b64 f; .param .b64 a; .param .b32 r; call.uni (r), vprintf, (f, a); }"
    assemble([], f"{call} ret;", printf).launch("k", 1, 32)
    with pytest.raises(Unsupported, match="without a body"):
        assemble([], f"{call.replace('vprintf', 'malloc')} ret;", printf).launch("k", 1, 32)
    recursive = ".func f() { call.uni f; ret; }"
    with pytest.raises(Unsupported, match="recursive"):
        assemble([], "call.uni f; ret;", recursive).launch("k", 1, 32)
    with pytest.raises(Unsupported):
        assemble([], "call.uni %rd1; ret;").launch("k", 1, 32)


def test_failed_assertions_and_traps_are_errors():
    """Also of a single thread, which the message names."""
    declaration = ".extern .func __assertfail (.param .b64 m);"
    call = "{ .param .b64 a; st.param.b64 [a], %rd1; @%p1 call.uni __assertfail, (a); }"
    for failing, message in ((call, "assertion failed"), ("@%p1 trap;", "trap")):
        body = f"""mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 33; mov.u32 %r2, %ctaid.x;
            setp.eq.and.u32 %p1, %r2, 2, %p1; {failing} ret;"""
        with pytest.raises(PTXError, match=rf"{message} \[block \(2,0,0\) thread \(33,0,0\)\]"):
            assemble([], body, declaration).launch("k", 4, 64)


def test_endless_loops_end():
    """A mutant may never finish."""
    with pytest.raises(PTXError, match="max_steps"):
        assemble([], "$loop: bra $loop;").launch("k", 1, 32, max_steps=1000)


# Barriers


def test_barrier_at_another_place_is_a_deadlock():
    """Half of the block waits here, half there."""
    module = assemble(
        [],
        """mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra $a; bar.sync 0; bra.uni $b;
        $a: bar.sync 0; $b: ret;""",
    )
    with pytest.raises(PTXError, match="deadlock"):
        module.launch("k", 1, 64)


def test_barrier_orders_shared_memory_of_each_block():
    """Every thread sees what all threads of its own block wrote before the barrier."""
    module = assemble(
        ["u64"],
        """mov.u32 %r1, %tid.x; mov.u32 %r5, %ctaid.x; shl.b32 %r3, %r1, 2; mov.u32 %r4, s; add.u32 %r6, %r4, %r3;
        mad.lo.u32 %r7, %r5, 1000, %r1; st.shared.u32 [%r6], %r7; bar.sync 0;
        sub.u32 %r8, 63, %r1; shl.b32 %r8, %r8, 2; add.u32 %r8, %r4, %r8; ld.shared.u32 %r2, [%r8];
        ld.param.u64 %rd1, [p0]; mad.lo.u32 %r9, %r5, 64, %r1; mul.wide.u32 %rd2, %r9, 4; add.s64 %rd1, %rd1, %rd2;
        st.global.u32 [%rd1], %r2; ret;""",
        ".shared .align 4 .b8 s[256];",
    )
    for options in ({}, {"max_lanes": 64}, {"racecheck": True}):
        device = Device()
        out = device.zeros(3 * 64, np.uint32)
        module.launch("k", 3, 64, [out], device, **options)
        assert out.array.tolist() == [1000 * block + 63 - t for block in range(3) for t in range(64)]


@pytest.mark.parametrize(("how", "want"), [("popc.u32 %r2", 20), ("and.pred %p2", 0), ("or.pred %p2", 1)])
def test_barrier_with_reduction(how, want):
    """Over the threads of the block that are still there."""
    convert = "" if "u32" in how else "selp.u32 %r2, 1, 0, %p2;"
    body = f"""mov.u32 %r1, %tid.x; setp.ge.u32 %p3, %r1, 50; @%p3 bra $end; setp.ge.u32 %p1, %r1, 30;
        bar.red.{how.split()[0]} {how.split()[1]}, 0, %p1; {convert} {STORE_R2} $end: ret;"""
    assert run(assemble(["u64"], body), 64) == [want] * 50 + [7] * 14


def test_named_barriers_of_the_whole_block():
    """bar.sync 1, the other spellings of a barrier, and fences, which have no effect here."""
    body = f"""mov.u32 %r1, %tid.x; mov.u32 %r2, 3; bar.sync 1; barrier.sync.aligned 2; membar.gl; fence.acq_rel.gpu;
        bar.warp.sync 0xffffffff; nanosleep.u32 20; createpolicy.fractional.L2::evict_first.b64 %rd5, 1.0;
        {STORE_R2} ret;"""
    assert run(assemble(["u64"], body), 64) == [3] * 64


def test_partial_barriers_are_refused():
    """A count of threads that is not the block."""
    assemble([], "bar.sync 0, 64; ret;").launch("k", 1, 64)
    with pytest.raises(Unsupported, match="barrier for 32 of 64 threads"):
        assemble([], "bar.sync 1, 32; ret;").launch("k", 1, 64)


def test_race_in_shared_memory_is_found():
    """Between warps that no barrier separates: a read and a write, and two writes."""
    body = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 %r3, s; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r1;
        {barrier} xor.b32 %r5, %r2, 128; add.u32 %r5, %r3, %r5; {access} ret;"""
    shared = ".shared .align 4 .b8 s[256];"
    for access in ("ld.shared.u32 %r6, [%r5];", "st.shared.u32 [%r5], %r1;"):
        assemble([], body.format(barrier="bar.sync 0;", access=access), shared).launch("k", 2, 64, racecheck=True)
        with pytest.raises(PTXError, match="race"):
            assemble([], body.format(barrier="", access=access), shared).launch("k", 2, 64, racecheck=True)
    with pytest.raises(PTXError, match="race"):
        assemble([], "mov.u32 %r1, %tid.x; st.shared.u32 [s], %r1; ret;", shared).launch("k", 1, 64, racecheck=True)
    assemble([], "mov.u32 %r1, %tid.x; st.shared.u32 [s], %r1; ret;", shared).launch("k", 1, 32, racecheck=True)


# Warp operations


def test_warp_operations():
    """shfl up and idx, ballot, redux, each within the warp of the thread."""
    module = assemble(
        ["u64"],
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 16; add.s64 %rd1, %rd1, %rd2;
        shfl.sync.up.b32 %r2|%p1, %r1, 1, 0, -1; selp.u32 %r3, %r2, 99, %p1;
        shfl.sync.idx.b32 %r4, %r1, 5, 31, -1;
        setp.lt.u32 %p2, %r1, 40; vote.sync.ballot.b32 %r5, %p2, -1;
        redux.sync.add.u32 %r6, %r1, 0xffffffff;
        st.global.v4.u32 [%rd1], {%r3, %r4, %r5, %r6}; ret;""",
    )
    device = Device()
    out = device.zeros((64, 4), np.uint32)
    module.launch("k", 1, 64, [out], device)
    up, idx, ballot, total = out.array.T
    thread = np.arange(64)
    assert (up == np.where(thread % 32 == 0, 99, thread - 1)).all()
    assert (idx == thread // 32 * 32 + 5).all()
    assert (ballot == np.where(thread < 32, 0xFFFFFFFF, 0xFF)).all()
    assert (total == np.where(thread < 32, 496, 1520)).all()


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        ("down.b32 %r2, %r1, 3, 31", lambda t: t + 3 if t + 3 < 32 else t),
        ("bfly.b32 %r2, %r1, 5, 31", lambda t: t ^ 5),
        ("down.b32 %r2, %r1, 2, 0x181f", lambda t: t + 2 if t % 8 + 2 < 8 else t),  # segments of 8
        ("idx.b32 %r2, %r1, 3, 0x1c1f", lambda t: t // 4 * 4 + 3),  # segments of 4
        ("up.b32 %r2, %r1, 1, 0x1800", lambda t: t - 1 if t % 8 else t),
    ],
)
def test_shuffles(mode, source):
    """Lanes beyond the segment keep their own value."""
    module = assemble(["u64"], f"mov.u32 %r1, %tid.x; shfl.sync.{mode}, -1; {STORE_R2} ret;")
    assert run(module, 32) == [source(t) for t in range(32)]


@pytest.mark.parametrize("how", ["all", "any", "uni"])
def test_votes(how):
    """Warps of threads that all say yes, in part, and all no."""
    body = f"""mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 40; vote.sync.{how}.pred %p2, %p1, -1;
        selp.u32 %r2, 1, 0, %p2; {STORE_R2} ret;"""
    want = {"all": [1, 0, 0], "any": [1, 1, 0], "uni": [1, 0, 1]}[how]
    assert run(assemble(["u64"], body), 96) == [x for x in want for _ in range(32)]


def test_masks_of_some_threads():
    """Half a warp works alone, while the others are elsewhere."""
    body = f"""mov.u32 %r1, %tid.x; mov.u32 %r2, 0; setp.ge.u32 %p1, %r1, 16; @%p1 bra $end;
        redux.sync.max.u32 %r2, %r1, 0xffff; activemask.b32 %r3; add.u32 %r2, %r2, %r3; $end: {STORE_R2} ret;"""
    assert run(assemble(["u64"], body), 32) == [15 + 0xFFFF] * 16 + [0] * 16
    elect = f"elect.sync %r3|%p1, 0xfffffff0; selp.u32 %r2, 1, %r3, %p1; {STORE_R2}"
    body = f"mov.u32 %r1, %tid.x; mov.u32 %r2, 0; setp.lt.u32 %p2, %r1, 4; @%p2 bra $end; {elect} $end: ret;"
    assert run(assemble(["u64"], body), 32) == [7] * 4 + [1] + [4] * 27


@pytest.mark.parametrize(
    ("operation", "want"),
    [
        ("redux.sync.add.s32 %r2, %r1, -1", [496, 1520]),
        ("redux.sync.min.u32 %r2, %r1, -1", [0, 32]),
        ("redux.sync.and.b32 %r2, %r1, -1", [0, 32]),
        ("redux.sync.or.b32 %r2, %r1, -1", [31, 63]),
        ("redux.sync.xor.b32 %r2, %r1, -1", [0, 0]),
        ("mov.b32 %r3, 0x7FC00000; redux.sync.max.f32 %r2, %r3, -1", [0x7FFFFFFF] * 2),
        ("cvt.rn.f32.u32 %f1, %r1; redux.sync.max.f32 %f2, %f1, -1; cvt.rzi.u32.f32 %r2, %f2", [31, 63]),
        ("redux.sync.min.NaN.f32 %r2, %r3, -1; mov.b32 %r2, 5", [5, 5]),
    ],
)
def test_reductions_over_a_warp(operation, want):
    """Each warp on its own."""
    got = run(assemble(["u64"], f"mov.u32 %r1, %tid.x; {operation}; {STORE_R2} ret;"), 64)
    if "0x7FC00000" in operation:
        assert all(value & 0x7FC00000 == 0x7FC00000 for value in got)
    else:
        assert got == [value for value in want for _ in range(32)]


def test_warp_operation_with_threads_that_left_is_found():
    """The mask names all, but half of them have exited, or wait at another operation; or the caller is not named."""
    branch = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @%p1 bra $e;"
    shuffle = "shfl.sync.bfly.b32 %r2, %r1, {distance}, 31, {mask};"
    left = assemble([], f"{branch} {shuffle.format(distance=1, mask=-1)} $e: ret;")
    with pytest.raises(PTXError, match="exited"):
        left.launch("k", 1, 32)
    left.launch("k", 1, 32, strict=False)
    across = assemble([], f"{branch} {shuffle.format(distance=16, mask=-1)} $e: ret;")
    with pytest.raises(PTXError, match="reads lane"):
        across.launch("k", 1, 32, strict=False)
    first, second = shuffle.format(distance=1, mask=-1), shuffle.format(distance=2, mask=-1)
    with pytest.raises(PTXError, match="deadlock"):
        assemble([], f"{branch} {first} bra.uni $x; $e: {second} $x: ret;").launch("k", 1, 32)
    with pytest.raises(PTXError, match="does not name the calling thread"):
        assemble([], f"mov.u32 %r1, %tid.x; {shuffle.format(distance=1, mask=0xFFFF)} ret;").launch("k", 1, 32)


def test_warp_operation_waits_for_threads_that_come_later():
    """Threads that took the longer way still take part."""
    body = f"""mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @%p1 bra $slow; bra.uni $meet;
        $slow: mov.u32 %r3, 0; $loop: add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, %r1; @%p2 bra $loop; bra.uni $meet;
        $meet: redux.sync.add.u32 %r2, %r1, -1; {STORE_R2} ret;"""
    assert run(assemble(["u64"], body), 64) == [496] * 32 + [1520] * 32


@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_from_shared_memory(count):
    """ldmatrix hands out rows whose addresses other threads give; here each gives that of the row 31 - lane."""
    items = ", ".join(f"%r{5 + j}" for j in range(count))
    pick = " ".join(f"setp.eq.u32 %p1, %r3, {j}; @%p1 mov.b32 %r2, %r{5 + j};" for j in range(count))
    before = """mov.u32 %r1, %tid.x; mov.u32 %r10, s; shl.b32 %r11, %r1, 4; add.u32 %r12, %r10, %r11;
        shl.b32 %r13, %r1, 2; add.u32 %r14, %r13, 1; add.u32 %r15, %r13, 2; add.u32 %r16, %r13, 3;
        st.shared.v4.u32 [%r12], {%r13, %r14, %r15, %r16}; bar.warp.sync -1;
        sub.u32 %r17, 31, %r1; shl.b32 %r17, %r17, 4; add.u32 %r17, %r17, %r10;"""
    load = f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{items}}}, [%r17]"
    shared = ".shared .align 16 .b8 s[528];"
    for matrix in range(count):
        module = assemble(["u64"], f"{before} {load}; mov.u32 %r3, {matrix}; {pick} {STORE_R2} ret;", shared)
        assert run(module, 32, racecheck=True) == [4 * (31 - 8 * matrix - t // 4) + t % 4 for t in range(32)]
    misaligned = assemble([], f"{before} {load.replace(']', '+4]')}; ret;", shared)
    with pytest.raises(PTXError, match="not a multiple of 16"):
        misaligned.launch("k", 1, 32)
    without_all = assemble([], f"{before} setp.lt.u32 %p1, %r1, 3; @%p1 exit; {load}; ret;", shared)
    with pytest.raises(PTXError, match="exited"):
        without_all.launch("k", 1, 32)
    with pytest.raises(PTXError, match="all threads of a warp"):
        without_all.launch("k", 1, 32, strict=False)
    for variant in (load.replace(".shared", ""), load.replace("m8n8", "m8n8.trans"), load.replace("b16", "b8")):
        with pytest.raises(Unsupported):
            assemble([], f"{before} {variant}; ret;", shared).launch("k", 1, 32)


def test_special_registers():
    """Of a block with three dimensions, which warps cut across."""
    for name, want in (
        ("%tid.x", lambda t: t % 4),
        ("%tid.y", lambda t: t // 4 % 5),
        ("%tid.z", lambda t: t // 20),
        ("%ntid.y", lambda t: 5),
        ("%laneid", lambda t: t % 32),
        ("%warpid", lambda t: t // 32),
        ("%nwarpid", lambda t: 2),
        ("%lanemask_lt", lambda t: (1 << t % 32) - 1),
        ("%lanemask_ge", lambda t: ~((1 << t % 32) - 1) & 0xFFFFFFFF),
        ("%lanemask_gt", lambda t: ~((2 << t % 32) - 1) & 0xFFFFFFFF),
        ("%nctaid.x", lambda t: 1),
        ("%total_smem_size", lambda t: 16),
    ):
        module = assemble(
            ["u64"],
            f"""ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mov.u32 %r3, %tid.y; mov.u32 %r4, %tid.z;
            mad.lo.u32 %r3, %r4, 5, %r3; mad.lo.u32 %r1, %r3, 4, %r1; mul.wide.u32 %rd2, %r1, 4;
            add.s64 %rd1, %rd1, %rd2; mov.u32 %r2, {name}; st.global.u32 [%rd1], %r2; ret;""",
        )
        device = Device()
        out = device.zeros(60, np.uint32)
        module.launch("k", 1, (4, 5, 3), [out], device, shared_bytes=16)
        assert out.array.tolist() == [want(t) for t in range(60)], name
    with pytest.raises(Unsupported, match=r"special register %cluster_ctaid.x.*|PTX line"):
        assemble([], "mov.u32 %r1, %cluster_ctaid.x; ret;").launch("k", 1, 32)
