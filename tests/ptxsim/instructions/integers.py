"""Integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..operands import destination, source
from ..syntax import Instruction
from ..types import BITS, NUMPY
from .registry import Execute, elementwise, instruction


def arithmetic(each: Instruction) -> Execute:
    """add, sub, mul, mad, min and max of integers."""
    opcode, type_name = each.opcode, each.type()
    if each.has("ftz", "relu", "NaN", "rn", "rz", "rm", "rp") or opcode == "fma":
        raise Unsupported(f"modifiers of {opcode}.{type_name}")
    if opcode in ("add", "sub"):
        return _add_or_subtract(each, type_name)
    if each.has("cc", "sat"):
        raise Unsupported(f".cc or .sat of {opcode}")
    if opcode in ("min", "max"):
        return elementwise(each, np.minimum if opcode == "min" else np.maximum, [type_name] * 2, type_name)
    product, result_type = _product(each, type_name)
    if opcode == "mul":
        return elementwise(each, product, [type_name] * 2, result_type)
    return elementwise(each, lambda a, b, c: product(a, b) + c, [type_name, type_name, result_type], result_type)


def _add_or_subtract(each: Instruction, type_name: str) -> Execute:
    if each.has("cc"):
        return _with_carry(each, takes_carry=False)
    function: Callable = np.add if each.opcode == "add" else np.subtract
    if each.has("sat"):
        numpy_type = NUMPY[type_name]
        limits = np.iinfo(numpy_type)

        def saturating(a: Any, b: Any) -> Any:
            wide = function(np.asarray(a).astype(np.int64), np.asarray(b).astype(np.int64))
            return np.clip(wide, limits.min, limits.max).astype(numpy_type)

        if BITS[type_name] > 32:
            raise Unsupported(f".sat of {type_name}")
        return elementwise(each, saturating, [type_name] * 2, type_name)
    return elementwise(each, function, [type_name] * 2, type_name)


def _product(each: Instruction, type_name: str) -> tuple[Callable, str]:
    """The multiplication that .wide, .hi or .lo asks for, and the type of its result."""
    bits = BITS[type_name]
    if each.has("wide"):
        wide_type = f"{type_name[0]}{2 * bits}"
        wide = NUMPY[wide_type]
        return lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide), wide_type
    if not each.has("hi"):
        return np.multiply, type_name
    if bits < 64:
        double: Any = np.int64 if type_name[0] == "s" else np.uint64

        def high_half(a: Any, b: Any) -> Any:
            product = np.asarray(a).astype(double) * np.asarray(b).astype(double)
            return (product >> double(bits)).astype(NUMPY[type_name])

        return high_half, type_name
    return _high_half_64, type_name


def _high_half_64(a: Any, b: Any) -> Any:
    pairs = np.broadcast_arrays(np.atleast_1d(a), np.atleast_1d(b))
    high = [(x * y >> 64) & ((1 << 64) - 1) for x, y in zip(*(part.tolist() for part in pairs), strict=True)]
    result = np.array(high, np.uint64).view(a.dtype)
    return result if np.ndim(a) or np.ndim(b) else result[0]


@instruction("addc", "subc", modifiers="cc")
def _add_with_carry(each: Instruction) -> Execute:
    return _with_carry(each, takes_carry=True)


def _with_carry(each: Instruction, takes_carry: bool) -> Execute:
    """add.cc, addc, sub.cc and subc, with the carry flag of each thread."""
    if BITS[each.type()] != 32:
        raise Unsupported("64-bit carry arithmetic")
    if len(each.operands) != 3:
        raise Unsupported(f"{len(each.operands) - 1} source operands")
    read_a, read_b = source(each.operands[1], "u32"), source(each.operands[2], "u32")
    write = destination(each.operands[0], "u32")
    subtracts, gives_carry = each.opcode.startswith("sub"), each.has("cc")

    def execute(wave: Any, compute: Any, active: Any) -> None:
        if wave.carry is None:
            wave.carry = np.zeros(wave.size, np.uint64)
        a, b = (np.asarray(read(wave, compute)).astype(np.uint64) for read in (read_a, read_b))
        if takes_carry:
            b = b + (wave.carry if compute is None else wave.carry[compute])
        result = np.asarray(a - b if subtracts else a + b)
        write(wave, compute, result.astype(np.uint32))
        if gives_carry:
            wave.carry[slice(None) if compute is None else compute] = (result >> np.uint64(32)) & np.uint64(1)

    return execute


def divide(each: Instruction) -> Execute:
    """div and rem of integers: toward zero, as in C."""
    type_name = each.type()
    numpy_type, signed = NUMPY[type_name], type_name[0] == "s"
    one = numpy_type(1)
    by_zero = numpy_type(-1) if signed else np.iinfo(numpy_type).max  # undefined in PTX; this is what the hardware does

    def quotient_and_remainder(a: Any, b: Any) -> tuple[Any, Any, Any]:
        zero = np.asarray(b) == 0
        divisor = np.where(zero, one, b)
        quotient = np.floor_divide(a, divisor)
        if signed:
            rest = np.asarray(a - quotient * divisor)
            quotient = np.where((rest != 0) & ((np.asarray(a) < 0) != (divisor < 0)), quotient + one, quotient)
        return zero, quotient, a - quotient * divisor

    def function(a: Any, b: Any) -> Any:
        zero, quotient, remainder = quotient_and_remainder(a, b)
        if each.opcode == "rem":
            return np.where(zero, a, remainder).astype(numpy_type)
        return np.where(zero, numpy_type(by_zero), quotient).astype(numpy_type)

    return elementwise(each, function, [type_name] * 2, type_name)


@instruction("dp4a")
def _dot_product_of_bytes(each: Instruction) -> Execute:
    byte_types = [np.int8 if each.type(i)[0] == "s" else np.uint8 for i in (0, 1)]

    def function(a: Any, b: Any, c: Any) -> Any:
        total = np.asarray(c).astype(np.int64)
        for byte in range(4):
            shift = np.uint32(8 * byte)
            x, y = (
                np.asarray(word >> shift).astype(np.uint8).view(byte_type).astype(np.int64)
                for word, byte_type in zip((a, b), byte_types, strict=True)
            )
            total = total + x * y
        return total.astype(np.int32)

    return elementwise(each, function, ["u32", "u32", "s32"], "s32")
