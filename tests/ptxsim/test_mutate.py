"""The mutants of a kernel: what is changed, and that nothing else is."""

import pytest

from ptxsim import Module, PTXError, Unsupported
from ptxsim.instructions import compile_kernel
from ptxsim.mutate import mutants, survivors

TEXT = """.version 8.0
.target sm_80
.address_size 64
.visible .entry other(.param .u64 p) { .reg .b32 %r<3>; add.u32 %r1, %r1, %r2; ret; }
.visible .entry step(.param .u64 p) {
.reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
"""


def changes(*lines):
    """{line: what the mutants of these lines in the body of a kernel have instead}"""
    text = TEXT + "\n".join(lines) + "\nret;\n}\n"
    found = {}
    for mutant in mutants(text, "step"):
        assert mutant.original == text.split("\n")[mutant.line - 1].strip()
        before, after = text.split("\n"), mutant.text.split("\n")
        assert [i + 1 for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [mutant.line]
        found.setdefault(mutant.original, []).append(mutant.changed)
    return found


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ("add.f32 %r1, %r2, %r3;", ["sub.f32 %r1, %r2, %r3;"]),
        ("sub.rn.f32 %r1, %r2, %r3;", ["add.rn.f32 %r1, %r2, %r3;", "sub.rn.f32 %r1, %r3, %r2;"]),
        ("mul.f32 %r1, %r2, %r3;", ["add.f32 %r1, %r2, %r3;"]),
        ("mul.lo.s32 %r1, %r2, %r3;", ["add.s32 %r1, %r2, %r3;"]),
        ("fma.rn.f32 %r1, %r2, %r3, %r4;", ["mul.rn.f32 %r1, %r2, %r3;", "fma.rn.f32 %r1, %r2, %r4, %r3;"]),
        ("div.rn.f32 %r1, %r2, %r3;", ["mul.rn.f32 %r1, %r2, %r3;", "div.rn.f32 %r1, %r3, %r2;"]),
        ("div.full.f32 %r1, %r2, %r3;", ["mul.f32 %r1, %r2, %r3;", "div.full.f32 %r1, %r3, %r2;"]),
        ("sqrt.rn.f32 %r1, %r2;", ["abs.f32 %r1, %r2;"]),
        ("abs.f32 %r1, %r2;", ["mov.b32 %r1, %r2;"]),
        ("add.s64 %rd1, %rd2, %rd3;", ["sub.s64 %rd1, %rd2, %rd3;"]),
        ("shl.b64 %rd1, %rd2, %r3;", ["shr.u64 %rd1, %rd2, %r3;"]),
        ("shr.u32 %r1, %r2, 4;", ["shl.b32 %r1, %r2, 4;", "shr.u32 %r1, %r2, 5;"]),
        ("mul.wide.u32 %rd1, %r2, 4;", ["mul.wide.u32 %rd1, %r2, 1;", "mul.wide.u32 %rd1, %r2, 5;"]),
        ("mad.lo.s32 %r1, %r2, %r3, %r4;", ["mul.lo.s32 %r1, %r2, %r3;"]),
        ("setp.lt.s32 %p1, %r1, %r2;", ["setp.le.s32 %p1, %r1, %r2;"]),
        ("setp.ge.s64 %p1, %rd1, %rd2;", ["setp.gt.s64 %p1, %rd1, %rd2;"]),
        ("setp.eq.s32 %p1, %r1, 0;", ["setp.ne.s32 %p1, %r1, 0;", "setp.eq.s32 %p1, %r1, 1;"]),
        ("setp.neu.f32 %p1, %r1, %r2;", ["setp.equ.f32 %p1, %r1, %r2;"]),
        ("cvt.f32.f16 %r1, %r2;", ["cvt.rn.f32.u16 %r1, %r2;"]),
        ("cvt.rn.bf16.f32 %r1, %r2;", ["cvt.rz.bf16.f32 %r1, %r2;"]),
        (
            "cvt.rn.bf16x2.f32 %r1, %r2, %r3;",
            ["cvt.rn.bf16x2.f32 %r1, %r3, %r2;", "cvt.rz.bf16x2.f32 %r1, %r2, %r3;"],
        ),
        ("cvt.rzi.s32.f32 %r1, %r2;", ["cvt.rni.s32.f32 %r1, %r2;"]),
        ("cvt.u64.u32 %rd1, %r2;", None),
        ("st.global.u32 [%rd1], %r1;", ["", "st.global.u32 [%rd1+4], %r1;"]),
        (
            "st.global.v2.u32 [%rd1+8], {%r1, %r2};",
            ["st.global.v2.u32 [%rd1+8], {%r2, %r1};", "", "st.global.v2.u32 [%rd1+16], {%r1, %r2};"],
        ),
        ("ld.param.u64 %rd1, [p];", ["ld.param.u64 %rd1, [p+8];"]),
        ("ld.global.b16 %r1, [%rd1+-4];", ["ld.global.b16 %r1, [%rd1+-2];"]),
        ("shfl.sync.down.b32 %r1, %r2, 16, 31, -1;", ["shfl.sync.down.b32 %r1, %r2, 8, 31, -1;"]),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", ["shfl.sync.bfly.b32 %r1, %r2, 3, 31, -1;"]),
        ("bar.sync 0;", [""]),
        ("atom.global.add.f32 %r1, [%rd1], %r2;", ["", "atom.global.add.f32 %r1, [%rd1+4], %r2;"]),
        (
            "red.global.add.u32 [%rd1], %r2;",
            ["red.global.max.u32 [%rd1], %r2;", "", "red.global.add.u32 [%rd1+4], %r2;"],
        ),
        ("min.s64 %rd1, %rd2, %rd3;", ["max.s64 %rd1, %rd2, %rd3;"]),
        ("and.b64 %rd1, %rd2, 15;", ["or.b64 %rd1, %rd2, 15;", "and.b64 %rd1, %rd2, 14;"]),
        ("selp.b32 %r1, %r2, %r3, %p1;", ["selp.b32 %r1, %r3, %r2, %p1;"]),
        ("@%p1 mov.u32 %r1, %r2;", ["@!%p1 mov.u32 %r1, %r2;", "mov.u32 %r1, %r2;"]),
        ("@!%p1 bra $end; $end:", ["@%p1 bra $end; $end:", "bra $end; $end:"]),
        ("$loop: @%p1 bra $loop;", ["$loop: @!%p1 bra $loop;"]),
        ("mov.f32 %r1, 0f3F800000;", ["mov.f32 %r1, 0f3FC00000;"]),
        ("mov.f32 %r1, 0f00000000;", ["mov.f32 %r1, 0f3F800000;"]),
        ("mov.f32 %r1, 0fFF800000;", ["mov.f32 %r1, 0fFF7FFFFF;"]),
        ("mov.f64 %rd1, 0d7FF0000000000000;", ["mov.f64 %rd1, 0d7FEFFFFFFFFFFFFF;"]),
        ("mov.u32 %r1, 0x10;", ["mov.u32 %r1, 17;"]),
        ("mov.u32 %r1, %tid.x;", None),
        ("{ mov.b32 %r1, {%r2, %r3}; }", ["{ mov.b32 %r1, {%r3, %r2}; }"]),
        ("ret;", None),
    ],
)
def test_mutants_of_an_instruction(original, expected):
    """One change at a time, each of which a wrong kernel may have."""
    assert changes(original).get(original) == expected


def test_only_the_entry_is_mutated():
    """Instructions of other kernels, declarations, comments and the mask of a shuffle stay as they are."""
    body = ["// add.f32 %r1, %r2, %r3;", ".reg .b32 %x<5>;", "add.u32 %r1, %r1, %r2; sub.u32 %r1, %r1, %r1; // add"]
    got = changes(*body)
    assert list(got) == [body[2]]
    assert got[body[2]] == [
        "sub.u32 %r1, %r1, %r2; sub.u32 %r1, %r1, %r1; // add",
        "add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r1; // add",
    ]


def test_entry_by_a_part_of_its_name():
    """As for Module.entry."""
    text = TEXT + "add.u32 %r1, %r1, %r2;\nret;\n}\n"
    assert [mutant.line for mutant in mutants(text, "ste")] == [7]
    assert [mutant.line for mutant in mutants(text, "other")] == [4]
    with pytest.raises(LookupError):
        next(mutants(text, "e"))


@pytest.mark.parametrize(("name", "entry"), [("adam", "adam_bf16"), ("reduce", "norm_final"), ("torture", "warps")])
def test_mutants_of_compiled_kernels_are_valid(ptx_of, name, entry):
    """A mutant that the simulator refuses would say nothing about a test."""
    text, count = ptx_of(name, "sm_80"), 0
    for mutant in mutants(text, entry):
        compile_kernel(Module(mutant.text).kernel(entry))
        count += 1
    assert count > 30


def test_survivors_are_what_a_check_accepts():
    """AssertionError and PTXError reject a mutant, other errors are mistakes of the check."""
    text = TEXT + "add.u32 %r1, %r1, %r2;\nst.global.u32 [%rd1], %r1;\nbar.sync 0;\nret;\n}\n"

    def check(module):
        opcodes = [instruction.opcode for instruction in module.kernel("step").instructions]
        if "st" not in opcodes:
            raise PTXError("no store")
        if "bar" not in opcodes:
            raise Unsupported("no barrier")
        assert "add" in opcodes

    missed = survivors(text, "step", check)
    assert [repr(mutant) for mutant in missed] == [
        "<line 8: st.global.u32 [%rd1], %r1; -> st.global.u32 [%rd1+4], %r1;>"
    ]
    with pytest.raises(ZeroDivisionError):
        survivors(text, "step", lambda module: 1 // 0)
