"""Operations between the threads of a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import Unsupported
from ..numbers import minimum_or_maximum
from ..operands import destination, source
from ..syntax import Instruction, Kind, Vector
from ..types import FLOATS, NUMPY, WARP
from .atomics import combining
from .registry import Execute, instruction


def _waits_for_members(each: Instruction, mask_operand: Any) -> None:
    """Make the scheduler wait for the threads that the mask names."""
    each.kind, each.members = Kind.WARP, source(mask_operand, "u32")


def _named(each: Instruction, wave: Any, active: Any) -> np.ndarray:
    """The mask that the instruction names, in each lane."""
    lanes = wave.lanes(active)
    return np.broadcast_to(np.asarray(each.members(wave, active)), lanes.shape).astype(np.uint64)  # type: ignore[misc]


def warp_barrier(each: Instruction) -> Execute:
    """bar.warp.sync"""
    _waits_for_members(each, each.operands[0])
    return lambda wave, compute, active: None


@instruction("shfl", modifiers="sync up down bfly idx")
def _shuffle(each: Instruction) -> Execute:
    if not each.has("sync"):
        raise Unsupported("shfl without .sync")
    mode = each.first_of("up", "down", "bfly", "idx")
    first, value, offset, clamp_and_mask, members = each.operands
    to, predicate = first.items if isinstance(first, Vector) else (first, None)
    read, read_offset, read_clamp = source(value, "b32"), source(offset, "u32"), source(clamp_and_mask, "u32")
    write, write_predicate = destination(to, "b32"), destination(predicate, "pred")
    _waits_for_members(each, members)

    def execute(wave: Any, compute: Any, active: Any) -> None:
        lanes = wave.lanes(active)
        lane = lanes % WARP
        distance = np.asarray(read_offset(wave, active)).astype(np.int64) & 31
        packed = np.asarray(read_clamp(wave, active)).astype(np.int64)
        clamp, segment = packed & 31, (packed >> 8) & 31
        limit = (lane & segment) | (clamp & ~segment)
        wanted = {
            "up": lane - distance,
            "down": lane + distance,
            "bfly": lane ^ distance,
            "idx": (lane & segment) | (distance & ~segment),
        }[mode]
        in_range = wanted >= limit if mode == "up" else wanted <= limit
        from_lane = np.where(in_range, wanted, lane)
        from_ = lanes - lane + from_lane
        if active is not None:
            taking_part = wave.mask(active)[from_]
            if not taking_part.all():
                i = int(np.argmin(taking_part))
                wave.fail(f"shfl reads lane {int(from_lane[i])}, which does not take part", lanes[i])
        values = np.broadcast_to(np.asarray(read(wave, None)), (wave.size,))
        write(wave, active, values[from_])
        write_predicate(wave, active, np.broadcast_to(in_range, lanes.shape).copy())

    return execute


@instruction("vote", modifiers="sync all any uni ballot")
def _vote(each: Instruction) -> Execute:
    if not each.has("sync"):
        raise Unsupported("vote without .sync")
    how = each.first_of("all", "any", "uni", "ballot")
    read = source(each.operands[1], "pred")
    write = destination(each.operands[0], "b32" if how == "ballot" else "pred")
    _waits_for_members(each, each.operands[2])

    def execute(wave: Any, compute: Any, active: Any) -> None:
        warp = wave.lanes(active) // WARP
        true = np.zeros(wave.size, np.bool_)
        true[wave.lanes(active)] = read(wave, active)
        named = _named(each, wave, active) & wave.warp_bits(wave.mask(active))[warp]
        ballot = wave.warp_bits(true)[warp] & named
        none, everyone = ballot == 0, ballot == named
        write(
            wave,
            active,
            {"ballot": ballot.astype(np.uint32), "all": everyone, "any": ~none, "uni": none | everyone}[how],
        )

    return execute


@instruction("activemask")
def _active_mask(each: Instruction) -> Execute:
    write = destination(each.operands[0], "b32")

    def execute(wave: Any, compute: Any, active: Any) -> None:
        warp = wave.lanes(active) // WARP
        write(wave, active, wave.warp_bits(wave.mask(active))[warp].astype(np.uint32))

    return execute


@instruction("redux", modifiers="sync add min max and or xor NaN abs")
def _reduce(each: Instruction) -> Execute:
    how, type_name = each.first_of("add", "min", "max", "and", "or", "xor"), each.type()
    if each.has("abs") or (type_name in FLOATS and (type_name != "f32" or how not in ("min", "max"))):
        raise Unsupported("redux variant")
    read, write = source(each.operands[1], type_name), destination(each.operands[0], type_name)
    _waits_for_members(each, each.operands[2])
    combine = minimum_or_maximum(how, each.has("NaN")) if type_name == "f32" else combining(how, type_name)

    def execute(wave: Any, compute: Any, active: Any) -> None:
        lanes = wave.lanes(active)
        groups = list(zip((lanes // WARP).tolist(), _named(each, wave, active).tolist(), strict=True))
        values = np.broadcast_to(np.asarray(read(wave, active)), lanes.shape)
        total: dict[tuple[int, int], Any] = {}
        for group, value in zip(groups, values, strict=True):
            total[group] = combine(total[group], value) if group in total else value
        write(wave, active, np.array([total[group] for group in groups], NUMPY[type_name]))

    return execute


@instruction("elect", modifiers="sync")
def _elect(each: Instruction) -> Execute:
    first = each.operands[0]
    to, predicate = first.items if isinstance(first, Vector) else (None, first)
    write, write_predicate = destination(to, "b32"), destination(predicate, "pred")
    _waits_for_members(each, each.operands[1])

    def execute(wave: Any, compute: Any, active: Any) -> None:
        named = _named(each, wave, active).astype(np.int64)
        leader = np.round(np.log2(named & -named)).astype(np.int64)  # the lowest lane that is named
        write(wave, active, leader.astype(np.uint32))
        write_predicate(wave, active, wave.lanes(active) % WARP == leader)

    return execute
