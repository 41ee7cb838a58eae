"""Comparison and selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..numbers import bf16_to_f32, flush_subnormals
from ..operands import destination, source
from ..syntax import Instruction, Vector
from ..types import FLOATS, NUMPY, PACKED_HALVES
from .registry import Execute, elementwise, instruction

_ORDERED: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu")  # also true where an operand is NaN
_COMBINE: dict[str, Callable] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name: str, type_name: str, ftz: bool) -> Callable:
    """The function of two operands behind the name of a comparison."""
    if type_name not in FLOATS:
        if ftz:
            raise Unsupported(f".ftz of {type_name}")
        return _ORDERED[name]
    if ftz and type_name not in ("f16", "f32"):
        raise Unsupported(f".ftz of {type_name}")

    def prepared(x: Any) -> Any:
        if type_name == "bf16":
            return bf16_to_f32(x)
        return flush_subnormals(x) if ftz else x

    def compare(a: Any, b: Any) -> Any:
        a, b = prepared(a), prepared(b)
        unordered = np.isnan(a) | np.isnan(b)
        if name == "nan":
            return unordered
        if name == "num":
            return ~unordered
        if name in _UNORDERED:
            return _ORDERED[name[:-1]](a, b) | unordered
        result = _ORDERED[name](a, b)
        return result & ~unordered if name == "ne" else result

    if name not in ("nan", "num", *_UNORDERED, *_ORDERED):
        raise Unsupported(f"comparison .{name}")
    return compare


_COMPARISONS = " ".join((*_ORDERED, *_UNORDERED, "num", "nan"))


@instruction("setp", "set", modifiers=f"{_COMPARISONS} and or xor ftz")
def _compare(each: Instruction) -> Execute:
    type_name = each.type()
    packed = type_name in PACKED_HALVES
    compare = comparison(each.modifiers[0], type_name[:-2] if packed else type_name, each.has("ftz"))
    combine = next((_COMBINE[modifier] for modifier in each.modifiers if modifier in _COMBINE), None)
    if len(each.operands) != (4 if combine else 3):
        raise Unsupported("operand count")
    read_a, read_b = source(each.operands[1], type_name), source(each.operands[2], type_name)
    read_c = source(each.operands[3], "pred") if combine else None

    def values(wave: Any, compute: Any) -> tuple[Any, Any]:
        return read_a(wave, compute), read_b(wave, compute)

    def combined(wave: Any, compute: Any, result: Any) -> Any:
        return combine(result, read_c(wave, compute)) if combine and read_c else result

    if each.opcode == "set":
        return _set(each, lambda wave, compute: combined(wave, compute, compare(*values(wave, compute))))
    first = each.operands[0]
    writes = [destination(d, "pred") for d in (first.items if isinstance(first, Vector) else [first])]
    if packed:
        half = NUMPY[type_name[:-2]]

        def execute(wave: Any, compute: Any, active: Any) -> None:
            results = []
            for shift in (np.uint32(0), np.uint32(16))[: len(writes)]:
                a, b = (np.asarray(x >> shift).astype(np.uint16).view(half) for x in values(wave, compute))
                results.append(combined(wave, compute, compare(a, b)))
            for write, result in zip(writes, results, strict=True):
                write(wave, compute, result)

        return execute

    def execute_scalar(wave: Any, compute: Any, active: Any) -> None:
        result = compare(*values(wave, compute))
        # p|q: the second predicate is made from the opposite of the comparison.
        results = [combined(wave, compute, each_result) for each_result in (result, ~result)[: len(writes)]]
        for write, each_result in zip(writes, results, strict=True):
            write(wave, compute, each_result)

    return execute_scalar


def _set(each: Instruction, condition: Callable) -> Execute:
    """A number for true (1.0, or all ones) and zero for false."""
    if each.type() in PACKED_HALVES:
        raise Unsupported("packed set")
    type_name = each.type(0)
    numpy_type = NUMPY[type_name]
    write = destination(each.operands[0], type_name)
    if type_name == "bf16":
        true = numpy_type(0x3F80)
    elif type_name in FLOATS:
        true = numpy_type(1)
    else:
        true = numpy_type(-1) if type_name[0] == "s" else numpy_type(np.iinfo(numpy_type).max)

    def execute(wave: Any, compute: Any, active: Any) -> None:
        write(wave, compute, np.where(condition(wave, compute), true, numpy_type(0)))

    return execute


@instruction("selp")
def _select_by_predicate(each: Instruction) -> Execute:
    type_name = each.type()
    return elementwise(each, lambda a, b, p: np.where(p, a, b), [type_name, type_name, "pred"], type_name)


@instruction("slct", modifiers="ftz")
def _select_by_sign(each: Instruction) -> Execute:
    type_name, sign_type, ftz = each.type(0), each.type(1), each.has("ftz")
    if ftz and sign_type != "f32":
        raise Unsupported(f".ftz of {sign_type}")

    def function(a: Any, b: Any, c: Any) -> Any:
        return np.where((flush_subnormals(c) if ftz else c) >= c.dtype.type(0), a, b)

    return elementwise(each, function, [type_name, type_name, sign_type], type_name)


_CLASSES: dict[str, Callable] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
    "number": lambda x: ~np.isnan(x),
}


@instruction("testp", modifiers=" ".join(_CLASSES))
def _classify(each: Instruction) -> Execute:
    return elementwise(each, _CLASSES[each.modifiers[0]], [each.type()], "pred")
