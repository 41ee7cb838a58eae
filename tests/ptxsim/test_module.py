"""Modules: their entries, what a launch accepts and refuses, what it counts."""

import ctypes

import numpy as np
import pytest

from ptxsim import Device, Module, PTXError, Unsupported
from ptxsim.testing import assemble

KERNEL = ".visible .entry {name}(.param .u64 p) {{ .reg .b64 %rd<2>; {body} ret; }}\n"
HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


def module_of(**bodies):
    return Module(HEADER + "".join(KERNEL.format(name=name, body=body) for name, body in bodies.items()))


def test_entries_by_a_part_of_their_name(nvcc):
    """Templates have mangled names, which a test should not have to spell out."""
    module = nvcc("saxpy", "sm_75")
    assert sorted(module.entries()) == ["_Z5scaleIdEvPT_S0_", "_Z5scaleIfEvPT_S0_", "saxpy"]
    assert module.entry("saxpy") == module.entry("sax") == "saxpy"
    assert module.entry("scaleId") == "_Z5scaleIdEvPT_S0_"
    for name in ("scale", "nothing", None):
        with pytest.raises(LookupError, match=r"(2|0|3) entries .*there are: "):
            module.entry(name)
    x = np.arange(3.0)
    module.launch("scaleId", 1, 3, [x, 2.0])
    assert x.tolist() == [0, 2, 4]


def test_a_full_name_is_not_taken_for_a_part():
    """step and step_half: "step" is the first."""
    module = module_of(step="", step_half="")
    assert module.entry("step") == "step"
    assert module.entry("half") == "step_half"
    assert module_of(only="").entry() == "only"


def test_entries_are_parsed_when_they_are_launched():
    """A module may hold kernels that the simulator does not support; parsing one does not parse the others."""
    module = module_of(good="", bad="mma.sync.aligned.m8n8k4.row.col.f16.f16.f16.f16 {%rd1}, {%rd1}, {%rd1}, {%rd1};")
    module.launch("good", 1, 32, [0])
    assert module.kernel("good") is module.kernel("good")
    with pytest.raises(Unsupported, match="mma"):
        module.launch("bad", 1, 32, [0])


def test_second_launch_does_not_compile_again():
    """Closures stay with the kernel."""
    module = module_of(k="")
    module.launch("k", 1, 32, [0])
    executes = [instruction.execute for instruction in module.kernel("k").instructions]
    module.launch("k", 2, 64, [0])
    assert executes == [instruction.execute for instruction in module.kernel("k").instructions]


def test_text_that_is_no_ptx_is_refused():
    for text in ("", "hello", ".version 8.0\n", HEADER + ".entry k() { ret;"):
        with pytest.raises(PTXError):
            Module(text)


def test_comments_debug_information_and_pragmas_do_not_matter():
    """They keep the numbers of the lines, which errors name."""
    text = (
        HEADER
        + """// a comment { with a brace
.visible .entry k( /* several
lines */ )
.maxntid 128
{
    .reg .b32 %r<3>;
    .loc 1 2 3
    .pragma "nounroll";
$L__1: // another
    /* } */ mov.u32 %r1, 1; trap; // line 13
    ret;
}
.file 1 "a{b.cu"
.section .debug_str { .b8 1,2 }
"""
    )
    with pytest.raises(PTXError, match="PTX line 13: trap"):
        Module(text).launch("k", 1, 32)


def test_limits_of_a_launch(nvcc):
    """What a GPU refuses, and what the kernel was compiled for."""
    module = nvcc("saxpy", "sm_75")
    x = np.zeros(4, np.float32)
    for grid, block in ((1, 2048), (1, 0), (0, 32), (1, (1, 1, 65)), ((1, 70000), 32)):
        with pytest.raises(PTXError, match="launch limits"):
            module.launch("saxpy", grid, block, [x, x, 4])
    with pytest.raises(PTXError, match="takes 3 arguments, got 2"):
        module.launch("saxpy", 1, 32, [x, x])
    text = ".visible .entry k() {directive} {{ ret; }}"
    with pytest.raises(PTXError, match="reqntid"):
        Module(HEADER + text.format(directive=".reqntid 128")).launch("k", 1, 64)
    with pytest.raises(PTXError, match="maxntid"):
        Module(HEADER + text.format(directive=".maxntid 16, 2, 1")).launch("k", 1, 64)
    Module(HEADER + text.format(directive=".maxntid 16, 4, 1 .minnctapersm 2")).launch("k", 1, 64)
    with pytest.raises(PTXError, match="shared memory"):
        assemble([], "ret;").launch("k", 1, 32, shared_bytes=228 << 10)
    with pytest.raises(PTXError, match="32772 parameter bytes"):
        Module(HEADER + ".visible .entry k(.param .align 4 .b8 p[32772]) { ret; }").launch("k", 1, 32, [bytes(32772)])


def test_arguments():
    """Numbers, numpy scalars, structs by value as bytes or ctypes, arrays that are copied in and back."""

    class Pair(ctypes.Structure):
        _fields_ = [("first", ctypes.c_uint8), ("second", ctypes.c_uint32)]

    module = Module(
        HEADER
        + """.visible .entry k(.param .u64 out, .param .align 4 .b8 pair[8], .param .u32 u, .param .f32 f,
        .param .s16 s)
        { .reg .b32 %r<9>; .reg .b64 %rd<9>; ld.param.u64 %rd1, [out]; ld.param.u8 %r1, [pair];
        ld.param.u32 %r2, [pair+4]; ld.param.u32 %r3, [u]; ld.param.b32 %r4, [f]; ld.param.s16 %r5, [s];
        st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4}; st.global.u32 [%rd1+16], %r5; ret; }"""
    )
    void = np.array([(7, 9)], np.dtype([("first", "u1"), ("second", "u4")], align=True))[0]
    for pair in (Pair(7, 9), bytes(Pair(7, 9)), bytearray(Pair(7, 9)), void):
        for number in (-2, 0xFFFFFFFE, np.int32(-2)):
            out = np.zeros(5, np.uint32)
            module.launch("k", 1, 1, [out, pair, number, 1.5, -3])
            assert out.tolist() == [7, 9, 0xFFFFFFFE, 0x3FC00000, 0xFFFFFFFD]
    out = np.zeros(5, np.uint32)
    for arguments, message in (
        ([out, bytes(7), 1, 1.0, 1], "pair is 8 bytes, the argument has 7"),
        ([out, bytes(8), 1 << 32, 1.0, 1], "4294967296 does not fit the 32 bits of u"),
        ([out, bytes(8), 1, 1.0, -40000], "-40000 does not fit"),
        ([out, bytes(8), np.int64(1), 1.0, 1], "u is 4 bytes, the argument has 8"),
        ([Device().zeros(5, np.uint32), bytes(8), 1, 1.0, 1], "belongs to another Device"),
    ):
        with pytest.raises(PTXError, match=message):
            module.launch("k", 1, 1, arguments)
    with pytest.raises(PTXError, match="takes 5 arguments"):
        module.launch("k", 1, 1, [out, bytes(8)])
    module.launch("k", 1, 1, [out, bytes(8)], pad_args=True)
    assert not out.any()


def test_large_struct_by_value():
    """Tables of pointers of up to 32764 bytes travel as one parameter."""
    module = Module(
        HEADER
        + """.visible .entry k(.param .u64 out, .param .align 4 .b8 table[32756]) {
        .reg .b32 %r<9>; .reg .b64 %rd<9>; mov.u32 %r1, %tid.x; mul.wide.u32 %rd1, %r1, 4; mov.b64 %rd2, table;
        add.s64 %rd3, %rd2, %rd1; ld.param.u32 %r2, [%rd3+28660]; ld.param.u64 %rd4, [out]; add.s64 %rd4, %rd4, %rd1;
        st.global.u32 [%rd4], %r2; ret; }"""
    )
    table = np.arange(8189, dtype=np.uint32)
    out = np.zeros(1024, np.uint32)
    module.launch("k", 1, 1024, [out, table.tobytes()])
    assert (out == table[7165:]).all()


def test_arrays_that_were_copied_in_do_not_stay():
    """An array argument is a buffer for one launch alone, also when that fails."""
    device = Device()
    module = assemble(["u64"], "ld.param.u64 %rd1, [p0]; st.global.u32 [%rd1+4], 1; ret;")
    module.launch("k", 1, 1, [np.zeros(2, np.uint32)], device)
    with pytest.raises(PTXError):
        module.launch("k", 1, 1, [np.zeros(1, np.uint32)], device)
    assert device.buffers == []


@pytest.mark.parametrize(
    "instruction",
    [
        "max.xorsign.abs.f32 %f1, %f2, %f3",
        "add.f32 %f1, %f2, %f3, %f4",
        "add.foo.u32 %r1, %r2, %r3",
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2",
        "ld.global.bar.u32 %r1, [%rd1]",
        "cvt.rs.bf16x2.f32 %r1, %f1, %f2, %r3",
        "mma.sync.aligned.m8n8k4.row.col.f16.f16.f16.f16 {%r1}, {%r2}, {%r3}, {%r4}",
        "ld.global.v4.u32 {%r1, %r2}, [%rd1]",
        "st.global.u32 [%rd1], {%r1, %r2}",
        "shfl.down.b32 %r1, %r2, 1, 31",
        "bar.arrive 0, 64",
        "atom.global.add.noftz.f16x2 %r1, [%rd1], %r2",
        "setp.foo.u32 %p1, %r1, %r2",
        "mov.u32 %p1, %r1",
        "mov.u32 %r1, %clusterid.x",
        "bra $nowhere",
        "mad.lo.s32 %r1, %r2, %r3",
        "mul.u32 %r1, %r2, %unknown",
        "cp.async.bulk.shared.global [%rd1], [%rd2], 16",
        "tex.1d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [%rd1, {%r1}]",
    ],
)
def test_unknown_syntax_is_refused(instruction):
    """A modifier or an operand that the simulator does not know must not be ignored."""
    with pytest.raises((Unsupported, PTXError)):
        assemble([], f"{instruction}; ret;").launch("k", 1, 32)


def test_refusals_name_the_line():
    """Of instructions that are not supported, to see what it is about."""
    with pytest.raises(Unsupported, match=r"k: PTX line 8: add.rz.f32 %f1, %f2, %f3 .*rounding"):
        assemble([], "add.rz.f32 %f1, %f2, %f3; ret;").launch("k", 1, 32)


def test_statistics():
    """Bytes, widths, instructions, coverage, and a report that names the buffers."""
    module = assemble(
        ["u64", "u64"],
        """ld.param.u64 %rd1, [p0]; ld.param.u64 %rd2, [p1]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 8;
        add.s64 %rd1, %rd1, %rd3; add.s64 %rd2, %rd2, %rd3; setp.lt.u32 %p1, %r1, 10; @!%p1 bra $end;
        ld.global.v2.u32 {%r2, %r3}, [%rd1]; st.global.u32 [%rd2], %r2; setp.gt.u32 %p2, %r1, 99; @%p2 trap;
        bra.uni $end; mov.u32 %r4, 0; $end: ret;""",
    )
    device = Device()
    x, y = device.zeros(64, np.uint32, "x"), device.zeros(64, np.uint32, "y")
    stats = module.launch("k", 2, 32, [x, y], device)
    assert stats.bytes("ld") == 2 * 10 * 8
    assert stats.widths("st") == {4: 20}
    assert stats.bytes("atom") == 0
    assert stats.buffer_bytes == {("x", "ld"): 160, ("y", "st"): 80}
    assert stats.opcodes()["st.global.u32"] == 20
    assert stats.opcodes()["mov.u32"] == 64
    assert stats.opcodes()["trap"] == 0
    assert [text for _, text in stats.uncovered()] == ["@%p2 trap", "mov.u32 %r4, 0"]
    assert stats.thread_instructions == sum(stats.opcodes().values())
    report = stats.report()
    for expected in ("k grid (2, 1, 1) block (32, 1, 1)", "global ld: 160 bytes (20 x 8B)", "y: st 80 bytes"):
        assert expected in report
