"""The state of the blocks that run together: registers, shared and local memory, which threads are alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from .errors import PTXError
from .special import coordinate
from .types import UNSIGNED, WARP, register_bits

if TYPE_CHECKING:
    from .launch import Launch
    from .syntax import Instruction

_NAN_BITS = 0x7FF7A5A5  # what registers hold at first: a NaN as f32, and as f64 when repeated
_MEMORY_POISON = 0xA5


class SmallMemory:
    """Shared, local, const or param memory: one copy for each block or thread, or a single one."""

    def __init__(self, nbytes: int, copies: int = 1, contents: np.ndarray | None = None) -> None:
        self.nbytes = nbytes
        self.stride = -(-max(nbytes, 1) // 8) * 8  # so that aligned elements of 8 bytes never straddle two copies
        self.bytes = np.full(self.stride * copies, _MEMORY_POISON, np.uint8)
        if contents is not None:
            self.bytes[:nbytes] = contents
        self._by_width = {bits // 8: self.bytes.view(unsigned) for bits, unsigned in UNSIGNED.items()}

    def load(self, offset: np.ndarray, width: int, count: int) -> list[np.ndarray]:
        """count consecutive elements of width bytes at each offset."""
        elements, first = self._by_width[width], offset >> (width.bit_length() - 1)
        return [elements[first + i] for i in range(count)]

    def store(self, offset: np.ndarray, width: int, values: Sequence[np.ndarray]) -> None:
        """Put consecutive elements of width bytes at each offset."""
        elements, first = self._by_width[width], offset >> (width.bit_length() - 1)
        for i, value in enumerate(values):
            elements[first + i] = value


class Wave:
    """Some blocks of a launch, one thread in each lane.

    Blocks are padded with lanes that are never alive to a whole number of warps. A register is an array with one
    unsigned integer (a bool for predicates) for each lane.
    """

    def __init__(self, launch: Launch, blocks: np.ndarray) -> None:
        self.launch, self.blocks = launch, blocks
        self.kernel, self.device, self.stats = launch.kernel, launch.device, launch.stats
        self.size = len(blocks) * launch.lanes_per_block
        self.lane = np.arange(self.size, dtype=np.int64)
        self.thread = self.lane % launch.lanes_per_block  # in its block
        self.block_of_lane = self.lane // launch.lanes_per_block  # an index into blocks
        self.live = self.thread < launch.threads_per_block
        self.registers: list[np.ndarray | None] = [None] * len(self.kernel.register_types)
        self.carry: np.ndarray | None = None  # the carry flag of integer addition, where a kernel uses it
        self.shared = SmallMemory(launch.shared_bytes, len(blocks))
        self.local = SmallMemory(self.kernel.local_bytes, self.size if self.kernel.local_bytes else 1)
        # The warp that last wrote or read each byte of shared memory since the barrier, for racecheck.
        self.last_writer = self.last_reader = np.zeros(0, np.int32)
        if launch.options.racecheck:
            self.last_writer, self.last_reader = (np.full(self.shared.bytes.size, -1, np.int32) for _ in range(2))
        self.current: Instruction = self.kernel.instructions[0]

    def register(self, slot: int) -> np.ndarray:
        """The values of a register in all lanes."""
        values = self.registers[slot]
        if values is None:
            values = self.registers[slot] = self._uninitialized(self.kernel.register_types[slot])
        return values

    def _uninitialized(self, type_name: str) -> np.ndarray:
        if type_name == "pred":
            return np.zeros(self.size, np.bool_)
        width = register_bits(type_name)
        garbage = ((_NAN_BITS << 32) | _NAN_BITS) & ((1 << width) - 1)
        return np.full(self.size, garbage, UNSIGNED[width])

    def lanes(self, active: np.ndarray | None) -> np.ndarray:
        """The lanes that are active, where None stands for all."""
        return self.lane if active is None else active

    def mask(self, active: np.ndarray | None) -> np.ndarray:
        """The lanes that are active, as one bool for each lane."""
        mask = np.zeros(self.size, np.bool_)
        mask[self.lanes(active)] = True
        return mask

    def warp_bits(self, mask: np.ndarray) -> np.ndarray:
        """For each warp, the bits of its lanes that are set in a mask."""
        bits = mask.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
        return bits.sum(axis=1, dtype=np.uint64)

    def threads_per_block(self, mask: np.ndarray) -> np.ndarray:
        """How many lanes of each block are set in a mask."""
        return np.bincount(self.block_of_lane[mask], minlength=len(self.blocks))

    def fail(self, message: str, lane: int | np.integer | None = None) -> NoReturn:
        """Raise PTXError for the current instruction, with the thread it happened in."""
        where = ""
        if lane is not None:
            grid, block = self.launch.grid, self.launch.block
            block_index, thread = int(self.blocks[self.block_of_lane[lane]]), int(self.thread[lane])
            block_at = ",".join(str(coordinate(block_index, grid, axis)) for axis in range(3))
            thread_at = ",".join(str(coordinate(thread, block, axis)) for axis in range(3))
            where = f" [block ({block_at}) thread ({thread_at})]"
        line, text = self.current.line, self.current.text
        raise PTXError(f"{self.kernel.name}: {message}{where}\n  PTX line {line}: {text}")
