"""What the tests of the simulator share: small hand-written modules, bit patterns, references."""

import numpy as np

from . import Device, Module
from .numbers import fma32

f32 = np.float32


def assemble(parameters, body, declarations=""):
    """A module around hand-written instructions: kernel k with parameters p0, p1, ... of the given types.

    There are registers %p, %h (16 bits), %r (32), %f (f32), %rd (64) and %d (f64), nine or nineteen of each.
    """
    listed = ", ".join(f".param .{type_name} p{i}" for i, type_name in enumerate(parameters))
    return Module(f""".version 8.0
.target sm_80
.address_size 64
{declarations}
.visible .entry k({listed})
{{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<19>; .reg .f32 %f<9>; .reg .b64 %rd<9>; .reg .f64 %d<9>;
{body}
}}""")


def run_elementwise(instruction, inputs, out_type):
    """Run one instruction, as "add.f32 {d}, {a}, {b}", on arrays; returns an array of out_type.

    Operands are registers of raw bits, as wide as the elements of their arrays.
    """
    names = {2: "%h", 4: "%r", 8: "%rd"}
    out_width = np.dtype(out_type).itemsize
    registers, lines = {"d": f"{names[out_width]}8"}, []
    for i, (operand, array) in enumerate(zip("abc", inputs, strict=False), 1):
        width = array.dtype.itemsize
        registers[operand] = f"{names[width]}{i}"
        lines.append(f"""ld.param.u64 %rd5, [p{i}]; mul.wide.u32 %rd6, %r9, {width}; add.s64 %rd5, %rd5, %rd6;
            ld.global.b{8 * width} {registers[operand]}, [%rd5];""")
    module = assemble(
        ["u64"] * (1 + len(inputs)),
        f"""mov.u32 %r9, %tid.x; mov.u32 %r10, %ctaid.x; mov.u32 %r11, %ntid.x; mad.lo.s32 %r9, %r10, %r11, %r9;
        {" ".join(lines)}
        {instruction.format(**registers)};
        ld.param.u64 %rd5, [p0]; mul.wide.u32 %rd6, %r9, {out_width}; add.s64 %rd5, %rd5, %rd6;
        st.global.b{8 * out_width} [%rd5], {registers["d"]};
        ret;""",
    )
    device = Device()
    out = device.zeros(inputs[0].size, out_type)
    sources = [device.buffer(array) for array in inputs]
    assert inputs[0].size % 32 == 0
    module.launch("k", inputs[0].size // 32, 32, [out, *sources], device)
    return out.array


def random_bits(count=1 << 16, seed=5):
    """Random 32-bit patterns, among them zeros, infinities, NaN, and the ends of the subnormals and of the range."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, count, np.uint64).astype(np.uint32)
    bits[:8] = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x007FFFFF, 0x7F7FFFFF]
    return bits


def fma(a, b, c):
    """a * b + c in float32, rounded once."""
    return fma32(*np.broadcast_arrays(f32(a), f32(b), f32(c)))


def assert_same_bits(got, want):
    """The float32 arrays are the same, bit for bit."""
    different = got.view(np.uint32) != want.view(np.uint32)
    assert not different.any(), f"{np.count_nonzero(different)} of {different.size} differ, first {got[different][:3]}"
