"""Local, shared, constant and parameter memory, module variables, and generic addresses of them."""

import numpy as np
import pytest

from ptxsim import Device, Module, PTXError, Unsupported
from ptxsim.testing import assemble

STORE_R2 = """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
    st.global.u32 [%rd1], %r2;"""


def run(module, threads=32, **options):
    """What kernel k stores for each thread of one block."""
    out = np.zeros(threads, np.uint32)
    module.launch("k", 1, threads, [out], **options)
    return out


def test_local_constant_and_module_memory():
    """Each thread has its own local memory; constants and module variables start with their initializers."""
    module = assemble(
        ["u64"],
        f"""mov.u32 %r1, %tid.x; .local .align 8 .b8 depot[16]; mov.u64 %rd1, depot; cvta.local.u64 %rd2, %rd1;
        st.u32 [%rd2+4], %r1; ld.local.u32 %r2, [%rd1+4];
        ld.const.u32 %r3, [tab+4]; mov.u64 %rd3, g; ld.global.u32 %r4, [%rd3]; ld.u32 %r5, [%rd3+4];
        add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; add.u32 %r2, %r2, %r5; {STORE_R2} ret;""",
        ".const .align 4 .u32 tab[2] = {5, 700};\n.global .align 4 .u32 g[2] = {40};",
    )
    assert (run(module) == np.arange(32) + 740).all()


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("mov.u64 %rd1, depot; ld.local.u32 %r1, [%rd1+8];", "out-of-bounds ld of 4 bytes at local offset 8 of 8"),
        ("mov.u64 %rd1, depot; ld.local.u32 %r1, [%rd1+2];", "misaligned ld of 4 bytes at local offset 2"),
        ("mov.u64 %rd1, depot; ld.local.v2.u32 {%r1, %r2}, [%rd1+4];", "out-of-bounds ld of 8 bytes at local"),
        ("st.shared.u32 [s+2], %r1;", "misaligned st of 4 bytes at shared offset 2"),
        ("st.shared.u32 [s+8], %r1;", "out-of-bounds st of 4 bytes at shared offset 8 of 8"),
        ("mov.u32 %r2, s; ld.shared.u32 %r1, [%r2+-4];", "out-of-bounds ld of 4 bytes at shared offset -4"),
        ("ld.const.u32 %r1, [c+8];", "out-of-bounds ld of 4 bytes at const offset 8 of 8"),
        ("mov.u64 %rd1, c; cvta.const.u64 %rd1, %rd1; st.u32 [%rd1], %r1;", "st to read-only const memory"),
        ("ld.param.u32 %r1, [p0+8];", r"out-of-bounds ld at parameter p0\+8"),
        ("mov.u64 %rd1, s; cvta.shared.u64 %rd1, %rd1; ld.u32 %r1, [%rd1+8];", "at shared offset 8 of 8"),
        ("mov.u64 %rd1, s; cvta.shared.u64 %rd1, %rd1; ld.global.u32 %r1, [%rd1];", "generic address of shared memory"),
        ("mov.u64 %rd1, depot; cvta.local.u64 %rd1, %rd1; atom.add.u32 %r1, [%rd1], 1;", "atomic on local memory"),
    ],
)
def test_wrong_accesses_are_found(instruction, message):
    """The bounds are those of the memory, to the byte, and vectors count as a whole."""
    declarations = ".shared .align 8 .b8 s[8];\n.const .align 8 .b8 c[8];"
    module = assemble(["u64"], f".local .align 8 .b8 depot[8]; {instruction} ret;", declarations)
    with pytest.raises(PTXError, match=message):
        module.launch("k", 1, 32, [0])


def test_memory_and_registers_hold_garbage_at_first():
    """A kernel that forgets to initialize must not find zeros."""
    for code in ("ld.shared.u32 %r2, [s];", "ld.local.u32 %r2, [depot];", "mov.b32 %r2, %r7;"):
        declarations = ".shared .align 4 .b8 s[4];"
        assert run(assemble(["u64"], f".local .align 4 .b8 depot[4]; {code} {STORE_R2} ret;", declarations)).all()


def test_generic_accesses_to_several_spaces_at_once():
    """Threads of one instruction may point to shared, local and global memory, in vectors as well."""
    module = assemble(
        ["u64", "u64"],
        f""".local .align 8 .b8 depot[8]; mov.u32 %r1, %tid.x; ld.param.u64 %rd3, [p1];
        mov.u64 %rd4, s; cvta.shared.u64 %rd4, %rd4; mov.u64 %rd5, depot; cvta.local.u64 %rd5, %rd5;
        setp.lt.u32 %p1, %r1, 10; setp.lt.u32 %p2, %r1, 20; selp.b64 %rd6, %rd4, %rd5, %p1;
        selp.b64 %rd6, %rd6, %rd3, %p2; mul.lo.u32 %r5, %r1, 8; cvt.u64.u32 %rd7, %r5;
        @!%p2 add.s64 %rd6, %rd6, %rd7; @%p1 add.s64 %rd6, %rd6, %rd7;
        add.u32 %r6, %r1, 100; st.v2.u32 [%rd6], {{%r1, %r6}}; ld.v2.u32 {{%r7, %r8}}, [%rd6];
        isspacep.shared %p3, %rd6; isspacep.global %p4, %rd6; isspacep.local %p5, %rd6;
        sub.u32 %r2, %r8, %r7; @%p3 add.u32 %r2, %r2, 1; @%p4 add.u32 %r2, %r2, 2; @%p5 add.u32 %r2, %r2, 3;
        {STORE_R2} ret;""",
        ".shared .align 8 .b8 s[80];",
    )
    device = Device()
    out, there = device.zeros(32, np.uint32), device.zeros(64, np.uint32)
    stats = module.launch("k", 1, 32, [out, there], device)
    assert out.array.tolist() == [101] * 10 + [103] * 10 + [102] * 12
    assert there.array[40:].tolist() == [x for t in range(20, 32) for x in (t, t + 100)]
    assert stats.widths("st", "shared") == {8: 10}
    assert stats.widths("ld", "local") == {8: 10}
    assert stats.buffer_bytes["buffer1", "st"] == 8 * 12


def test_shared_variables_of_each_kernel_have_their_own_places():
    """Two kernels of a module that use different shared variables, launched in turns."""
    kernel = """.visible .entry {name}(.param .u64 p0) {{
        .reg .b32 %r<9>; .reg .b64 %rd<9>; mov.u32 %r1, %tid.x; st.shared.u32 [{variable}], 7;
        ld.shared.u32 %r2, [{variable}]; ld.param.u64 %rd1, [p0]; st.global.u32 [%rd1], %r2; ret; }}"""
    module = Module(
        ".version 8.0\n.target sm_80\n.shared .align 4 .b8 big[1024];\n.shared .align 4 .b8 small[4];\n"
        + kernel.format(name="uses_big", variable="big")
        + kernel.format(name="uses_both", variable="big").replace("ret;", "st.shared.u32 [small], %r2; ret;")
        + kernel.format(name="uses_small", variable="small")
    )
    for name in ("uses_small", "uses_both", "uses_small", "uses_big", "uses_small"):
        out = np.zeros(1, np.uint32)
        module.launch(name, 1, 1, [out])
        assert out[0] == 7
    sizes = [module.kernel(name).shared_bytes for name in ("uses_small", "uses_both", "uses_big")]
    assert sizes == [4, 1028, 1024]


def test_dynamic_shared_memory_lies_behind_the_static():
    """An extern array has the size that the launch gives it."""
    module = assemble(
        ["u64"],
        f"st.shared.u32 [fixed], 5; st.shared.u32 [dynamic+12], 9; ld.shared.u32 %r2, [dynamic+12]; {STORE_R2} ret;",
        ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 4 .b8 fixed[4];",
    )
    assert run(module, shared_bytes=16)[0] == 9
    with pytest.raises(PTXError, match="at shared offset 28 of 28"):
        run(module, shared_bytes=12)


def test_module_variables_live_as_long_as_their_device():
    """Their values last from launch to launch, and are not those of another device."""
    body = f"""mov.u64 %rd3, counter; ld.global.u32 %r2, [%rd3]; {STORE_R2} add.u32 %r2, %r2, 1;
        st.global.u32 [%rd3], %r2; ret;"""
    module = assemble(["u64"], body, ".global .align 4 .u32 counter = 10;")
    device = Device()
    assert [run(module, 1, device=device)[0] for _ in range(3)] == [10, 11, 12]
    assert module.symbol("counter", device).array.view(np.uint32)[0] == 13
    assert [run(module, 1)[0] for _ in range(20)] == [10] * 20
    assert run(module, 1, device=device)[0] == 13


def test_initializers():
    """Integers, floats in hex and decimal, several in an array; addresses are refused."""
    declarations = """.const .align 8 .b8 bytes[4] = {1, 2, 255, 0x10};
        .const .f32 f[2] = {0f3F800000, 0fC0000000}; .const .align 8 .u64 wide = 0x123456789abcdef0;"""
    body = """ld.const.u32 %r2, [bytes]; ld.const.u32 %r3, [f]; ld.const.u32 %r4, [f+4]; ld.const.u64 %rd3, [wide];
        ld.param.u64 %rd1, [p0]; st.global.v2.u32 [%rd1], {%r2, %r3}; st.global.u32 [%rd1+8], %r4;
        st.global.u64 [%rd1+16], %rd3; ret;"""
    out = np.zeros(6, np.uint32)
    assemble(["u64"], body, declarations).launch("k", 1, 1, [out])
    assert out.tolist() == [0x10FF0201, 0x3F800000, 0xC0000000, 0, 0x9ABCDEF0, 0x12345678]
    with pytest.raises(Unsupported, match="uses an address"):
        assemble([], "ret;", ".global .u32 a; .global .u64 pointer = a;")


def test_narrow_accesses_extend():
    """Signed loads extend the sign, others zeros; stores drop the upper bits."""
    body = f"""ld.param.u64 %rd3, [p1]; ld.global.s8 %r3, [%rd3]; ld.global.u8 %r4, [%rd3]; ld.global.s16 %r5, [%rd3];
        st.global.u8 [%rd3+3], 0x1234; sub.u32 %r2, %r4, %r3; add.u32 %r2, %r2, %r5; {STORE_R2} ret;"""
    device = Device()
    out, data = device.zeros(1, np.uint32), device.buffer(np.array([0x80, 0xFF, 0, 0], np.uint8))
    assemble(["u64", "u64"], body).launch("k", 1, 1, [out, data], device)
    assert out.array.view(np.int32)[0] == 256 + np.uint16(0xFF80).view(np.int16)
    assert data.array.tolist() == [0x80, 0xFF, 0, 0x34]


def test_asynchronous_copies():
    """cp.async of 16 bytes, and of fewer with the rest zero."""
    body = f"""ld.param.u64 %rd3, [p1]; mov.u32 %r3, s; mov.u32 %r4, 8; mov.u32 %r1, %tid.x;
        cp.async.cg.shared.global [%r3], [%rd3], 16; cp.async.ca.shared.global [%r3+16], [%rd3], 16, %r4;
        cp.async.commit_group; cp.async.wait_group 0; shl.b32 %r5, %r1, 2; add.u32 %r5, %r5, %r3;
        ld.shared.u32 %r2, [%r5]; {STORE_R2} ret;"""
    device = Device()
    out, data = device.zeros(8, np.uint32), device.buffer(np.arange(1, 5, dtype=np.uint32))
    assemble(["u64", "u64"], body, ".shared .align 16 .b8 s[32];").launch("k", 1, 8, [out, data], device)
    assert out.array.tolist() == [1, 2, 3, 4, 1, 2, 0, 0]


# Atomics


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize(
    ("operation", "start", "end"),
    [
        ("add.u32 %r3, [{at}], %r1", 1000, 1000 + 63 * 32),
        ("max.s32 %r3, [{at}], %r1", 5, 63),
        ("min.s32 %r3, [{at}], %r1", 5, 0),
        ("and.b32 %r3, [{at}], 6", 15, 6),
        ("or.b32 %r3, [{at}], %r1", 128, 191),
        ("xor.b32 %r3, [{at}], 3", 9, 9),
        ("inc.u32 %r3, [{at}], 9", 0, 64 % 10),
        ("dec.u32 %r3, [{at}], 9", 3, (3 - 64) % 10),
        ("exch.b32 %r3, [{at}], 77", 3, 77),
        ("cas.b32 %r3, [{at}], 3, 4", 3, 4),
    ],
)
def test_atomics_of_a_whole_block(space, operation, start, end):
    """64 threads at one address: as if one after another, in every order."""
    prefix = {"global": "atom.global.", "shared": "atom.shared.", "generic": "atom."}[space]
    at = "s" if space == "shared" else "%rd3"
    body = f"""ld.param.u64 %rd3, [p0]; mov.u32 %r1, %tid.x; ld.global.u32 %r5, [%rd3]; st.shared.u32 [s], %r5;
        bar.sync 0; {prefix}{operation.format(at=at)}; bar.sync 0; ld.shared.u32 %r5, [s];
        {"st.global.u32 [%rd3], %r5;" if space == "shared" else ""} ret;"""
    for seed in (None, 1):
        value = np.array([start], np.uint32)
        assemble(["u64"], body, ".shared .align 4 .b8 s[4];").launch("k", 1, 64, [value], seed=seed)
        assert value[0] == end


def test_atomics_return_the_old_value():
    """Each thread gets another ticket; with a seed not in the order of the threads."""
    body = f"ld.param.u64 %rd3, [p1]; atom.global.add.u32 %r2, [%rd3], 1; {STORE_R2} ret;"
    tickets = {}
    for seed in (None, 1):
        device = Device()
        out, counter = device.zeros(64, np.uint32), device.zeros(2, np.uint32)
        stats = assemble(["u64", "u64"], body).launch("k", 1, 64, [out, counter], device, seed=seed, track=True)
        assert sorted(out.array) == list(range(64))
        assert counter.writes.tolist() == counter.reads.tolist() == [64] * 4 + [0] * 4
        assert stats.widths("atom") == {4: 64}
        tickets[seed] = out.array.tolist()
    assert tickets[None] == list(range(64)) != tickets[1]


def test_float_atomics():
    """f32 and f64 sums, f16 and bf16 ones (which stop where one more is lost)."""
    device = Device()
    single, double, half = device.zeros(1, np.float32), device.zeros(1, np.float64), device.zeros(1, np.float16)
    brain = device.buffer(np.array([0x437E], np.uint16))  # 254
    body = """ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; ld.param.u64 %rd3, [p2]; mov.f32 %f1, 0f3F800000;
        atom.global.add.f32 %f2, [%rd1], %f1; red.global.add.f64 [%rd2], 0d3FE0000000000000;
        mov.b16 %h1, 0x3C00; atom.global.add.noftz.f16 %h2, [%rd3], %h1;
        ld.param.u64 %rd4, [p3]; mov.b16 %h1, 0x3F80; atom.global.add.noftz.bf16 %h2, [%rd4], %h1; ret;"""
    assemble(["u64"] * 4, body).launch("k", 2, 32, [single, double, half, brain], device)
    assert (single.array[0], double.array[0], half.array[0]) == (64, 32, 64)
    assert brain.array[0] == 0x4380  # 256
