"""Branches, calls, barriers, and what has no effect here."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..operands import destination, source
from ..syntax import Immediate, Instruction, Kind
from .registry import Execute, instruction
from .warp import warp_barrier


def _nothing(wave: Any, compute: Any, active: Any) -> None:
    pass


@instruction("bra", modifiers="uni")
def _branch(each: Instruction) -> Execute:
    each.kind = Kind.BRANCH
    return _nothing


@instruction("brx", modifiers="idx uni")
def _branch_by_table(each: Instruction) -> Execute:
    each.kind = Kind.TABLE_BRANCH
    each.selector = source(each.operands[0], "u32")
    return _nothing


@instruction("ret", "exit", modifiers="uni")
def _exit(each: Instruction) -> Execute:
    each.kind = Kind.EXIT
    return _nothing


@instruction("trap", "brkpt")
def _trap(each: Instruction) -> Execute:
    return lambda wave, compute, active: wave.fail("trap", wave.lanes(active)[0])


@instruction("call", modifiers="uni")
def _call(each: Instruction) -> Execute:
    """A call of a function without a body; others are inlined by the parser."""
    name = each.operands[0].name
    if name == "__assertfail":
        return lambda wave, compute, active: wave.fail("device assertion failed", wave.lanes(active)[0])
    if name == "vprintf":
        return _nothing
    raise Unsupported("call of a function without a body")


@instruction(
    *("membar", "fence", "prefetch", "prefetchu", "nanosleep", "griddepcontrol", "applypriority", "discard"),
    *("pmevent", "setmaxnreg"),
    modifiers=None,
)
def _no_effect(each: Instruction) -> Execute:
    return _nothing


@instruction("createpolicy", modifiers=None)
def _create_policy(each: Instruction) -> Execute:
    write = destination(each.operands[0], "b64")
    return lambda wave, compute, active: write(wave, compute, np.uint64(0))


@instruction("bar", "barrier", modifiers="sync red aligned cta and or popc warp")
def _barrier(each: Instruction) -> Execute:
    """bar.sync and bar.red. They run when all threads of a block have arrived, with all lanes of such blocks."""
    if each.has("warp"):
        return warp_barrier(each)
    reduces = each.has("red")
    operands = each.operands[1:] if reduces else each.operands
    counted = operands[1:-1] if reduces else operands[1:]
    if not isinstance(operands[0], Immediate) and not each.has("sync"):
        raise Unsupported("barrier number in a register")
    if counted and not isinstance(counted[0], Immediate):
        raise Unsupported("barrier with a computed thread count")
    threads = int(counted[0].value) if counted else None
    each.kind = Kind.BARRIER

    def check(wave: Any) -> None:
        if threads is not None and threads != wave.launch.threads_per_block:
            raise Unsupported(f"barrier for {threads} of {wave.launch.threads_per_block} threads")

    if not reduces:
        return lambda wave, compute, active: check(wave)
    how = each.first_of("and", "or", "popc")
    read, write = source(operands[-1], "pred"), destination(each.operands[0], each.type())

    def reduce(wave: Any, compute: Any, active: Any) -> None:
        check(wave)
        predicate = np.broadcast_to(np.asarray(read(wave, active)), active.shape)
        block = wave.block_of_lane[active]
        true = np.bincount(block, weights=predicate, minlength=len(wave.blocks))
        everyone = np.bincount(block, minlength=len(wave.blocks))
        result = {"and": true == everyone, "or": true > 0, "popc": true.astype(np.uint32)}[how]
        write(wave, active, result[block])

    return reduce
