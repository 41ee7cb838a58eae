"""Logic, shifts, and the instructions that move bits around."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..operands import destination, source
from ..syntax import Immediate, Instruction
from ..types import BITS, NUMPY, UNSIGNED
from .registry import Execute, elementwise, instruction

_BYTE = np.uint32(255)


@instruction("and", "or", "xor", "not", "cnot")
def _logic(each: Instruction) -> Execute:
    type_name = each.type()
    if each.opcode == "not":
        return elementwise(each, np.invert, [type_name], type_name)
    if each.opcode == "cnot":
        return elementwise(each, lambda x: np.asarray(x == 0).astype(x.dtype), [type_name], type_name)
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[each.opcode]
    return elementwise(each, function, [type_name] * 2, type_name)


@instruction("shl", "shr")
def _shift(each: Instruction) -> Execute:
    """Amounts beyond the width are clamped to it, not taken modulo."""
    type_name = each.type()
    bits, numpy_type = BITS[type_name], NUMPY[type_name]
    left, arithmetic = each.opcode == "shl", type_name[0] == "s"
    zero = numpy_type(0)

    def function(x: Any, amount: Any) -> Any:
        within = np.minimum(amount, np.uint32(bits - 1)).astype(numpy_type)
        shifted = x << within if left else x >> within
        if arithmetic and not left:  # the sign fills all bits
            return shifted
        return np.where(amount >= np.uint32(bits), zero, shifted).astype(numpy_type)

    return elementwise(each, function, [type_name, "u32"], type_name)


@instruction("shf", modifiers="l r wrap clamp")
def _funnel_shift(each: Instruction) -> Execute:
    left, wraps = each.has("l"), each.has("wrap")

    def function(low: Any, high: Any, amount: Any) -> Any:
        within = (amount & np.uint32(31)) if wraps else np.minimum(amount, np.uint32(32))
        within = np.asarray(within).astype(np.uint64)
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low).astype(np.uint64)
        return ((both << within) >> np.uint64(32) if left else both >> within).astype(np.uint32)

    return elementwise(each, function, ["b32", "b32", "u32"], "b32")


def _count_ones(x: Any) -> Any:
    """The number of bits that are set (numpy has bitwise_count from version 2 on)."""
    unsigned = x.dtype.type
    ones = (1 << (8 * x.dtype.itemsize)) - 1
    # Sums of neighbours in fields of 2, 4 and 8 bits; the product adds all bytes in the highest one.
    pairs, fours, bytes_, each_byte = (unsigned(ones // divisor) for divisor in (3, 5, 17, 255))
    x = x - ((x >> unsigned(1)) & pairs)
    x = (x & fours) + ((x >> unsigned(2)) & fours)
    x = (x + (x >> unsigned(4))) & bytes_
    return (x * each_byte) >> unsigned(8 * x.dtype.itemsize - 8)


@instruction("popc")
def _popcount(each: Instruction) -> Execute:
    bits = BITS[each.type()]
    return elementwise(each, lambda x: _count_ones(np.asarray(x)).astype(np.uint32), [f"u{bits}"], "u32")


@instruction("brev")
def _reverse_bits(each: Instruction) -> Execute:
    type_name = each.type()
    bits, unsigned = BITS[type_name], UNSIGNED[BITS[type_name]]

    def function(x: Any) -> Any:
        result = np.zeros_like(x)
        for i in range(bits):
            result |= ((x >> unsigned(i)) & unsigned(1)) << unsigned(bits - 1 - i)
        return result

    return elementwise(each, lambda x: function(np.asarray(x)), [type_name], type_name)


def _highest_bit(x: Any) -> Any:
    """The index of the highest bit that is set, -1 for zero."""
    x = np.asarray(x)
    unsigned = x.dtype.type
    result = np.full(x.shape, -1, np.int32)
    for i in range(8 * x.dtype.itemsize):
        result = np.where((x >> unsigned(i)) & unsigned(1) != 0, np.int32(i), result)
    return result


@instruction("clz")
def _leading_zeros(each: Instruction) -> Execute:
    bits = BITS[each.type()]
    return elementwise(each, lambda x: (np.int32(bits - 1) - _highest_bit(x)).astype(np.uint32), [f"u{bits}"], "u32")


@instruction("bfind")
def _find_highest_bit(each: Instruction) -> Execute:
    if each.type()[0] == "s":
        raise Unsupported("bfind of a signed type")
    return elementwise(each, lambda x: _highest_bit(x).view(np.uint32), [each.type()], "u32")


def _field_mask(length: Any, unsigned: Any) -> Any:
    """length low bits."""
    bits = 8 * np.dtype(unsigned).itemsize
    some = (unsigned(1) << np.minimum(length, bits - 1).astype(unsigned)) - unsigned(1)
    return np.where(length >= bits, np.iinfo(unsigned).max, some).astype(unsigned)


def _byte(x: Any) -> Any:
    """The low byte, which is all that counts of a position or a length."""
    return np.asarray(x & _BYTE).astype(np.int64)


@instruction("bfe")
def _extract_field(each: Instruction) -> Execute:
    type_name = each.type()
    bits, numpy_type, unsigned = BITS[type_name], NUMPY[type_name], UNSIGNED[BITS[type_name]]

    def function(x: Any, position: Any, length: Any) -> Any:
        position, length = _byte(position), _byte(length)
        mask = _field_mask(length, unsigned)
        within = np.minimum(position, bits - 1)
        if type_name[0] != "s":
            return np.where(position < bits, x >> within.astype(unsigned), unsigned(0)) & mask
        # Behind the word, as behind the field, all bits are its sign.
        sign_at = np.clip(position + length - 1, 0, bits - 1).astype(numpy_type)
        negative = (length > 0) & ((x >> sign_at) & numpy_type(1) != 0)
        field = (x >> within.astype(numpy_type)).view(unsigned) & mask
        return np.where(negative, field | ~mask, field).view(numpy_type)

    return elementwise(each, function, [type_name, "u32", "u32"], type_name)


@instruction("bfi")
def _insert_field(each: Instruction) -> Execute:
    type_name = each.type()
    bits, unsigned = BITS[type_name], UNSIGNED[BITS[type_name]]

    def function(field: Any, into: Any, position: Any, length: Any) -> Any:
        position, length = _byte(position), _byte(length)
        shift = np.minimum(position, bits - 1).astype(unsigned)
        mask = np.where(position < bits, _field_mask(length, unsigned) << shift, unsigned(0)).astype(unsigned)
        return ((into & ~mask) | ((field << shift) & mask)).astype(unsigned)

    return elementwise(each, function, [type_name, type_name, "u32", "u32"], type_name)


@instruction("prmt")
def _permute_bytes(each: Instruction) -> Execute:
    def function(low: Any, high: Any, selector: Any) -> Any:
        pool = np.asarray(low).astype(np.uint64) | (np.asarray(high).astype(np.uint64) << np.uint64(32))
        result = np.uint32(0)
        for i in range(4):
            select = (np.asarray(selector) >> np.uint32(4 * i)) & np.uint32(15)
            shift = (select & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            byte = ((pool >> shift) & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & np.uint32(128) != 0, _BYTE, np.uint32(0))
            byte = np.where(select & np.uint32(8) != 0, sign, byte)  # the sign of the byte in all its bits
            result = result | (byte << np.uint32(8 * i))
        return result

    return elementwise(each, function, ["b32"] * 3, "b32")


@instruction("lop3")
def _logic_of_three(each: Instruction) -> Execute:
    if len(each.operands) != 5 or not isinstance(each.operands[4], Immediate):
        raise Unsupported("operands of lop3")
    reads = [source(operand, "b32") for operand in each.operands[1:4]]
    write = destination(each.operands[0], "b32")
    table = int(each.operands[4].value)

    def execute(wave: Any, compute: Any, active: Any) -> None:
        a, b, c = (read(wave, compute) for read in reads)
        result = np.uint32(0)
        for i in range(8):  # the table has a bit for each combination of the three
            if table >> i & 1:
                result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        write(wave, compute, result)

    return execute
