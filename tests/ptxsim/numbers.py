"""Floating point that numpy does not have: bfloat16, fused multiply-add, flush to zero, exact rounding.

An operation with one correct rounding is made from a result in float64 that is rounded to odd: when the last bit
says "inexact", a second rounding to at most 51 bits gives what one rounding of the exact value would have given.
"""

import ctypes
import ctypes.util
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .types import UNSIGNED

Array = Any  # an array, or a scalar that all threads share

_CANONICAL_NAN: dict[Any, Any] = {np.dtype(np.float32): np.uint32(0x7FFFFFFF), np.dtype(np.float16): np.uint16(0x7FFF)}
_SMALLEST_NORMAL: dict[Any, Any] = {np.dtype(t): np.finfo(t).tiny for t in (np.float16, np.float32)}


def flush_subnormals(x: Array) -> Array:
    """Turn subnormal values into zeros of the same sign (.ftz)."""
    subnormal = np.abs(x) < _SMALLEST_NORMAL[x.dtype]
    return np.where(subnormal, np.copysign(x.dtype.type(0), x), x) if subnormal.any() else x


def canonical_nan(x: Array) -> Array:
    """Make every NaN the one that f16 and f32 arithmetic of the hardware returns: all bits but the sign."""
    nan = np.isnan(x)
    return np.where(nan, _CANONICAL_NAN[x.dtype].view(x.dtype), x) if nan.any() else x


def saturate(x: Array) -> Array:
    """Clamp to [0, 1], with NaN becoming zero (.sat)."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    return np.where(np.isnan(x), zero, np.clip(x, zero, one))


def round_to_odd(rounded: Array, error: Array) -> Array:
    """Round to odd, from the value rounded to nearest and (the sign of) the exact value minus it."""
    bits = rounded.view(UNSIGNED[rounded.dtype.itemsize * 8])
    one = bits.dtype.type(1)
    inexact_and_even = np.isfinite(rounded) & (error != 0) & ((bits & one) == 0)
    if not inexact_and_even.any():
        return rounded
    # A zero with an error is an underflow: step away from it, whatever the sign.
    away_from_zero = ((error > 0) == (rounded > 0)) | (rounded == 0)
    odd = np.where(away_from_zero, bits + one, bits - one)
    return np.where(inexact_and_even, odd, bits).view(rounded.dtype)


def sum_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd (two-sum gives the exact error)."""
    total = np.asarray(a + b)
    b_part = total - a
    return round_to_odd(total, np.asarray((a - (total - b_part)) + (b - b_part)))


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Correctly rounded a * b + c in float32."""
    # The product of two 24-bit significands is exact in float64, the sum may be rounded.
    product = np.asarray(a).astype(np.float64) * np.asarray(b).astype(np.float64)
    addend = np.asarray(c).astype(np.float64)
    total = np.asarray(product + addend)
    # Rounding twice differs from rounding once only where the first result is a tie of the second rounding, or
    # where the second result is subnormal and its ties lie elsewhere. Both are rare: look again at those alone.
    tie = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    magnitude = np.abs(total)
    doubtful = tie | ((magnitude < _SMALLEST_NORMAL[np.dtype(np.float32)]) & (magnitude != 0))
    if not doubtful.any():
        return total.astype(np.float32)
    exact = sum_to_odd(*(np.broadcast_to(x, total.shape)[doubtful] for x in (product, addend)))
    total[doubtful] = exact
    return total.astype(np.float32)


@functools.cache
def _scalar_fma64() -> Callable[[float, float, float], float]:
    fma: Any = ctypes.CDLL(ctypes.util.find_library("m")).fma
    fma.restype, fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return fma


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Correctly rounded a * b + c in float64, one element at a time."""
    return np.asarray(np.frompyfunc(_scalar_fma64(), 3, 1)(a, b, c)).astype(np.float64)


def bf16_to_f32(bits: Array) -> Array:
    """The float32 values of bfloat16 bit patterns."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array, rounding: str = "rn") -> Array:
    """The bfloat16 bit patterns of float32 values, to nearest even ("rn") or toward zero ("rz"); NaN is 0x7fff."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    if rounding == "rn":
        last_kept = (bits >> np.uint32(16)) & np.uint32(1)
        # In 64 bits, because the bits of a NaN may overflow here.
        bits = bits.astype(np.uint64) + np.uint64(0x7FFF) + last_kept
    return np.where(np.isnan(x), np.uint16(0x7FFF), (bits >> bits.dtype.type(16)).astype(np.uint16))


def f64_to_bf16(x: Array) -> Array:
    """The bfloat16 bit patterns of float64 values, with one rounding to nearest even."""
    x = np.asarray(x)
    nearest = x.astype(np.float32)
    return f32_to_bf16(round_to_odd(nearest, np.asarray(x - nearest.astype(np.float64))))


def widen_half(x: Array, type_name: str) -> Array:
    """f16 values or bf16 bit patterns as float64, which is exact."""
    return np.asarray(bf16_to_f32(x) if type_name == "bf16" else x).astype(np.float64)


def narrow_half(x: Array, type_name: str) -> Array:
    """float64 values, exact or rounded to odd, as f16 values or bf16 bit patterns."""
    return f64_to_bf16(x) if type_name == "bf16" else canonical_nan(np.asarray(x).astype(np.float16))


def minimum_or_maximum(name: str, propagate_nan: bool) -> Callable[[Array, Array], Array]:
    """The function behind min ("min") or max ("max"): -0 is below +0, and a NaN loses unless it propagates."""
    choose = np.fmin if name == "min" else np.fmax

    def function(a: Array, b: Array) -> Array:
        result = np.asarray(choose(a, b))
        zero = result.dtype.type(0)
        both_zero = np.asarray((a == 0) & (b == 0))
        if both_zero.any():
            sign_a, sign_b = np.signbit(a), np.signbit(b)
            negative = (sign_a | sign_b) if name == "min" else (sign_a & sign_b)
            result = np.where(both_zero, np.where(negative, -zero, zero), result)
        if propagate_nan:
            result = np.where(np.isnan(a) | np.isnan(b), result.dtype.type(np.nan), result)
        return result

    return function
