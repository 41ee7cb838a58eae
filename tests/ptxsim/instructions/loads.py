"""Loads, stores, and copies to shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import load, store
from ..errors import PTXError, Unsupported
from ..operands import address, destination, source
from ..syntax import Address, Immediate, Instruction, Register, Symbol, Vector
from ..types import BITS, NUMPY, UNSIGNED
from .registry import Execute, instruction

SPACES = ("global", "shared", "local", "const", "param")
MEMORY_MODIFIERS = (
    "weak relaxed acquire release acq_rel volatile cta cluster gpu sys ca cg cs lu cv wb wt nc v2 v4 v8 "
    "global shared shared::cta local const param L1::.* L2::.*"
)


def memory_space(each: Instruction, of_symbol: str | None) -> str:
    """The state space of an access, from the instruction or else from the variable it names."""
    if of_symbol == "local":  # also the arguments of calls, which the instruction says are in .param
        return "local"
    named = next((m.split("::")[0] for m in each.modifiers if m.split("::")[0] in SPACES), None)
    return named or of_symbol or "generic"


def _elements(each: Instruction, operand: Any) -> list:
    """The registers that a load fills or a store takes: 1, 2, 4 or 8, as the instruction says."""
    items = operand.items if isinstance(operand, Vector) else [operand]
    if len(each.operands) != 2 + each.has("L2::cache_hint"):
        raise Unsupported("operand count")
    if len(items) != int(each.first_of("v2", "v4", "v8", default="v1")[1:]):
        raise PTXError(f"line {each.line}: vector width does not match: {each.text}")
    return items


@instruction("ld", "ldu", modifiers=MEMORY_MODIFIERS)
def _load(each: Instruction) -> Execute:
    type_name, non_coherent = each.type(), each.has("nc")
    width, numpy_type = BITS[type_name] // 8, NUMPY[type_name]
    from_ = each.operands[1]
    writes = [destination(item, type_name) for item in _elements(each, each.operands[0])]
    addresses, of_symbol = address(from_)
    space = memory_space(each, of_symbol)
    base, offset = (from_.base, from_.offset) if isinstance(from_, Address) else (from_, 0)
    if space == "param" and isinstance(base, Symbol):
        variable = base.variable

        def execute_uniform(wave: Any, compute: Any, active: Any) -> None:
            """One value for all threads."""
            if offset < 0 or offset + width * len(writes) > variable.nbytes:
                wave.fail(f"out-of-bounds ld at parameter {variable.name}+{offset}")
            start = variable.offset + offset
            raw = wave.launch.parameters.bytes[start : start + width * len(writes)]
            for write, value in zip(writes, np.frombuffer(raw.tobytes(), numpy_type), strict=True):
                write(wave, compute, value)

        return execute_uniform

    def execute(wave: Any, compute: Any, active: Any) -> None:
        values = load(wave, space, addresses(wave, active), width, len(writes), active, non_coherent)
        for write, value in zip(writes, values, strict=True):
            write(wave, active, value.view(numpy_type))

    return execute


@instruction("st", modifiers=MEMORY_MODIFIERS)
def _store(each: Instruction) -> Execute:
    type_name = each.type()
    width, unsigned, raw = BITS[type_name] // 8, UNSIGNED[BITS[type_name]], f"b{BITS[type_name]}"
    items = _elements(each, each.operands[1])
    reads = [source(item, type_name if isinstance(item, Immediate) else raw) for item in items]
    addresses, of_symbol = address(each.operands[0])
    space = memory_space(each, of_symbol)

    def execute(wave: Any, compute: Any, active: Any) -> None:
        shape = wave.lanes(active).shape
        values = [np.broadcast_to(np.asarray(read(wave, active)).view(unsigned), shape) for read in reads]
        store(wave, space, addresses(wave, active), values, width, active)

    return execute


@instruction("cp", modifiers=f"async commit_group wait_group wait_all {MEMORY_MODIFIERS}")
def _copy_to_shared(each: Instruction) -> Execute:
    """cp.async, which is done at once: as early as the hardware may do it."""
    if each.modifiers[0] != "async":
        raise Unsupported("cp other than cp.async")
    if each.has("commit_group", "wait_group", "wait_all"):
        return lambda wave, compute, active: None
    to, _ = address(each.operands[0])
    from_, _ = address(each.operands[1])
    size = int(each.operands[2].value)
    read_size = _source_size(each, size)

    def execute(wave: Any, compute: Any, active: Any) -> None:
        lanes = wave.lanes(active)
        taken = np.broadcast_to(np.asarray(read_size(wave, active)), lanes.shape).astype(np.int64)
        to_address, from_address = to(wave, active), from_(wave, active)
        for count in np.unique(taken).tolist():
            if count % 4 or count > size:
                raise Unsupported(f"cp.async of {count} bytes")
            part = np.flatnonzero(taken == count)
            words = [np.zeros(part.size, np.uint32) for _ in range(size // 4)]  # the rest is filled with zero
            if count:
                loaded = load(wave, "global", from_address[part], 4, count // 4, lanes[part])
                words[: len(loaded)] = loaded
            store(wave, "shared", to_address[part], words, 4, lanes[part])

    return execute


def _source_size(each: Instruction, size: int) -> Any:
    """How many bytes to read, from the fourth operand where that is not a cache policy."""
    if len(each.operands) > 3:
        operand = each.operands[3]
        policy = isinstance(operand, Register) and BITS[operand.type] == 64
        if isinstance(operand, (Register, Immediate)) and not policy:
            return source(operand, "u32")
    return lambda wave, lanes: np.uint32(size)
