"""Floating-point arithmetic, and the instructions that are arithmetic of floats or of integers by their type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..numbers import (
    canonical_nan,
    flush_subnormals,
    fma32,
    fma64,
    minimum_or_maximum,
    narrow_half,
    saturate,
    sum_to_odd,
    widen_half,
)
from ..syntax import Instruction
from ..types import BITS, FLOATS, HALVES, NUMPY, PACKED_HALVES, UNSIGNED
from . import integers
from .registry import Execute, elementwise, instruction, reads_and_write

ROUNDINGS = "rn rz rm rp"

_ARITHMETIC: dict[str, Callable] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def refuse_directed_rounding(each: Instruction) -> None:
    """Arithmetic rounds to nearest even, or is not supported."""
    for rounding in ("rz", "rm", "rp", "rna", "rs"):
        if each.has(rounding):
            raise Unsupported(f"rounding .{rounding}")


def with_float_modifiers(each: Instruction, type_name: str, function: Callable) -> Callable:
    """A function of floats with .ftz, .sat and .relu as the instruction has them, and canonical NaN."""
    ftz, saturates, relu = each.has("ftz"), each.has("sat"), each.has("relu")
    if type_name == "bf16" and (ftz or saturates):
        raise Unsupported(".ftz or .sat of bf16")
    if type_name == "f64" and ftz:
        raise Unsupported(".ftz of f64")
    if relu and type_name not in HALVES:
        raise Unsupported(f".relu of {type_name}")

    def modified(*operands: Any) -> Any:
        if ftz:
            operands = tuple(flush_subnormals(operand) for operand in operands)
        result = np.asarray(function(*operands))
        if type_name in ("f32", "f16"):
            result = canonical_nan(result)
        if ftz:
            result = flush_subnormals(result)
        if saturates:
            result = saturate(result)
        return negative_to_zero(result, type_name) if relu else result

    return modified


def negative_to_zero(x: Any, type_name: str) -> Any:
    """.relu of f16 values or bf16 bit patterns: what has the sign bit becomes +0, except NaN."""
    bits = x.view(np.uint16)
    infinity = np.uint16(0x7C00 if type_name == "f16" else 0x7F80)
    negative = (bits >= np.uint16(0x8000)) & ((bits & np.uint16(0x7FFF)) <= infinity)
    return np.where(negative, np.uint16(0), bits).view(x.dtype)


def half_function(each: Instruction, type_name: str) -> Callable:
    """Arithmetic of f16 or bf16, with one rounding."""

    def wide(x: Any) -> Any:
        return widen_half(x, type_name)

    # Products and sums of halves in float64 are exact or rounded to odd.
    if each.opcode == "fma":
        function: Callable = lambda a, b, c: sum_to_odd(wide(a) * wide(b), wide(c))  # noqa: E731
    elif each.opcode == "add":
        function = lambda a, b: sum_to_odd(wide(a), wide(b))  # noqa: E731
    elif each.opcode == "sub":
        function = lambda a, b: sum_to_odd(wide(a), -wide(b))  # noqa: E731
    elif each.opcode == "mul":
        function = lambda a, b: wide(a) * wide(b)  # noqa: E731
    elif each.opcode in ("min", "max"):
        choose = minimum_or_maximum(each.opcode, each.has("NaN"))
        function = lambda a, b: choose(wide(a), wide(b))  # noqa: E731
    else:
        raise Unsupported(f"{each.opcode}.{type_name}")
    return with_float_modifiers(each, type_name, lambda *operands: narrow_half(function(*operands), type_name))


def on_halves(function: Callable, half: str) -> Callable:
    """Lift a function of f16 or bf16 to two of them in 32 bits."""

    def lifted(*operands: Any) -> Any:
        parts = []
        for shift in (np.uint32(0), np.uint32(16)):
            halves = [np.asarray(x >> shift).astype(np.uint16).view(NUMPY[half]) for x in operands]
            parts.append(np.asarray(function(*halves)).view(np.uint16).astype(np.uint32))
        return parts[0] | (parts[1] << np.uint32(16))

    return lifted


def on_pairs(function: Callable) -> Callable:
    """Lift a function of f32 to two of them in 64 bits."""

    def lifted(*operands: Any) -> Any:
        parts = []
        for shift in (np.uint64(0), np.uint64(32)):
            singles = [np.asarray(x >> shift).astype(np.uint32).view(np.float32) for x in operands]
            parts.append(np.asarray(function(*singles)).view(np.uint32).astype(np.uint64))
        return parts[0] | (parts[1] << np.uint64(32))

    return lifted


def approximate(each: Instruction, type_name: str, function: Callable, operands: int = 1) -> Execute:
    """An approximate instruction: correctly rounded, or perturbed where the launch has approx_ulp."""
    exact = with_float_modifiers(each, type_name, function)

    def perturbed(wave: Any, result: Any) -> Any:
        ulp = wave.launch.options.approx_ulp
        bits = result.view(UNSIGNED[BITS[type_name]])
        noise = wave.launch.rng.integers(-ulp, ulp + 1, result.shape).astype(np.int64)
        noisy = (bits.astype(np.int64) + noise).astype(bits.dtype)
        # Zero, subnormals, infinity and NaN stay what they are.
        normal = np.isfinite(result) & (np.abs(result) > np.finfo(result.dtype).tiny * 16)
        return np.where(normal, noisy, bits).view(result.dtype)

    reads, write = reads_and_write(each, [type_name] * operands, type_name)

    def execute(wave: Any, compute: Any, active: Any) -> None:
        result = np.asarray(exact(*[read(wave, compute) for read in reads]))
        write(wave, compute, perturbed(wave, result) if wave.launch.options.approx_ulp else result)

    return execute


@instruction("add", "sub", "mul", "mad", "fma", "min", "max", modifiers=f"{ROUNDINGS} ftz sat cc lo hi wide relu NaN")
def _arithmetic(each: Instruction) -> Execute:
    opcode, type_name = each.opcode, each.type()
    count = 3 if opcode in ("fma", "mad") else 2
    if type_name not in FLOATS | PACKED_HALVES | {"f32x2"}:
        return integers.arithmetic(each)
    refuse_directed_rounding(each)
    if each.has("cc", "lo", "hi", "wide") or (each.has("NaN") and opcode not in ("min", "max")):
        raise Unsupported(f"modifiers of {opcode}.{type_name}")
    if type_name in PACKED_HALVES:
        half = type_name[:-2]
        return elementwise(each, on_halves(half_function(each, half), half), [type_name] * count, type_name)
    if type_name in HALVES:
        return elementwise(each, half_function(each, type_name), [type_name] * count, type_name)
    if opcode in ("min", "max"):
        return _minimum_or_maximum(each, type_name)
    if type_name == "f32x2":
        single = with_float_modifiers(each, "f32", fma32 if count == 3 else _ARITHMETIC[opcode])
        return elementwise(each, on_pairs(single), [type_name] * count, type_name)
    fma = fma32 if type_name == "f32" else fma64
    function = with_float_modifiers(each, type_name, fma if count == 3 else _ARITHMETIC[opcode])
    return elementwise(each, function, [type_name] * count, type_name)


def _minimum_or_maximum(each: Instruction, type_name: str) -> Execute:
    if type_name not in ("f32", "f64"):
        raise Unsupported(f"{each.opcode}.{type_name}")
    choose = minimum_or_maximum(each.opcode, each.has("NaN"))
    if len(each.operands) == 4:  # the form with three inputs of sm_100
        function: Callable = lambda a, b, c: choose(choose(a, b), c)  # noqa: E731
    else:
        function = choose
    count = len(each.operands) - 1
    return elementwise(each, with_float_modifiers(each, type_name, function), [type_name] * count, type_name)


def _divide_approximately(a: Any, b: Any) -> Any:
    quotient = a / b
    # The hardware gives zero for a divisor this large.
    huge = np.asarray((np.abs(b) > np.float32(2.0**126)) & np.isfinite(b))
    if huge.any():
        zero_or_nan = np.where(np.isinf(a), np.float32(np.nan), np.float32(0))
        quotient = np.where(huge, zero_or_nan, quotient)
    return quotient


@instruction("div", "rem", modifiers=f"approx full {ROUNDINGS} ftz")
def _divide(each: Instruction) -> Execute:
    type_name = each.type()
    if type_name not in ("f32", "f64"):
        return integers.divide(each)
    if each.opcode == "rem":
        raise Unsupported(f"rem.{type_name}")
    refuse_directed_rounding(each)
    if each.has("approx"):
        return approximate(each, type_name, _divide_approximately, 2)
    if each.has("full"):
        return approximate(each, type_name, np.divide, 2)
    return elementwise(each, with_float_modifiers(each, type_name, np.divide), [type_name] * 2, type_name)


def _through_f64(function: Callable) -> Callable:
    """Evaluate in float64 and round once to the type of the operand."""
    return lambda x: np.asarray(function(np.asarray(x).astype(np.float64))).astype(x.dtype)


_FUNCTIONS: dict[str, Callable] = {
    "sqrt": np.sqrt,
    "rcp": lambda x: x.dtype.type(1) / x,
    "rsqrt": _through_f64(lambda x: 1 / np.sqrt(x)),
    "ex2": _through_f64(np.exp2),
    "lg2": _through_f64(np.log2),
    "sin": _through_f64(np.sin),
    "cos": _through_f64(np.cos),
    "tanh": _through_f64(np.tanh),
}


@instruction("ex2", "lg2", "sin", "cos", "tanh", modifiers="approx ftz")
@instruction("sqrt", "rcp", "rsqrt", modifiers=f"approx {ROUNDINGS} ftz")
def _function(each: Instruction) -> Execute:
    type_name, function = each.type(), _FUNCTIONS[each.opcode]
    if type_name not in ("f16", "f32", "f64"):
        raise Unsupported(f"{each.opcode}.{type_name}")
    if each.has("approx"):
        return approximate(each, type_name, function)
    refuse_directed_rounding(each)
    return elementwise(each, with_float_modifiers(each, type_name, function), [type_name], type_name)


@instruction("abs", "neg", modifiers="ftz")
def _sign(each: Instruction) -> Execute:
    type_name, absolute = each.type(), each.opcode == "abs"
    if type_name not in FLOATS | PACKED_HALVES:
        if each.has("ftz") or type_name[0] != "s":
            raise Unsupported(f"{each.opcode} of {type_name}")
        return elementwise(each, np.abs if absolute else np.negative, [type_name], type_name)
    bits = BITS[type_name]
    sign = UNSIGNED[bits](0x80008000 if type_name in PACKED_HALVES else 1 << (bits - 1))

    def change_sign(x: Any) -> Any:
        return x & ~sign if absolute else x ^ sign

    if not each.has("ftz"):
        return elementwise(each, change_sign, [f"b{bits}"], f"b{bits}")
    if type_name != "f32":
        raise Unsupported(f".ftz of {type_name}")

    def change_sign_and_flush(x: Any) -> Any:
        return flush_subnormals(np.asarray(change_sign(x.view(np.uint32))).view(np.float32))

    return elementwise(each, change_sign_and_flush, ["f32"], "f32")


@instruction("copysign")
def _copysign(each: Instruction) -> Execute:
    # copysign d, a, b has the sign of a and the magnitude of b.
    return elementwise(each, lambda a, b: np.copysign(b, a), [each.type()] * 2, each.type())
