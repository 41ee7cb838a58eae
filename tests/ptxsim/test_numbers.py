"""Rounding: fma, bfloat16 and the halves against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest

from ptxsim import numbers
from ptxsim.testing import f32, random_bits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def assert_nearest_even(values, exact, lower, upper, is_even):
    """Each value is as near to the exact one as its neighbours, and even if it is a tie."""
    for value, want, below, above, even in zip(values, exact, lower, upper, is_even, strict=True):
        error = abs(Fraction(value) - want)
        for neighbour in (below, above):
            if np.isfinite(neighbour):
                other = abs(Fraction(neighbour) - want)
                assert error < other or (error == other and even), (value, float(want))


def test_fma32_is_correctly_rounded():
    """Near-ties, subnormals and cancellation: where to add in float64 and round again would be wrong."""
    rng, count = np.random.default_rng(6), 4000
    random = [rng.integers(0, 1 << 32, count, np.uint64).astype(np.uint32).view(f32) for _ in range(3)]
    short = [(1 + rng.integers(0, 1 << 12, count) * 2.0**-12).astype(f32) for _ in range(2)]
    power = (2.0 ** rng.integers(-60, 2, count) * rng.choice([-1, 1], count)).astype(f32)
    small = f32(2.0**-70)
    a = np.concatenate([random[0], short[0], short[0] * small, short[0]])
    b = np.concatenate([random[1], short[1], short[1] * small, short[1]])
    c = np.concatenate([random[2], power, power * f32(2.0**-80), -short[0] * short[1]])
    with np.errstate(all="ignore"):
        got = numbers.fma32(a, b, c)
        about = a.astype(np.float64) * b + c
        finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & np.isfinite(got) & (np.abs(about) < 3e38)
        lower, upper = np.nextafter(got, f32(-np.inf)), np.nextafter(got, f32(np.inf))
    a, b, c, got, lower, upper = (x[finite] for x in (a, b, c, got, lower, upper))
    assert got.size > 12000
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert_nearest_even(got.tolist(), exact, lower.tolist(), upper.tolist(), got.view(np.uint32) % 2 == 0)


def test_fma32_of_double_rounding_traps():
    """Sums whose float64 value is a tie of float32 though the exact one is not, also among subnormals."""
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24: a tie in float32, which the addend resolves far behind float64.
    a = np.array([1 + 2.0**-12] * 2, f32)
    c = np.array([2.0**-100, -(2.0**-100)], f32)
    assert numbers.fma32(a, a, c).tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11]
    # A product of half the smallest subnormal, less 2^-46 of it, which float64 loses beside the addend.
    a, b = f32((1 + 2.0**-23) * 2.0**-75), f32((1 - 2.0**-23) * 2.0**-75)
    c = f32(2.0**-127 + 2.0**-149)
    assert numbers.fma32(a, b, c) == c
    assert numbers.fma32(-a, b, -c) == -c
    assert numbers.fma32(f32(2.0**-75), f32(2.0**-75), c) == f32(2.0**-127 + 2.0**-148)  # a tie
    # An underflow to zero keeps its sign.
    tiny = f32(2.0**-126)
    assert np.signbit(numbers.fma32(-tiny, tiny, f32(0)))


def test_fma64_is_fused():
    """The product is not rounded."""
    a = 1 + 2.0**-30
    assert numbers.fma64(a, a, -1 - 2.0**-29) == 2.0**-60


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_bf16_is_correctly_rounded(kind):
    """To nearest even, once, from f32 and from f64, with subnormals and overflow."""
    bits = random_bits(20000)
    bits[100:2000] = (bits[100:2000] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # ties
    values = bits.view(f32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)].astype(np.float64)
    if kind == "f64":
        # Ties that are broken by what float32 does not hold.
        offset = np.random.default_rng(1).choice([0, 2.0**-50, -(2.0**-50)], values.size)
        values = values * (1 + offset)
        got = numbers.f64_to_bf16(values)
    else:
        got = numbers.f32_to_bf16(values.astype(f32))
    back = numbers.bf16_to_f32(got).tolist()
    lower, upper = (numbers.bf16_to_f32((got.astype(np.int64) + step).astype(np.uint16)).tolist() for step in (-1, 1))
    assert_nearest_even(back, [Fraction(x) for x in values.tolist()], lower, upper, got % 2 == 0)


def test_bf16_of_special_values():
    """NaN is canonical, overflow is infinite, zero keeps its sign."""
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45], f32)
    want = [0x7FFF, 0x7FFF, 0x7F80, 0xFF80, 0x7F80, 0xFF80, 0, 0x8000, 0]
    assert numbers.f32_to_bf16(values).tolist() == want
    assert numbers.f64_to_bf16(values.astype(np.float64)).tolist() == want
    assert numbers.f32_to_bf16(values, "rz").tolist() == [0x7FFF, 0x7FFF, 0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0, 0x8000, 0]


def test_scalars_are_as_good_as_arrays():
    """Values that all threads share are scalars, for which old numpy has other rules of promotion."""
    for value in (1.5, -0.0, np.nan, 3.4e38, 1e-40):
        array = np.full(3, value, f32)
        assert numbers.f32_to_bf16(f32(value)) == numbers.f32_to_bf16(array)[0]
        assert numbers.flush_subnormals(f32(value)).tobytes() == numbers.flush_subnormals(array)[0].tobytes()
        assert numbers.canonical_nan(f32(value)).tobytes() == numbers.canonical_nan(array)[0].tobytes()
        assert numbers.fma32(f32(value), f32(3), f32(1)).tobytes() == numbers.fma32(array, f32(3), f32(1))[0].tobytes()


def test_minimum_and_maximum():
    """-0 is below +0, and NaN loses unless it is asked to propagate."""
    a, b = np.array([0.0, -0.0, 1, np.nan], f32), np.array([-0.0, 0.0, 2, 5], f32)
    low, high = numbers.minimum_or_maximum("min", False)(a, b), numbers.minimum_or_maximum("max", False)(a, b)
    assert np.signbit(low).tolist() == [True, True, False, False]
    assert np.signbit(high).tolist() == [False, False, False, False]
    assert low.tolist() == [0, 0, 1, 5]
    assert high.tolist() == [0, 0, 2, 5]
    assert np.isnan(numbers.minimum_or_maximum("max", True)(a, b)).tolist() == [False, False, False, True]
