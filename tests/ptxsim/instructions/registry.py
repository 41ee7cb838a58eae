"""Which function compiles which instruction, and what most of them share.

To compile an instruction is to make a function execute(wave, compute, active) that runs it. active are the lanes
that execute it; compute may have lanes of exited threads besides, which is faster where it does no harm: for
arithmetic, but not for memory. Either is None for all lanes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..errors import Unsupported
from ..operands import Read, Write, destination, source
from ..syntax import Instruction, Kernel
from ..types import TYPES

Execute = Callable[[Any, Any, Any], None]
Compile = Callable[[Instruction], Execute]

_COMPILERS: dict[str, Compile] = {}
_MODIFIERS: dict[str, re.Pattern[str] | None] = {}


def instruction(*opcodes: str, modifiers: str | None = "") -> Callable[[Compile], Compile]:
    """Register the compiler of some instructions, with the modifiers (regular expressions) they may carry.

    Types need no mention. Any other modifier is refused, so that one which the simulator does not know cannot change
    the meaning of a kernel unnoticed. With modifiers=None there is no check.
    """
    allowed = None if modifiers is None else re.compile("|".join(modifiers.split()) or "$.")

    def register(function: Compile) -> Compile:
        for opcode in opcodes:
            _COMPILERS[opcode], _MODIFIERS[opcode] = function, allowed
        return function

    return register


def compile_kernel(kernel: Kernel) -> None:
    """Compile all instructions of a kernel, once."""
    if kernel.compiled:
        return
    for each in kernel.instructions:
        try:
            if each.opcode not in _COMPILERS:
                raise Unsupported("this instruction")
            _check_modifiers(each)
            each.execute = _COMPILERS[each.opcode](each)
        except (Unsupported, KeyError, IndexError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{kernel.name}: PTX line {each.line}: {each.text} ({reason})") from error
    kernel.compiled = True


def _check_modifiers(each: Instruction) -> None:
    allowed = _MODIFIERS[each.opcode]
    for modifier in each.modifiers:
        if allowed is not None and modifier not in TYPES and not allowed.fullmatch(modifier):
            raise Unsupported(f"modifier .{modifier}")


def reads_and_write(each: Instruction, sources: list[str], result: str) -> tuple[list[Read], Write]:
    """How to read the sources and write the destination of d = function(a, ...), from their types."""
    if len(each.operands) != 1 + len(sources):
        raise Unsupported(f"{len(each.operands) - 1} source operands")
    reads = [source(operand, type_name) for operand, type_name in zip(each.operands[1:], sources, strict=True)]
    return reads, destination(each.operands[0], result)


def elementwise(each: Instruction, function: Callable, sources: list[str], result: str) -> Execute:
    """d = function(a, ...): the shape of most arithmetic, from the types of the sources and of the result."""
    reads, write = reads_and_write(each, sources, result)
    if len(reads) == 1:
        (read,) = reads
        return lambda wave, compute, active: write(wave, compute, function(read(wave, compute)))
    if len(reads) == 2:
        read_a, read_b = reads

        def execute(wave: Any, compute: Any, active: Any) -> None:
            write(wave, compute, function(read_a(wave, compute), read_b(wave, compute)))

        return execute
    return lambda wave, compute, active: write(wave, compute, function(*[read(wave, compute) for read in reads]))
