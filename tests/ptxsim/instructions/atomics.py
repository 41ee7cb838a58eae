"""Atomics: applied one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..access import check, split_generic
from ..errors import Unsupported
from ..numbers import narrow_half, sum_to_odd, widen_half
from ..operands import address, destination, source
from ..syntax import Instruction
from ..types import BITS, NUMPY, PACKED_HALVES, UNSIGNED
from .loads import MEMORY_MODIFIERS, memory_space
from .registry import Execute, instruction

_OPERATIONS = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")


def combining(operation: str, type_name: str) -> Callable[[Any, Any], Any]:
    """What an atomic, or a reduction, makes of the old value and its operand; both are numpy scalars."""
    numpy_type = NUMPY[type_name]
    if type_name == "bf16":
        if operation != "add":
            raise Unsupported(f"atomic {operation} of bf16")
        return lambda old, x: narrow_half(sum_to_odd(widen_half(old, "bf16"), widen_half(x, "bf16")), "bf16")
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "add": lambda old, x: numpy_type(old + x),
        "min": min,
        "max": max,
        "exch": lambda old, x: x,
        "and": lambda old, x: old & x,
        "or": lambda old, x: old | x,
        "xor": lambda old, x: old ^ x,
        "inc": lambda old, x: numpy_type(0) if old >= x else numpy_type(old + numpy_type(1)),
        "dec": lambda old, x: x if old == 0 or old > x else numpy_type(old - numpy_type(1)),
    }
    return functions[operation]


@instruction("atom", "red", modifiers=f"{MEMORY_MODIFIERS} {' '.join(_OPERATIONS)} noftz")
def _atomic(each: Instruction) -> Execute:
    operation, type_name = each.first_of(*_OPERATIONS), each.type()
    if type_name in PACKED_HALVES or each.has("v2", "v4", "v8"):
        raise Unsupported("packed atomics")
    operands = each.operands if each.opcode == "atom" else [None, *each.operands]
    inputs = operands[2 : len(operands) - each.has("L2::cache_hint")]
    if len(inputs) != (2 if operation == "cas" else 1):
        raise Unsupported("operand count")
    reads = [source(operand, type_name) for operand in inputs]
    write = destination(operands[0], type_name)
    addresses, of_symbol = address(operands[1])
    space = memory_space(each, of_symbol)
    if operation == "cas":
        step: Callable = lambda old, compare, x: x if old == compare else old  # noqa: E731
    else:
        step = combining(operation, type_name)
    width, numpy_type, unsigned = BITS[type_name] // 8, NUMPY[type_name], UNSIGNED[BITS[type_name]]

    def apply(wave: Any, where: str, at: np.ndarray, values: list, lanes: np.ndarray) -> np.ndarray:
        """Apply the operation at addresses in one space; returns the old values."""
        if where not in ("global", "shared"):
            wave.fail(f"atomic on {where} memory", lanes[0])
        memory, offset = check(wave, where, at, width, lanes, "atom")
        result = memory.load(offset, width, 1)[0].view(numpy_type)
        current: dict[int, Any] = {}
        order = wave.launch.rng.permutation(lanes.size) if wave.launch.shuffle else range(lanes.size)
        offsets = offset.tolist()
        for i in order:
            old = result[i] = current.get(offsets[i], result[i])
            current[offsets[i]] = step(old, *(value[i] for value in values))
        new = np.array(list(current.values()), numpy_type).view(unsigned)
        memory.store(np.array(list(current), np.int64), width, [new])
        return result

    def execute(wave: Any, compute: Any, active: Any) -> None:
        lanes, at = wave.lanes(active), addresses(wave, active)
        values = [np.broadcast_to(np.asarray(read(wave, active)), lanes.shape) for read in reads]
        if space == "generic":
            old = np.zeros(lanes.size, numpy_type)
            for where, part, inner in split_generic(wave, at, active):
                old[part] = apply(wave, where, inner, [value[part] for value in values], lanes[part])
        else:
            old = apply(wave, space, at, values, lanes)
        write(wave, active, old)

    return execute
