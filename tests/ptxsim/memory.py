"""Global memory: the address space of this process, of which a kernel may touch the buffers of a Device alone.

A pointer in a simulated kernel is a real address. Host code that collects `tensor.data_ptr()` values into a table
can therefore be run unchanged, with the tensors made accessible by `Device.map`.
"""

import bisect
import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .types import UNSIGNED

# The bits from here up tell the state spaces apart in a generic address. No address of a process reaches them
# (x86-64 has 47 bits, arm64 has 48), so that whatever lies below is global memory.
WINDOW_SHIFT = 56
WINDOW = {
    "shared": 1 << WINDOW_SHIFT,
    "local": 2 << WINDOW_SHIFT,
    "param": 3 << WINDOW_SHIFT,
    "const": 4 << WINDOW_SHIFT,
}
WINDOW_OFFSET = np.uint64((1 << WINDOW_SHIFT) - 1)
GLOBAL_LIMIT = 1 << 48

ALIGNMENT = 256  # of the buffers that a Device allocates, as the CUDA allocators give
GUARD = 4096  # bytes on both sides of such a buffer that no other buffer can take


class HostMemory:
    """The address space of this process as one array for each width of access. Nothing here checks an address.

    The arrays have no name outside of these methods: to print one would read where nothing is mapped.
    """

    # numpy takes a null pointer for "allocate this", so the arrays start at the first page that can hold data.
    ORIGIN = 4096

    def __init__(self) -> None:
        whole: Any = (ctypes.c_uint8 * (GLOBAL_LIMIT - self.ORIGIN)).from_address(self.ORIGIN)
        self._bytes = np.frombuffer(whole, np.uint8)
        self._by_width = {bits // 8: self._bytes.view(unsigned) for bits, unsigned in UNSIGNED.items()}

    def view(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes at an address as a live array."""
        if nbytes == 0:
            return np.zeros(0, np.uint8)
        return self._bytes[address - self.ORIGIN : address - self.ORIGIN + nbytes]

    def load(self, offset: np.ndarray, width: int, count: int) -> list[np.ndarray]:
        """count consecutive elements of width bytes at each offset from ORIGIN."""
        first = offset >> (width.bit_length() - 1)
        return [self._by_width[width][first + i if i else first] for i in range(count)]

    def store(self, offset: np.ndarray, width: int, values: Sequence[np.ndarray]) -> None:
        """Put consecutive elements of width bytes at each offset from ORIGIN."""
        first = offset >> (width.bit_length() - 1)
        for i, value in enumerate(values):
            self._by_width[width][first + i] = value


class Buffer:
    """A region of memory that kernels may access: `ptr` is its address, `array` a live view of it."""

    def __init__(self, device: "Device", name: str, ptr: int, nbytes: int, array: np.ndarray) -> None:
        self.device, self.name, self.ptr, self.nbytes, self.array = device, name, ptr, nbytes, array
        self._counts: dict[str, np.ndarray] = {}

    @property
    def end(self) -> int:
        """The first address behind the buffer."""
        return self.ptr + self.nbytes

    @property
    def reads(self) -> np.ndarray:
        """How often each byte was read by tracked launches."""
        return self._counts.get("ld", np.zeros(self.nbytes, np.int64))

    @property
    def writes(self) -> np.ndarray:
        """How often each byte was written by tracked launches."""
        return self._counts.get("st", np.zeros(self.nbytes, np.int64))

    def count(self, kind: str, accesses: np.ndarray) -> None:
        """Add the accesses of a launch ("ld" or "st"), one number for each byte."""
        self._counts[kind] = self._counts.get(kind, 0) + accesses

    def __repr__(self) -> str:
        return f"<Buffer {self.name} {self.ptr:#x} {self.nbytes} bytes>"


class Device:
    """The buffers that a kernel may access."""

    def __init__(self) -> None:
        self.memory = HostMemory()
        self._buffers: dict[int, Buffer] = {}  # by id, in the order of their creation
        # The buffers that have bytes, by address.
        self._sorted: list[Buffer] = []
        self._starts: list[int] = []
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None  # first and last bytes; made when asked for

    @property
    def buffers(self) -> list[Buffer]:
        """All buffers, in the order of their creation."""
        return list(self._buffers.values())

    def buffer(self, data: Any, name: str | None = None, offset: int = 0) -> Buffer:
        """Copy an array into a new buffer, offset bytes behind a multiple of 256.

        `Buffer.array` has the shape and the type of the data, or is the bytes where the offset does not align them.
        """
        data = np.ascontiguousarray(data)
        owned = np.empty(GUARD + ALIGNMENT + offset + data.nbytes + GUARD, np.uint8)
        skip = GUARD + -(owned.ctypes.data + GUARD) % ALIGNMENT + offset
        array = owned[skip : skip + data.nbytes]
        array[:] = data.reshape(-1).view(np.uint8)
        if offset % data.dtype.itemsize == 0:
            array = array.view(data.dtype).reshape(data.shape)
        return self._add(name, owned.ctypes.data + skip, data.nbytes, array)

    def zeros(self, shape: Any, dtype: Any, name: str | None = None, offset: int = 0) -> Buffer:
        """A new buffer of zeros."""
        return self.buffer(np.zeros(shape, dtype), name, offset)

    def map(self, address: int, nbytes: int, name: str) -> Buffer:
        """Make memory of this process accessible at its own address, without a copy.

        The caller keeps the memory alive until `unmap`, or for as long as kernels run. There are no guard zones:
        what lies beside it may be another buffer. With nbytes 0 nothing is accessible, whatever the address.
        """
        if nbytes < 0 or (nbytes and not HostMemory.ORIGIN <= address <= GLOBAL_LIMIT - nbytes):
            raise ValueError(f"{name}: {nbytes} bytes at {address:#x} are not in the address space of a process")
        return self._add(name, address, nbytes, self.memory.view(address, nbytes))

    def unmap(self, buffer: Buffer) -> None:
        """Make a buffer inaccessible. Its `array` goes on to work for as long as its memory lives."""
        if self._buffers.pop(id(buffer), None) is None:
            raise ValueError(f"{buffer} is not on this device")
        if buffer.nbytes:
            index = bisect.bisect_left(self._starts, buffer.ptr)
            del self._starts[index], self._sorted[index]
            self._arrays = None

    def _add(self, name: str | None, address: int, nbytes: int, array: np.ndarray) -> Buffer:
        buffer = Buffer(self, name or f"buffer{len(self._buffers)}", address, nbytes, array)
        if nbytes:
            index = bisect.bisect_left(self._starts, address)
            for other in self._sorted[max(index - 1, 0) : index + 1]:
                if other.ptr < buffer.end and buffer.ptr < other.end:
                    raise ValueError(f"{buffer} overlaps {other}")
            self._starts.insert(index, address)
            self._sorted.insert(index, buffer)
            self._arrays = None
        self._buffers[id(buffer)] = buffer
        return buffer

    def find(self, first: int, last: int) -> Buffer | None:
        """The buffer that holds all addresses from first to last, or None."""
        index = bisect.bisect_right(self._starts, first) - 1
        return self._sorted[index] if index >= 0 and last < self._sorted[index].end else None

    def find_each(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each range of addresses, the position of a buffer (see `sorted_buffer`) and whether it holds it."""
        if not self._sorted:
            return np.zeros(first.shape, np.intp), np.zeros(first.shape, np.bool_)
        if self._arrays is None:
            last_bytes = np.array([buffer.end - 1 for buffer in self._sorted], np.uint64)
            self._arrays = np.array(self._starts, np.uint64), last_bytes
        starts, last_bytes = self._arrays
        position = np.maximum(np.searchsorted(starts, first, side="right") - 1, 0)
        return position, (first >= starts[position]) & (last <= last_bytes[position]) & (first <= last)

    def sorted_buffer(self, position: int) -> Buffer:
        """The buffer at a position that `find_each` gave."""
        return self._sorted[position]

    def describe(self, address: int) -> str:
        """Where an address lies, for error messages."""
        if address >= GLOBAL_LIMIT:
            space = next(
                (name for name, base in WINDOW.items() if base >> WINDOW_SHIFT == address >> WINDOW_SHIFT), None
            )
            return f"a generic address of {space} memory" if space else "outside of every state space"
        if not self._buffers:
            return "no buffers exist"
        near = min(self._buffers.values(), key=lambda b: max(b.ptr - address, address - b.end))
        where = f"nearest buffer {near.name}: offset {address - near.ptr} of {near.nbytes} bytes"
        return f"a null pointer? {where}" if address < HostMemory.ORIGIN else where
