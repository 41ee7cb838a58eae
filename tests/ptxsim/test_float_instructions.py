"""Float instructions one by one, on random bits and special values."""

from fractions import Fraction

import numpy as np
import pytest

from ptxsim import PTXError, Unsupported
from ptxsim.numbers import bf16_to_f32, f32_to_bf16
from ptxsim.testing import assemble, f32, random_bits, run_elementwise

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BITS = random_bits()
FLOATS = BITS.view(f32)
NAN = np.isnan(FLOATS)
ALL_HALVES = np.arange(1 << 16, dtype=np.uint16)


def test_conversion_from_f32_to_bf16():
    """To nearest even against another formula, toward zero as the upper bits, NaN canonical."""
    got = run_elementwise("cvt.rn.bf16.f32 {d}, {a}", [BITS], np.uint16)
    want = (BITS + np.uint32(0x7FFF) + ((BITS >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    assert (got == want)[~NAN].all()
    assert (got[NAN] == 0x7FFF).all()
    assert (run_elementwise("cvt.rz.bf16.f32 {d}, {a}", [BITS], np.uint16) == BITS >> np.uint32(16))[~NAN].all()


def test_conversion_between_f32_and_f16():
    """All f16 there, and random f32 back."""
    got = run_elementwise("cvt.rn.f16.f32 {d}, {a}", [BITS], np.uint16)
    assert (got == FLOATS.astype(np.float16).view(np.uint16))[~NAN].all()
    halves = ALL_HALVES.view(np.float16)
    number = ~np.isnan(halves)
    got = run_elementwise("cvt.f32.f16 {d}, {a}", [ALL_HALVES], f32)
    assert (got == halves.astype(f32))[number].all()
    assert np.isnan(got[~number]).all()
    got = run_elementwise("cvt.f32.bf16 {d}, {a}", [ALL_HALVES], np.uint32)
    number = ~np.isnan(bf16_to_f32(ALL_HALVES))
    assert (got == ALL_HALVES.astype(np.uint32) << np.uint32(16))[number].all()


def test_packing_puts_the_first_operand_into_the_high_half():
    """cvt.rn.bf16x2.f32 d, a, b."""
    other = BITS[::-1].copy()
    got = run_elementwise("cvt.rn.bf16x2.f32 {d}, {a}, {b}", [BITS, other], np.uint32)
    assert (got >> np.uint32(16) == f32_to_bf16(FLOATS)).all()
    assert (got & np.uint32(0xFFFF) == f32_to_bf16(other.view(f32))).all()


def test_conversion_between_floats_and_integers():
    """Out of range goes to the end of the range, NaN to zero."""
    got = run_elementwise("cvt.rzi.s32.f32 {d}, {a}", [BITS], np.int32)
    wide = FLOATS.astype(np.float64)
    assert (got == np.where(NAN, 0, np.clip(np.trunc(wide), -(2.0**31), 2.0**31 - 1))).all()
    got = run_elementwise("cvt.rni.u32.f32 {d}, {a}", [BITS], np.uint32)
    assert (got == np.where(NAN, 0, np.clip(np.rint(wide), 0, 2.0**32 - 1))).all()
    assert (run_elementwise("cvt.rn.f32.u32 {d}, {a}", [BITS], f32) == BITS.astype(f32)).all()
    assert (run_elementwise("cvt.rn.f32.s32 {d}, {a}", [BITS], f32) == BITS.view(np.int32).astype(f32)).all()
    special = np.array([np.nan, np.inf, -np.inf, 1e30] * 8)
    got = run_elementwise("cvt.rzi.s64.f64 {d}, {a}", [special.view(np.uint64)], np.int64)
    assert got[:4].tolist() == [-(1 << 63), (1 << 63) - 1, -(1 << 63), (1 << 63) - 1]


@pytest.mark.parametrize(("rounding", "holds"), [("rz", None), ("rm", np.less_equal), ("rp", np.greater_equal)])
def test_directed_conversion_from_f64(rounding, holds):
    """On the right side, and not a step further than need be."""
    doubles = FLOATS.astype(np.float64) * 1.0000001
    got = run_elementwise(f"cvt.{rounding}.f32.f64 {{d}}, {{a}}", [doubles.view(np.uint64)], f32)
    usable = np.isfinite(doubles) & (np.abs(doubles) < 3e38)
    wide = got.astype(np.float64)
    if holds is None:
        assert (np.abs(wide) <= np.abs(doubles))[usable].all()
    else:
        assert holds(wide, doubles)[usable].all()
    step = np.maximum(np.abs(np.spacing(got).astype(np.float64)), np.abs(np.spacing(-got).astype(np.float64)))
    assert (np.abs(wide - doubles) <= step)[usable].all()


def test_square_root():
    """IEEE, with the canonical NaN."""
    got = run_elementwise("sqrt.rn.f32 {d}, {a}", [BITS], np.uint32)
    want = np.sqrt(FLOATS)
    number = ~np.isnan(want)
    assert (got.view(f32) == want)[number].all()
    assert (got[~number] == 0x7FFFFFFF).all()


@pytest.mark.parametrize(("opcode", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_arithmetic(opcode, function):
    """Every bit, and the canonical NaN; two in one register as well."""
    other = np.random.default_rng(3).permutation(BITS)
    got = run_elementwise(f"{opcode}.f32 {{d}}, {{a}}, {{b}}", [BITS, other], np.uint32)
    want = function(FLOATS, other.view(f32))
    number = ~np.isnan(want)
    assert (got == want.view(np.uint32))[number].all()
    assert (got[~number] == 0x7FFFFFFF).all()
    pairs = run_elementwise(
        f"{opcode}.f32x2 {{d}}, {{a}}, {{b}}", [BITS.view(np.uint64), other.view(np.uint64)], np.uint64
    )
    assert (pairs.view(np.uint32) == got).all()


def test_division():
    """div.rn is IEEE; div.approx gives zero for huge divisors."""
    other = np.random.default_rng(4).permutation(BITS)
    got = run_elementwise("div.rn.f32 {d}, {a}, {b}", [BITS, other], f32)
    want = FLOATS / other.view(f32)
    assert (got == want)[~np.isnan(want)].all()
    huge = np.full(32, 2.0**127, f32)
    got = run_elementwise("div.approx.f32 {d}, {a}, {b}", [huge.view(np.uint32), huge.view(np.uint32)], f32)
    assert not got.any()


def test_flushing():
    """.ftz turns subnormal operands and results into zeros of their sign."""
    bits = np.array([1, 0x80000001, 0x3F800000, 0] * 8, np.uint32)
    assert run_elementwise("abs.ftz.f32 {d}, {a}", [bits], np.uint32)[:4].tolist() == [0, 0, 0x3F800000, 0]
    assert run_elementwise("sqrt.approx.ftz.f32 {d}, {a}", [bits], np.uint32)[:2].tolist() == [0, 0x80000000]
    smallest = np.array([0x00800000, 0x80800000] * 16, np.uint32)
    half = np.full(32, 0x3F000000, np.uint32)
    assert run_elementwise("mul.ftz.f32 {d}, {a}, {b}", [smallest, half], np.uint32)[:2].tolist() == [0, 0x80000000]
    assert run_elementwise("mul.f32 {d}, {a}, {b}", [smallest, half], np.uint32)[:2].tolist() == [0x400000, 0x80400000]


def test_flushing_of_halves():
    """.ftz of f16 counts as well: it must not be accepted and ignored."""
    subnormal, one = np.full(32, 0x0001, np.uint16), np.full(32, 0x3C00, np.uint16)
    assert run_elementwise("mul.f16 {d}, {a}, {b}", [subnormal, one], np.uint16)[0] == 1
    assert run_elementwise("mul.ftz.f16 {d}, {a}, {b}", [subnormal, one], np.uint16)[0] == 0
    pair = np.full(32, 0x3C000001, np.uint32)
    assert run_elementwise("mul.ftz.f16x2 {d}, {a}, {b}", [pair, pair], np.uint32)[0] == 0x3C000000


def test_saturation():
    """.sat clamps to [0, 1] and turns NaN into zero, for f32 and f16."""
    values = np.array([-1, 0.5, 2, np.nan] * 8, f32)
    zeros = np.zeros(32, f32)
    got = run_elementwise("add.sat.f32 {d}, {a}, {b}", [values.view(np.uint32), zeros.view(np.uint32)], f32)
    assert got[:4].tolist() == [0, 0.5, 1, 0]
    halves = [x.astype(np.float16).view(np.uint16) for x in (values, zeros)]
    got = run_elementwise("add.sat.f16 {d}, {a}, {b}", halves, np.uint16).view(np.float16)
    assert got[:4].tolist() == [0, 0.5, 1, 0]


def test_relu():
    """.relu turns what is negative into +0, and leaves NaN."""
    values = np.array([-1, -0.0, 2, np.nan, -np.inf, np.inf, -1e-40, 3] * 4, f32)
    got = run_elementwise("cvt.rn.relu.bf16.f32 {d}, {a}", [values.view(np.uint32)], np.uint16)
    assert got[:8].tolist() == [0, 0, 0x4000, 0x7FFF, 0, 0x7F80, 0, 0x4040]
    halves = values.astype(np.float16).view(np.uint16)
    one = np.full(32, 0x3C00, np.uint16)
    got = run_elementwise("fma.rn.relu.f16 {d}, {a}, {b}, {c}", [halves, one, np.zeros(32, np.uint16)], np.uint16)
    assert got[:6].tolist() == [0, 0, 0x4000, 0x7FFF, 0, 0x7C00]


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_nan_in_minimum_and_maximum(kind):
    """A NaN loses, and wins with .NaN: of halves too."""
    values = np.array([1, np.nan, 3, np.nan] * 8, f32)
    others = np.array([2, 5, np.nan, np.nan] * 8, f32)
    encode = {
        "f16": lambda x: x.astype(np.float16).view(np.uint16),
        "bf16": f32_to_bf16,
        "f32": lambda x: x.view(np.uint32),
    }
    decode = {"f16": lambda x: x.view(np.float16), "bf16": bf16_to_f32, "f32": lambda x: x.view(f32)}
    operands = [encode[kind](x) for x in (values, others)]
    got = decode[kind](run_elementwise(f"max.{kind} {{d}}, {{a}}, {{b}}", operands, operands[0].dtype))[:4]
    np.testing.assert_array_equal(got.astype(f32), np.array([2, 5, 3, np.nan], f32))
    got = decode[kind](run_elementwise(f"max.NaN.{kind} {{d}}, {{a}}, {{b}}", operands, operands[0].dtype))[:4]
    np.testing.assert_array_equal(got.astype(f32), np.array([2, np.nan, np.nan, np.nan], f32))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(("opcode", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_arithmetic_of_halves(kind, opcode, function):
    """Rounded once from the exact value, which float64 holds for numbers of similar size."""
    rng = np.random.default_rng(2)
    values = [rng.standard_normal(4096).astype(f32) for _ in range(2)]
    if kind == "f16":
        stored = [x.astype(np.float16) for x in values]
        want = function(*(x.astype(np.float64) for x in stored)).astype(np.float16).view(np.uint16)
        stored = [x.view(np.uint16) for x in stored]
    else:
        stored = [f32_to_bf16(x) for x in values]
        # Sums and products of bf16 of similar size are exact in float32 or nearly so: widen further.
        exact = function(*(bf16_to_f32(x).astype(np.float64) for x in stored))
        nearest = exact.astype(f32)
        safe = nearest.astype(np.float64) == exact
        want = f32_to_bf16(nearest)
        stored = [x[safe] for x in stored]
        want = want[safe]
        count = want.size // 32 * 32
        assert count > 3000
        stored, want = [x[:count] for x in stored], want[:count]
    assert (run_elementwise(f"{opcode}.{kind} {{d}}, {{a}}, {{b}}", stored, np.uint16) == want).all()


def test_sign_operations():
    """neg, abs and copysign touch the sign bit alone, of NaN as well."""
    assert (run_elementwise("neg.f32 {d}, {a}", [BITS], np.uint32) == BITS ^ np.uint32(1 << 31)).all()
    assert (run_elementwise("abs.f32 {d}, {a}", [BITS], np.uint32) == BITS & np.uint32(0x7FFFFFFF)).all()
    other = BITS[::-1].copy()
    got = run_elementwise("copysign.f32 {d}, {a}, {b}", [BITS, other], np.uint32)
    assert (got == (other & np.uint32(0x7FFFFFFF)) | (BITS & np.uint32(1 << 31))).all()


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons(name):
    """Ordered ones are false for NaN (ne too), unordered ones true."""
    values = np.array([0, -0.0, 1, np.nan, 2, np.inf, np.nan, -1] * 4, f32)
    others = np.array([0, 0, 2, 1, 1, np.inf, np.nan, np.nan] * 4, f32)
    instruction = f"setp.{name}.f32 %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1"
    got = run_elementwise(instruction, [values.view(np.uint32), others.view(np.uint32)], np.uint32)
    unordered = np.isnan(values) | np.isnan(others)
    if name in ("num", "nan"):
        want = unordered == (name == "nan")
    else:
        compare = {
            "eq": "equal",
            "ne": "not_equal",
            "lt": "less",
            "le": "less_equal",
            "gt": "greater",
            "ge": "greater_equal",
        }
        want = np.where(unordered, name.endswith("u"), getattr(np, compare[name[:2]])(values, others))
    assert got.tolist() == want.astype(int).tolist()


def test_comparison_of_packed_halves():
    """setp.f16x2 p|q compares the low halves for p and the high ones for q."""
    first = np.random.default_rng(5).standard_normal((2, 512)).astype(np.float16)
    second = np.where(np.arange(512) % 3 == 0, first, first[::-1]).astype(np.float16)
    operands = [np.ascontiguousarray(x.T).view(np.uint32).reshape(-1) for x in (first, second)]
    instruction = """setp.gt.f16x2 %p1|%p2, {a}, {b}; selp.u32 %r5, 1, 0, %p1; selp.u32 %r6, 2, 0, %p2;
        or.b32 {d}, %r5, %r6"""
    got = run_elementwise(instruction, operands, np.uint32)
    assert (got == (first > second)[0] + 2 * (first > second)[1]).all()


def test_classification():
    """testp, and set with a float result, also as bf16."""
    for name, function in (("finite", np.isfinite), ("infinite", np.isinf), ("notanumber", np.isnan)):
        got = run_elementwise(f"testp.{name}.f32 %p1, {{a}}; selp.u32 {{d}}, 1, 0, %p1", [BITS], np.uint32)
        assert (got == function(FLOATS)).all()
    got = run_elementwise("testp.number.f32 %p1, {a}; selp.u32 {d}, 1, 0, %p1", [BITS], np.uint32)
    assert (got == ~NAN).all()
    one = np.full(BITS.size, 0x3F800000, np.uint32)
    got = run_elementwise("set.gt.bf16.f32 {d}, {a}, {b}", [BITS, one], np.uint16)
    assert (got == np.where(FLOATS > 1, 0x3F80, 0)).all()


def test_three_operands_of_minimum_and_maximum():
    """The form of sm_100."""
    values = [np.random.default_rng(i).permutation(BITS) for i in range(3)]
    got = run_elementwise("min.f32 {d}, {a}, {b}, {c}", values, np.float32)
    a, b, c = (x.view(f32) for x in values)
    np.testing.assert_array_equal(got, np.fmin(np.fmin(a, b), c))


def test_rounding_to_integral_floats():
    """cvt.rni and its like keep the type."""
    for rounding, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        got = run_elementwise(f"cvt.{rounding}.f32.f32 {{d}}, {{a}}", [BITS], f32)
        assert (got == function(FLOATS))[~NAN].all()


def test_double_precision():
    """fma is fused, division and root are IEEE, conversion to f32 rounds once."""
    rng = np.random.default_rng(8)
    a, b, c = (rng.standard_normal(1024) for _ in range(3))
    bits = [x.view(np.uint64) for x in (a, b, c)]
    got = run_elementwise("fma.rn.f64 {d}, {a}, {b}, {c}", bits, np.float64)
    exact = [
        float(Fraction(x) * Fraction(y) + Fraction(z))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert got.tolist() == exact
    assert (run_elementwise("div.rn.f64 {d}, {a}, {b}", bits[:2], np.float64) == a / b).all()
    assert (run_elementwise("sqrt.rn.f64 {d}, {a}", [(a * a).view(np.uint64)], np.float64) == np.sqrt(a * a)).all()
    assert (run_elementwise("cvt.rn.f32.f64 {d}, {a}", bits[:1], f32) == a.astype(f32)).all()
    got = run_elementwise("cvt.rn.f16.f64 {d}, {a}", bits[:1], np.uint16)
    assert (got == a.astype(np.float16).view(np.uint16)).all()
    got = run_elementwise("cvt.rn.bf16.s32 {d}, {a}", [BITS], np.uint16)
    nearest = BITS.view(np.int32).astype(np.float64)
    back = bf16_to_f32(got).astype(np.float64)
    assert (np.abs(back - nearest) <= np.abs(nearest) * 2.0**-8).all()


@pytest.mark.parametrize("opcode", ["ex2", "lg2", "sin", "cos", "rsqrt", "rcp", "tanh"])
def test_approximate_functions(opcode):
    """Near the real function; hardware is not better than that."""
    x = np.linspace(0.1, 4, 4096).astype(f32)
    got = run_elementwise(f"{opcode}.approx.f32 {{d}}, {{a}}", [x.view(np.uint32)], f32)
    functions = {"ex2": np.exp2, "lg2": np.log2, "rsqrt": lambda v: v**-0.5, "rcp": lambda v: 1 / v}
    function = functions.get(opcode) or getattr(np, opcode)
    np.testing.assert_allclose(got, function(x.astype(np.float64)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rz.f32 %f1, %f2, %f3",
        "fma.rm.f32 %f1, %f2, %f3, %f4",
        "add.sat.bf16 %h1, %h2, %h3",
        "add.relu.f32 %f1, %f2, %f3",
        "add.NaN.f32 %f1, %f2, %f3",
        "min.relu.s32 %r1, %r2, %r3",
        "mad.hi.sat.s32 %r1, %r2, %r3, %r4",
        "neg.ftz.f16 %h1, %h2",
        "cvt.rz.bf16.f64 %h1, %d1",
        "cvt.rp.f32.u32 %f1, %r1",
        "cvt.rn.bf16.u64 %h1, %rd1",
        "cvt.rna.tf32.f32 %r1, %f1",
        "add.cc.u64 %rd1, %rd2, %rd3",
        "tanh.approx.bf16 %h1, %h2",
    ],
)
def test_modifiers_that_would_be_ignored_are_refused(instruction):
    """What the simulator does not do it must not pass over."""
    with pytest.raises(Unsupported, match="PTX line"):
        assemble([], f"{instruction}; ret;").launch("k", 1, 32)


def test_result_must_fit_its_register():
    """A wide result in a narrow register is not PTX."""
    with pytest.raises((PTXError, Unsupported)):
        assemble([], "mul.wide.u32 %r1, %r2, %r3; ret;").launch("k", 1, 32)
