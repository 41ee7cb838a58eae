"""Loads and stores of a wave, with the checks that make a wrong one an error.

active are the lanes that take part, None for all of them. Addresses are uint64 arrays with one element for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .memory import WINDOW, WINDOW_OFFSET, WINDOW_SHIFT, Buffer, HostMemory
from .types import UNSIGNED, WARP
from .wave import SmallMemory, Wave

_SPACE_OF_WINDOW = {0: "global", **{base >> WINDOW_SHIFT: name for name, base in WINDOW.items()}}
_TOGETHER = 64  # threads whose addresses are looked up together
_ORIGIN = np.uint64(HostMemory.ORIGIN)

Lanes = Any  # an array of lanes, or None


def check_global(
    wave: Wave, address: np.ndarray, width: int, active: Lanes, kind: str, non_coherent: bool = False
) -> np.ndarray:
    """Check and count an access to global memory; returns offsets for HostMemory."""
    owner = _owner(wave, address, width, active, kind)
    for buffer, count in _counts(wave, owner, address.size):
        wave.stats.add_buffer_bytes(buffer.name, kind, width * count)
    if int(np.bitwise_or.reduce(address)) & (width - 1):
        misaligned = (address & np.uint64(width - 1)) != 0
        _fail_at(wave, misaligned, f"misaligned {kind} of {width} bytes", address, active)
    wave.stats.add_access("global", kind, width, address.size)
    launch = wave.launch
    if launch.options.coalescing and kind in ("ld", "st"):
        warp_and_sector = np.stack([(wave.lanes(active) // WARP).astype(np.uint64), address >> np.uint64(5)])
        wave.stats.sectors[kind] += np.unique(warp_and_sector, axis=1).shape[1] * max(1, width // 32)
    if launch.tracker is not None:
        kinds = {"ld": ["ld"], "st": ["st"], "atom": ["ld", "st"]}[kind] + (["nc"] if non_coherent else [])
        # Bring the addresses of each buffer together.
        by_owner = address if isinstance(owner, Buffer) else address[np.argsort(owner, kind="stable")]
        start = 0
        for buffer, count in _counts(wave, owner, address.size):
            launch.tracker.add(buffer, kinds, by_owner[start : start + count], width)
            start += count
    return (address - _ORIGIN).view(np.int64)


def _owner(wave: Wave, address: np.ndarray, width: int, active: Lanes, kind: str) -> Buffer | np.ndarray:
    """The buffer that an access falls into; if there are several, the position of that of each address."""
    device, last_byte = wave.device, np.uint64(width - 1)
    buffer = device.find(int(address.min()), int(address.max()) + width - 1)
    if buffer is not None:
        return buffer
    # Neighbouring threads mostly access one buffer: look up the ranges of some together, and each only if that fails.
    first = np.arange(0, address.size, _TOGETHER)
    low, high = np.minimum.reduceat(address, first), np.maximum.reduceat(address, first)
    position, inside = device.find_each(low, high + last_byte)
    if inside.all():
        return np.repeat(position, _TOGETHER)[: address.size]
    position, inside = device.find_each(address, address + last_byte)
    if not inside.all():
        _fail_at(wave, ~inside, f"out-of-bounds {kind} of {width} bytes", address, active)
    return position


def _counts(wave: Wave, owner: Buffer | np.ndarray, accesses: int) -> list[tuple[Buffer, int]]:
    """How many accesses fall into each buffer, in the order of their positions."""
    if isinstance(owner, Buffer):
        return [(owner, accesses)]
    counts = np.bincount(owner)
    return [(wave.device.sorted_buffer(i), int(counts[i])) for i in np.flatnonzero(counts).tolist()]


def _fail_at(wave: Wave, bad: np.ndarray, what: str, address: np.ndarray, active: Lanes) -> None:
    index = int(np.argmax(bad))
    at = int(address[index])
    wave.fail(f"{what} at {at:#x} ({wave.device.describe(at)})", wave.lanes(active)[index])


def small_memory(wave: Wave, space: str) -> SmallMemory:
    """The memory of a state space other than global."""
    if space == "shared":
        return wave.shared
    if space == "local":
        return wave.local
    return wave.launch.const if space == "const" else wave.launch.parameters


def check_small(wave: Wave, space: str, address: np.ndarray, width: int, active: Lanes, kind: str) -> np.ndarray:
    """Check and count an access to memory other than global; returns byte offsets into its array."""
    memory = small_memory(wave, space)
    # An address beyond any memory stays out of bounds as a signed number.
    offset = address.astype(np.int64)
    lanes = wave.lanes(active)
    outside = (offset < 0) | (offset > memory.nbytes - width)
    if outside.any():
        i = int(np.argmax(outside))
        at = f"{space} offset {int(offset[i])} of {memory.nbytes}"
        wave.fail(f"out-of-bounds {kind} of {width} bytes at {at}", lanes[i])
    if int(np.bitwise_or.reduce(offset)) & (width - 1):
        i = int(np.argmax((offset & (width - 1)) != 0))
        wave.fail(f"misaligned {kind} of {width} bytes at {space} offset {int(offset[i])}", lanes[i])
    if space in ("const", "param") and kind != "ld":
        wave.fail(f"{kind} to read-only {space} memory", lanes[0])
    wave.stats.add_access(space, kind, width, offset.size)
    if space == "local":
        return offset + lanes * memory.stride
    if space == "shared":
        index = offset + wave.block_of_lane[lanes] * memory.stride
        if wave.launch.options.racecheck and kind != "atom":
            _check_race(wave, index, width, lanes, kind)
        return index
    return offset


def _check_race(wave: Wave, index: np.ndarray, width: int, lanes: np.ndarray, kind: str) -> None:
    """Look for bytes that another warp of the block accessed since the last barrier, at least one of both writing."""
    nobody, several = -1, -2
    warp = (lanes // WARP).astype(np.int32)
    for byte in range(width):
        at = index + byte
        writer, reader = wave.last_writer[at], wave.last_reader[at]
        conflict = (writer != nobody) & (writer != warp)
        if kind == "st":
            conflict |= (reader != nobody) & (reader != warp)
            wave.last_writer[at] = warp
            conflict |= wave.last_writer[at] != warp  # two warps in this very instruction
        else:
            wave.last_reader[at] = np.where((reader != nobody) & (reader != warp), several, warp)
        if conflict.any():
            i = int(np.argmax(conflict))
            offset = int(index[i] % wave.shared.stride)
            message = (
                f"shared-memory race: {kind} at offset {offset} conflicts with another warp since the last barrier"
            )
            wave.fail(message, lanes[i])


def forget_accesses(wave: Wave, blocks: np.ndarray) -> None:
    """A barrier of some blocks: what they accessed before cannot race with what follows."""
    for shadow in (wave.last_writer, wave.last_reader):
        shadow.reshape(len(wave.blocks), -1)[blocks] = -1


def split_generic(wave: Wave, address: np.ndarray, active: Lanes) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The state spaces that generic addresses point to: (space, indices into address, addresses in the space)."""
    window = (address >> np.uint64(WINDOW_SHIFT)).astype(np.int64)
    for number in np.unique(window):
        part = np.flatnonzero(window == number)
        space = _SPACE_OF_WINDOW.get(int(number))
        if space is None:
            at = int(address[part[0]])
            wave.fail(f"address {at:#x} is in no state space (a wild pointer?)", wave.lanes(active)[part[0]])
        yield space, part, address[part] & WINDOW_OFFSET


def check(
    wave: Wave, space: str, address: np.ndarray, width: int, active: Lanes, kind: str, non_coherent: bool = False
) -> tuple[HostMemory | SmallMemory, np.ndarray]:
    """Check and count an access to a state space; returns its memory and offsets into that."""
    if space == "global":
        offset = check_global(wave, address, width, active, kind, non_coherent)
        return wave.device.memory, offset
    return small_memory(wave, space), check_small(wave, space, address, width, active, kind)


def load(
    wave: Wave, space: str, address: np.ndarray, width: int, count: int, active: Lanes, non_coherent: bool = False
) -> list[np.ndarray]:
    """Load count consecutive elements of width bytes in each lane, as unsigned arrays."""
    if space != "generic":
        memory, offset = check(wave, space, address, width * count, active, "ld", non_coherent)
        return memory.load(offset, width, count)
    lanes = wave.lanes(active)
    result = [np.zeros(address.size, UNSIGNED[width * 8]) for _ in range(count)]
    for where, part, inner in split_generic(wave, address, active):
        for whole, values in zip(result, load(wave, where, inner, width, count, lanes[part]), strict=True):
            whole[part] = values
    return result


def store(wave: Wave, space: str, address: np.ndarray, values: list[np.ndarray], width: int, active: Lanes) -> None:
    """Store consecutive elements of width bytes in each lane."""
    if space != "generic":
        memory, offset = check(wave, space, address, width * len(values), active, "st")
        memory.store(offset, width, values)
        return
    lanes = wave.lanes(active)
    for where, part, inner in split_generic(wave, address, active):
        store(wave, where, inner, [value[part] for value in values], width, lanes[part])
