"""Moves, conversions between types, and conversions between address spaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..memory import WINDOW, WINDOW_OFFSET, WINDOW_SHIFT
from ..numbers import bf16_to_f32, canonical_nan, f32_to_bf16, f64_to_bf16, flush_subnormals, saturate
from ..operands import destination, source
from ..syntax import Immediate, Instruction, Vector
from ..types import BITS, FLOATS, HALVES, NUMPY, PACKED_HALVES, TYPES, UNSIGNED
from .floats import negative_to_zero
from .registry import Execute, elementwise, instruction

_TO_INTEGRAL: dict[str, Callable] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_DIRECTED = ("rz", "rm", "rp")


@instruction("mov")
def _move(each: Instruction) -> Execute:
    type_name = each.type()
    to, value = each.operands
    if isinstance(value, Vector):
        return _pack(to, value.items, BITS[type_name])
    if isinstance(to, Vector):
        return _unpack(to.items, value, BITS[type_name])
    raw = type_name if type_name == "pred" else f"b{BITS[type_name]}"
    if isinstance(value, Immediate) and value.bits is None and isinstance(value.value, float):
        raw = type_name
    read, write = source(value, raw), destination(to, raw)
    return lambda wave, compute, active: write(wave, compute, read(wave, compute))


def _pack(to: Any, items: list, bits: int) -> Execute:
    """Several registers into a wider one, the first in the low bits."""
    width, unsigned = bits // len(items), UNSIGNED[bits]
    reads, write = [source(item, f"b{width}") for item in items], destination(to, f"b{bits}")

    def execute(wave: Any, compute: Any, active: Any) -> None:
        result = unsigned(0)
        for i, read in enumerate(reads):
            result = result | (np.asarray(read(wave, compute)).astype(unsigned) << unsigned(width * i))
        write(wave, compute, result)

    return execute


def _unpack(items: list, value: Any, bits: int) -> Execute:
    """A wide register into several, the first from the low bits."""
    width, unsigned = bits // len(items), UNSIGNED[bits]
    read, writes = source(value, f"b{bits}"), [destination(item, f"b{width}") for item in items]

    def execute(wave: Any, compute: Any, active: Any) -> None:
        whole = np.asarray(read(wave, compute))
        for i, write in enumerate(writes):
            write(wave, compute, (whole >> unsigned(width * i)).astype(UNSIGNED[width]))

    return execute


_SPACES = "global shared shared::cta local const param"


def _space(each: Instruction) -> str:
    return next((m.split("::")[0] for m in each.modifiers if m in _SPACES.split()), "global")


@instruction("cvta", modifiers=f"to {_SPACES}")
def _convert_address(each: Instruction) -> Execute:
    """Between a generic address and one in a state space. Global addresses are the same in both."""
    space, raw = _space(each), f"b{BITS[each.type()]}"
    if space == "global":
        return elementwise(each, lambda x: x, [raw], raw)
    base = np.uint64(WINDOW[space])
    if each.has("to"):
        return elementwise(each, lambda x: x & WINDOW_OFFSET, [raw], raw)
    return elementwise(each, lambda x: x | base, [raw], raw)


@instruction("isspacep", modifiers=_SPACES)
def _is_in_space(each: Instruction) -> Execute:
    number = np.uint64(WINDOW.get(_space(each), 0) >> WINDOW_SHIFT)
    return elementwise(each, lambda x: (x >> np.uint64(WINDOW_SHIFT)) == number, ["b64"], "pred")


@instruction("cvt", modifiers=r"rn rz rm rp rni rzi rmi rpi ftz sat relu")
def _convert(each: Instruction) -> Execute:
    types = [modifier for modifier in each.modifiers if modifier in TYPES]
    to, from_ = types
    if "tf32" in types:
        raise Unsupported("conversion to tf32")
    if to in PACKED_HALVES:
        half = to[:-2]
        convert = conversion(each, half, from_)

        def function(high: Any, low: Any) -> Any:
            high, low = (np.asarray(convert(x)).view(np.uint16).astype(np.uint32) for x in (high, low))
            return (high << np.uint32(16)) | low

        return elementwise(each, function, [from_, from_], to)
    return elementwise(each, conversion(each, to, from_), [from_], to)


def conversion(each: Instruction, to: str, from_: str) -> Callable:
    """The function that converts values, from the types and the modifiers of a cvt."""
    if to in FLOATS:
        return _float_to_float(each, to, from_) if from_ in FLOATS else _integer_to_float(each, to, from_)
    if each.has("relu"):
        raise Unsupported(f".relu of {to}")
    return _float_to_integer(each, to, from_) if from_ in FLOATS else _integer_to_integer(each, to)


def _value(x: Any, type_name: str, ftz: bool) -> Any:
    """Float values as numpy knows them."""
    value = np.asarray(bf16_to_f32(x) if type_name == "bf16" else x)
    return flush_subnormals(value) if ftz and value.dtype == np.float32 else value


def _integer_to_float(each: Instruction, to: str, from_: str) -> Callable:
    if each.has(*_DIRECTED, "sat", "relu"):
        raise Unsupported("modifiers of a conversion from integer to float")
    if to == "bf16":
        if BITS[from_] == 64:
            raise Unsupported("a conversion that would be rounded to float64 first")
        return lambda x: f64_to_bf16(np.asarray(x).astype(np.float64))
    if to == "f16":
        return lambda x: np.asarray(x).astype(np.float64).astype(np.float16)
    return lambda x: np.asarray(x).astype(NUMPY[to])


def _float_to_float(each: Instruction, to: str, from_: str) -> Callable:
    ftz, saturates, relu = each.has("ftz"), each.has("sat"), each.has("relu")
    to_integral = next((_TO_INTEGRAL[m] for m in each.modifiers if m in _TO_INTEGRAL), None)
    rounding = each.first_of(*_DIRECTED, default="rn")
    if to == "bf16" and (saturates or rounding in ("rm", "rp") or (rounding == "rz" and from_ == "f64")):
        raise Unsupported("modifiers of a conversion to bf16")
    if relu and to not in HALVES:
        raise Unsupported(f".relu of {to}")

    def rounded(value: Any) -> Any:
        if to == "bf16":
            return f64_to_bf16(value) if from_ == "f64" else f32_to_bf16(value, rounding)
        return value.astype(NUMPY[to]) if rounding == "rn" else _round_directed(value, NUMPY[to], rounding)

    def convert(x: Any) -> Any:
        value = _value(x, from_, ftz)
        if to_integral is not None:
            value = to_integral(value)
        result = np.asarray(rounded(value))
        if to in ("f16", "f32") and from_ != to:
            result = canonical_nan(result)
        if ftz and to == "f32":
            result = flush_subnormals(result)
        if saturates:
            result = saturate(result)
        return negative_to_zero(result, to) if relu else result

    return convert


def _round_directed(value: Any, numpy_type: Any, rounding: str) -> Any:
    """Round toward zero (rz), down (rm) or up (rp): step from the nearest value if that is on the wrong side."""
    nearest = value.astype(numpy_type)
    back = nearest.astype(np.float64)
    if rounding == "rz":
        return np.where(np.abs(back) > np.abs(value), np.nextafter(nearest, numpy_type(0)), nearest)
    if rounding == "rm":
        return np.where(back > value, np.nextafter(nearest, numpy_type(-np.inf)), nearest)
    return np.where(back < value, np.nextafter(nearest, numpy_type(np.inf)), nearest)


def _float_to_integer(each: Instruction, to: str, from_: str) -> Callable:
    """Out of range goes to the nearest end of the range."""
    ftz = each.has("ftz")
    to_integral = next((_TO_INTEGRAL[m] for m in each.modifiers if m in _TO_INTEGRAL), None)
    if to_integral is None:
        raise Unsupported("a conversion to integer without its rounding")
    numpy_type = NUMPY[to]
    lowest, highest = (numpy_type(limit) for limit in (np.iinfo(numpy_type).min, np.iinfo(numpy_type).max))
    above = 2.0 ** (BITS[to] - (to[0] == "s"))
    # NaN gives zero, except for the "indefinite integer" of 64-bit results.
    of_nan = numpy_type({"s64": np.iinfo(np.int64).min, "u64": 1 << 63}.get(to, 0))

    def convert(x: Any) -> Any:
        value = to_integral(_value(x, from_, ftz).astype(np.float64))
        nan, over, under = np.isnan(value), value >= above, value < float(lowest)
        result = np.where(nan | over | under, 0.0, value).astype(numpy_type)
        return np.where(nan, of_nan, np.where(over, highest, np.where(under, lowest, result)))

    return convert


def _integer_to_integer(each: Instruction, to: str) -> Callable:
    saturates, target = each.has("sat"), np.iinfo(NUMPY[to])

    def convert(x: Any) -> Any:
        if saturates:
            given = np.iinfo(x.dtype)
            low, high = max(target.min, given.min), min(target.max, given.max)
            x = np.clip(x, x.dtype.type(low), x.dtype.type(high))
        return np.asarray(x).astype(NUMPY[to])

    return convert
