"""Integer instructions one by one."""

import numpy as np
import pytest

from ptxsim import Device
from ptxsim.testing import assemble, random_bits, run_elementwise

BITS = random_bits()
OTHER = random_bits(seed=6)
WIDE = np.random.default_rng(7).integers(0, 1 << 64, 4096, np.uint64)


def test_counting_bits():
    """popc, clz, brev and bfind, of 32 and 64 bits."""
    for bits, width, kind in ((BITS[:4096], 32, np.uint32), (WIDE, 64, np.uint64)):
        values = bits.tolist()
        assert run_elementwise(f"popc.b{width} {{d}}, {{a}}", [bits], np.uint32).tolist() == [
            value.bit_count() for value in values
        ]
        assert run_elementwise(f"clz.b{width} {{d}}, {{a}}", [bits], np.uint32).tolist() == [
            width - value.bit_length() for value in values
        ]
        assert run_elementwise(f"brev.b{width} {{d}}, {{a}}", [bits], kind).tolist() == [
            int(f"{value:0{width}b}"[::-1], 2) for value in values
        ]
        assert run_elementwise(f"bfind.u{width} {{d}}, {{a}}", [bits], np.uint32).tolist() == [
            (value.bit_length() - 1) % (1 << 32) for value in values
        ]


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("add.u32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.u32", lambda a, b: a * b),
        ("mul.hi.u32", lambda a, b: a * b >> 32),
        ("div.u32", lambda a, b: a // b if b else 0xFFFFFFFF),
        ("rem.u32", lambda a, b: a % b if b else a),
        ("min.u32", min),
        ("max.u32", max),
        ("and.b32", lambda a, b: a & b),
        ("or.b32", lambda a, b: a | b),
        ("xor.b32", lambda a, b: a ^ b),
        ("shl.b32", lambda a, b: a << b if b < 32 else 0),
        ("shr.u32", lambda a, b: a >> b if b < 32 else 0),
    ],
)
def test_unsigned_arithmetic(instruction, function):
    """Against the integers of Python, modulo 2^32; shifts by too much give zero."""
    second = OTHER[:4096].copy()
    if instruction.startswith("sh"):
        second %= 50
    got = run_elementwise(f"{instruction} {{d}}, {{a}}, {{b}}", [BITS[:4096], second], np.uint32)
    want = [function(a, b) % (1 << 32) for a, b in zip(BITS[:4096].tolist(), second.tolist(), strict=True)]
    assert got.tolist() == want


def truncated(a, b):
    quotient = abs(a) // abs(b) if b else None
    return -1 if quotient is None else quotient if (a < 0) == (b < 0) else -quotient


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("div.s32", truncated),
        ("rem.s32", lambda a, b: a - truncated(a, b) * b if b else a),
        ("min.s32", min),
        ("max.s32", max),
        ("mul.hi.s32", lambda a, b: a * b >> 32),
        ("add.sat.s32", lambda a, b: max(-(1 << 31), min(a + b, (1 << 31) - 1))),
        ("sub.sat.s32", lambda a, b: max(-(1 << 31), min(a - b, (1 << 31) - 1))),
    ],
)
def test_signed_arithmetic(instruction, function):
    """Division goes toward zero, as in C; saturation stops at the ends."""
    first, second = BITS[8:4104].view(np.int32), OTHER[8:4104].view(np.int32)
    second = np.where(np.arange(second.size) % 2, second, second % 100).astype(np.int32)
    got = run_elementwise(f"{instruction} {{d}}, {{a}}, {{b}}", [first, second], np.int32)
    assert got.tolist() == [function(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]


def test_wide_products():
    """mul.wide and mul.hi of 64 bits do not lose the upper half."""
    got = run_elementwise("mul.wide.u32 {d}, {a}, {b}", [BITS, OTHER], np.uint64)
    assert (got == BITS.astype(np.uint64) * OTHER.astype(np.uint64)).all()
    got = run_elementwise("mul.wide.s32 {d}, {a}, {b}", [BITS, OTHER], np.int64)
    assert (got == BITS.view(np.int32).astype(np.int64) * OTHER.view(np.int32).astype(np.int64)).all()
    second = WIDE[::-1].copy()
    for kind, signed in (("u64", False), ("s64", True)):
        first_values, second_values = (x.view(np.int64 if signed else np.uint64).tolist() for x in (WIDE, second))
        got = run_elementwise(f"mul.hi.{kind} {{d}}, {{a}}, {{b}}", [WIDE, second], np.uint64)
        want = [(a * b >> 64) % (1 << 64) for a, b in zip(first_values, second_values, strict=True)]
        assert got.tolist() == want


def test_carry():
    """64-bit addition and subtraction from 32-bit halves."""
    for opcode, function in (("add", np.add), ("sub", np.subtract)):
        instructions = f"""mov.b64 {{{{%r1, %r2}}}}, {{a}}; mov.b64 {{{{%r3, %r4}}}}, {{b}};
            {opcode}.cc.u32 %r5, %r1, %r3; {opcode}c.u32 %r6, %r2, %r4; mov.b64 {{d}}, {{{{%r5, %r6}}}}"""
        got = run_elementwise(instructions, [WIDE, WIDE[::-1].copy()], np.uint64)
        assert (got == function(WIDE, WIDE[::-1])).all()


def test_funnel_shift():
    """Two words shifted as one, by an amount that wraps or is clamped."""
    amounts = (OTHER % np.uint32(50)).astype(np.uint32)
    for mode, reduce in (("wrap", lambda n: n % 32), ("clamp", lambda n: min(n, 32))):
        triples = list(zip(BITS.tolist(), OTHER.tolist(), amounts.tolist(), strict=True))
        left = run_elementwise(f"shf.l.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}}", [BITS, OTHER, amounts], np.uint32)
        right = run_elementwise(f"shf.r.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}}", [BITS, OTHER, amounts], np.uint32)
        both = [(high << 32 | low, reduce(n)) for low, high, n in triples]
        assert left.tolist() == [(word << n >> 32) & 0xFFFFFFFF for word, n in both]
        assert right.tolist() == [(word >> n) & 0xFFFFFFFF for word, n in both]


def test_fields():
    """bfe with and without sign, bfi; fields that reach beyond the word."""
    positions, lengths = OTHER % np.uint32(40), BITS[::-1] % np.uint32(40)
    triples = list(zip(BITS.tolist(), positions.tolist(), lengths.tolist(), strict=True))
    got = run_elementwise("bfe.u32 {d}, {a}, {b}, {c}", [BITS, positions, lengths], np.uint32)
    assert got.tolist() == [(x >> position) & ((1 << length) - 1) for x, position, length in triples]
    got = run_elementwise("bfe.s32 {d}, {a}, {b}, {c}", [BITS, positions, lengths], np.int32)

    def signed(x, position, length):
        x -= (x >> 31) << 32
        field = (x >> position) & ((1 << length) - 1)
        at = min(position + length - 1, 31)
        return field - (1 << length) if length and (x >> at) & 1 else field

    # As 32 bits: a field may be longer than the word.
    assert [x & 0xFFFFFFFF for x in got.tolist()] == [signed(*triple) & 0xFFFFFFFF for triple in triples]
    got = run_elementwise(
        "mov.b32 %r5, 0x55aa55aa; bfi.b32 {d}, {a}, %r5, {b}, {c}", [BITS, positions, lengths], np.uint32
    )
    masks = [((1 << length) - 1) << position for _, position, length in triples]
    want = [
        (0x55AA55AA & ~mask) | (x << triple[1] & mask)
        for x, mask, triple in zip(BITS.tolist(), masks, triples, strict=True)
    ]
    assert got.tolist() == [x & 0xFFFFFFFF for x in want]


def test_signed_32_bit_carry_is_per_thread():
    """Threads that do not take part keep their carry."""
    module = assemble(
        ["u64"],
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2;
        mov.u32 %r2, -1; add.cc.u32 %r3, %r2, %r1; setp.eq.u32 %p1, %r1, 1; mov.u32 %r5, 0;
        @%p1 add.cc.u32 %r4, %r5, %r5; addc.u32 %r6, %r5, %r5; st.global.u32 [%rd1], %r6; ret;""",
    )
    device = Device()
    out = device.zeros(4, np.uint32)
    module.launch("k", 1, 4, [out], device)
    assert out.array.tolist() == [0, 0, 1, 1]


def test_mixed_constants():
    """Instructions on constants, which are scalars in the simulator and not arrays."""
    module = assemble(
        ["u64"],
        """ld.param.u64 %rd1, [p0]; mov.u32 %r1, -7; mov.u32 %r2, 2; div.s32 %r3, %r1, %r2; rem.s32 %r4, %r1, %r2;
        st.global.v2.u32 [%rd1], {%r3, %r4}; mul.hi.u32 %r5, %r1, %r1; mov.u32 %r6, 0x12345678; mov.u32 %r7, 0xaabbccdd;
        prmt.b32 %r8, %r6, %r7, 0x5410; st.global.v2.u32 [%rd1+8], {%r5, %r8};
        bfe.s32 %r9, %r7, 8, 8; bfi.b32 %r10, %r6, %r7, 8, 16; st.global.v2.u32 [%rd1+16], {%r9, %r10};
        shl.b32 %r11, %r6, 32; shr.s32 %r12, %r7, 40; st.global.v2.u32 [%rd1+24], {%r11, %r12};
        lop3.b32 %r13, %r6, %r7, %r1, 0x96; mov.b64 %rd2, {%r6, %r7}; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r14, %rd2;
        st.global.v2.u32 [%rd1+32], {%r13, %r14};
        dp4a.s32.s32 %r15, 0x01ff0203, 0x04050607, 100; popc.b32 %r16, 0xff; st.global.v2.u32 [%rd1+40], {%r15, %r16};
        add.u32 %r15, 7, 8; mad.lo.s32 %r16, 3, 4, 5; st.global.v2.u32 [%rd1+48], {%r15, %r16}; ret;""",
    )
    device = Device()
    out = device.zeros(14, np.uint32)
    module.launch("k", 1, 1, [out], device)
    want = [-3, -1, 0xFFFFFFF2, 0xCCDD5678, 0xFFFFFFCC, 0xAA5678DD, 0, 0xFFFFFFFF]
    want += [0x12345678 ^ 0xAABBCCDD ^ -7, 0xAABBCCDD, 100 + 4 - 5 + 12 + 21, 8, 15, 17]
    assert out.array.tolist() == [value & 0xFFFFFFFF for value in want]


def test_prmt_replicates_signs():
    """A selector with its highest bit set takes the sign of the byte."""
    got = run_elementwise("prmt.b32 {d}, {a}, {b}, 0xfb90", [BITS, OTHER], np.uint32)
    low, high = BITS.view(np.uint8).reshape(-1, 4), OTHER.view(np.uint8).reshape(-1, 4)
    signs = np.stack([low[:, 0], 0xFF * (low[:, 1] >> 7), 0xFF * (low[:, 3] >> 7), 0xFF * (high[:, 3] >> 7)], axis=1)
    assert (got.view(np.uint8).reshape(-1, 4) == signs).all()


def test_conversions_between_integers():
    """Sign and zero extension, truncation, saturation."""
    assert (run_elementwise("cvt.s64.s32 {d}, {a}", [BITS], np.int64) == BITS.view(np.int32)).all()
    assert (run_elementwise("cvt.u64.u32 {d}, {a}", [BITS], np.uint64) == BITS).all()
    assert (run_elementwise("cvt.u32.u64 {d}, {a}", [WIDE], np.uint32) == WIDE.astype(np.uint32)).all()
    assert (run_elementwise("cvt.s32.s8 {d}, {a}", [BITS], np.int32) == BITS.astype(np.uint8).view(np.int8)).all()
    got = run_elementwise("cvt.sat.u8.s32 {d}, {a}", [BITS], np.uint32)
    assert (got == np.clip(BITS.view(np.int32), 0, 255)).all()
    got = run_elementwise("cvt.sat.s32.u32 {d}, {a}", [BITS], np.uint32)
    assert (got == np.minimum(BITS, np.uint32(0x7FFFFFFF))).all()


def test_selection():
    """selp, slct, set, cnot, not: by predicates and by signs."""
    signed = BITS.view(np.int32)
    got = run_elementwise("slct.u32.s32 {d}, {a}, {b}, {a}", [BITS, OTHER], np.uint32)
    assert (got == np.where(signed >= 0, BITS, OTHER)).all()
    got = run_elementwise("slct.u32.f32 {d}, 1, 2, {a}", [BITS], np.uint32)
    assert (got == np.where(BITS.view(np.float32) >= 0, 1, 2)).all()
    got = run_elementwise("slct.ftz.u32.f32 {d}, 1, 2, {a}", [np.full(32, 0x80000001, np.uint32)], np.uint32)
    assert (got == 1).all()
    got = run_elementwise("set.lt.u32.s32 {d}, {a}, {b}", [BITS, OTHER], np.uint32)
    assert (got == np.where(signed < OTHER.view(np.int32), 0xFFFFFFFF, 0)).all()
    got = run_elementwise("set.hi.f32.u32 {d}, {a}, {b}", [BITS, OTHER], np.float32)
    assert (got == (BITS > OTHER)).all()
    assert (run_elementwise("cnot.b32 {d}, {a}", [BITS % np.uint32(2)], np.uint32) == 1 - BITS % np.uint32(2)).all()
    assert (run_elementwise("not.b32 {d}, {a}", [BITS], np.uint32) == ~BITS).all()
    assert (run_elementwise("neg.s32 {d}, {a}", [BITS], np.int32) == -signed).all()
    small = signed >> 1
    assert (run_elementwise("abs.s32 {d}, {a}", [small], np.int32) == np.abs(small)).all()


@pytest.mark.parametrize(
    ("combine", "function"), [("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)]
)
def test_comparison_with_a_second_condition(combine, function):
    """setp p|q: both are combined with the third operand, q from the opposite of the comparison."""
    instruction = f"""setp.lo.u32 %p3, {{a}}, 0x80000000; setp.ne.{combine}.u32 %p1|%p2, {{b}}, 7, !%p3;
        selp.u32 %r5, 1, 0, %p1; selp.u32 %r6, 2, 0, %p2; or.b32 {{d}}, %r5, %r6"""
    second = OTHER % np.uint32(10)
    got = run_elementwise(instruction, [BITS, second], np.uint32)
    condition = np.uint32(1 << 31) <= BITS
    assert (got == function(second != 7, condition) + 2 * function(second == 7, condition)).all()


def test_packing_of_registers():
    """mov between one wide register and several narrow ones."""
    instruction = "mov.b32 {{%h1, %h2}}, {a}; mov.b64 %rd4, {{%h2, %h1, %h2, %h1}}; mov.b64 {d}, %rd4"
    got = run_elementwise(instruction, [BITS], np.uint64).view(np.uint16).reshape(-1, 4)
    halves = BITS.view(np.uint16).reshape(-1, 2)
    assert (got == halves[:, [1, 0, 1, 0]]).all()
    got = run_elementwise("mov.b32 {{_, %h2}}, {a}; cvt.u32.u16 {d}, %h2", [BITS], np.uint32)
    assert (got == BITS >> np.uint32(16)).all()
