"""Operands as functions: (wave, lanes) -> values, and (wave, lanes, values) -> None.

lanes is an array of thread indices, or None for all threads of the wave. Values are arrays with one element for
each lane, or a numpy scalar that all lanes share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import PTXError, Unsupported
from .special import special_register
from .syntax import Address, Immediate, Negated, Register, SpecialRegister, Symbol
from .types import BITS, NUMPY, UNSIGNED, as_type, register_bits

Read = Callable[[Any, Any], Any]
Write = Callable[[Any, Any, Any], None]


def immediate_value(immediate: Immediate, type_name: str) -> Any:
    """A literal as a numpy scalar of a type."""
    if immediate.bits is not None:
        if type_name in ("f32", "f64") and BITS[type_name] != immediate.width:
            return NUMPY[type_name](as_type(immediate.bits, f"f{immediate.width}"))
        return as_type(immediate.bits, type_name)
    if type_name == "pred":
        return np.bool_(immediate.value)
    if type_name in ("f16", "f32", "f64"):
        return NUMPY[type_name](immediate.value)
    return as_type(int(immediate.value), type_name)


def source(operand: Any, type_name: str) -> Read:
    """A function that reads an operand as values of a type."""
    numpy_type, bits = NUMPY[type_name], BITS[type_name]
    if isinstance(operand, Register):
        return _register_source(operand, type_name)
    if isinstance(operand, Negated):
        inner = source(operand.register, "pred")
        return lambda wave, lanes: ~inner(wave, lanes)
    if isinstance(operand, Immediate):
        value = immediate_value(operand, type_name)
        return lambda wave, lanes: value
    if isinstance(operand, SpecialRegister):
        special, unsigned = special_register(operand.name), UNSIGNED[bits]
        return lambda wave, lanes: special(wave, lanes).astype(unsigned).view(numpy_type)
    if isinstance(operand, (Symbol, Address)):
        base, offset = (operand, 0) if isinstance(operand, Symbol) else (operand.base, operand.offset)
        if isinstance(base, Symbol):
            variable = base.variable  # a global one gets its address at the launch, so it is read late
            return lambda wave, lanes: as_type(variable.offset + offset, type_name)
    raise Unsupported(f"operand {operand}")


def _register_source(register: Register, type_name: str) -> Read:
    slot, numpy_type, bits = register.slot, NUMPY[type_name], BITS[type_name]
    if register.type == "pred" or type_name == "pred":
        if register.type != type_name:
            raise Unsupported("a predicate used as data")
        # As a view: the array itself would become that of the register that a mov writes, and later writes to one would
        # change the other.
        return lambda wave, lanes: wave.register(slot).view() if lanes is None else wave.register(slot)[lanes]
    if register_bits(register.type) == bits:

        def same_width(wave: Any, lanes: Any) -> Any:
            values = wave.register(slot)
            return (values if lanes is None else values[lanes]).view(numpy_type)

        return same_width
    unsigned = UNSIGNED[bits]

    def other_width(wave: Any, lanes: Any) -> Any:
        values = wave.register(slot)
        return (values if lanes is None else values[lanes]).astype(unsigned).view(numpy_type)

    return other_width


def destination(operand: Any, type_name: str) -> Write:
    """A function that writes values of a type to a register, or drops them where the operand is "_"."""
    if operand is None:
        return lambda wave, lanes, values: None
    if not isinstance(operand, Register):
        raise Unsupported(f"destination {operand}")
    slot, convert = operand.slot, _to_register(operand, type_name)

    def write(wave: Any, lanes: Any, values: Any) -> None:
        if lanes is not None:
            wave.register(slot)[lanes] = convert(values)
        elif isinstance(values, np.ndarray) and values.flags.owndata and values.shape == (wave.size,):
            wave.registers[slot] = convert(values)  # a new array, which nobody else has
        else:  # a scalar, or a view of something that may change
            values = convert(values)
            wave.registers[slot] = register = np.empty(wave.size, values.dtype)
            register[:] = values

    return write


def _to_register(register: Register, type_name: str) -> Callable[[Any], Any]:
    """The conversion from values of a type to the unsigned integers of a register."""
    if register.type == "pred":
        if type_name != "pred":
            raise Unsupported(f"a .{type_name} result in a predicate")
        return lambda values: np.asarray(values, np.bool_)
    bits, width = BITS[type_name], register_bits(register.type)
    if width < bits:
        raise PTXError(f"a {bits}-bit result does not fit a .{register.type} register")
    unsigned = UNSIGNED[width]
    if width == bits:
        return lambda values: np.asarray(values).view(unsigned)
    if type_name[0] == "s":
        signed = NUMPY[f"s{width}"]
        return lambda values: np.asarray(values).astype(signed).view(unsigned)
    narrow = UNSIGNED[bits]
    return lambda values: np.asarray(values).view(narrow).astype(unsigned)


def address(operand: Any) -> tuple[Read, str | None]:
    """A function that gives the uint64 address in each lane, and the state space of the variable if it names one."""
    base, offset = (operand.base, operand.offset) if isinstance(operand, Address) else (operand, 0)
    space = base.variable.space if isinstance(base, Symbol) else None
    read = source(base, "b32" if isinstance(base, Register) and BITS[base.type] == 32 else "b64")
    addend = np.uint64(offset & ((1 << 64) - 1))

    def compute(wave: Any, lanes: Any) -> Any:
        values = np.asarray(read(wave, lanes)).astype(np.uint64)
        if offset:
            values = values + addend
        shape = (wave.size,) if lanes is None else lanes.shape
        return values if values.shape == shape else np.broadcast_to(values, shape).copy()

    return compute, space
