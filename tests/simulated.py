"""What the simulated backends share: which memory a launch may touch, and its record.

A launch is given to ptxsim with the memory that its table and arguments point to, and nothing else. Tensors are CPU
tensors: to the simulator their memory is the device's.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
from ptxsim import Buffer, Device, Module, Stats

from maxva_kernels import gpu
from maxva_kernels.backends import registry
from maxva_kernels.launch import PACKED_GROUP, NormLaunch, StepLaunch, TotalLaunch
from maxva_kernels.statistics import FIELDS
from maxva_kernels.tensor_table import NORM_COLUMNS, STEP_COLUMNS

SIZES = {0: 4, 1: 8, 2: 2, 3: 2}  # bytes of a dtype, by its code (csrc/dtype.h)
SUMS = 3  # numbers that stand for the sum of a chunk's squares
RECORD = 4 * len(FIELDS)  # bytes of a chunk's statistics

Range = tuple[str, int, int]  # name, address, bytes; an address 0 is none


def words(address: int, count: int, dtype: type = np.int64) -> np.ndarray:
    """Memory of this process as an array."""
    if count == 0:
        return np.zeros(0, dtype)
    return np.frombuffer((ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address), dtype)


def step_ranges(launch: StepLaunch) -> list[Range]:
    """The memory of a step's launch; of a tensor without gradient nothing."""
    wide, tensors = SIZES[1] if launch.param_dtype == 1 else SIZES[0], len(launch.grads) // 8
    table = words(launch.rows, tensors * len(STEP_COLUMNS)).reshape(tensors, len(STEP_COLUMNS))
    ranges = [("rows", launch.rows, table.nbytes), ("chunk_rows", launch.chunk_rows, 4 * launch.chunks)]
    ranges += [("ticket", launch.ticket, 4)]
    ranges += [(name, getattr(launch, name), wide) for name in ("grad_scale", "found_inf", "grad_norm")]
    ranges += [("trust_ratios", launch.trust_ratios, tensors * wide), ("norms", launch.norms, 2 * tensors * wide)]
    ranges += [("statistics", launch.statistics, launch.chunks * RECORD)]
    ranges += [("saturation", launch.saturation, launch.chunks * 4)]
    ranges += [("squares", launch.squares, launch.chunks * 2 * SUMS * wide)]
    for i, (values, address) in enumerate(zip(table.tolist(), _addresses(launch.grads), strict=True)):
        if address == 0:
            continue
        row = dict(zip(STEP_COLUMNS, values, strict=True))
        ranges.append((f"grad{i}", address, row["numel"] * SIZES[launch.grad_dtype]))
        ranges.append((f"step{i}", row["step"], 8))
        ranges.append((f"param{i}", row["param"], row["numel"] * SIZES[launch.param_dtype]))
        for name in ("exp_avg", "grad_mean", "grad_var", "weight_sum", "max_denom"):
            ranges.append((f"{name}{i}", row[name], row["numel"] * SIZES[launch.state_dtype]))
        ranges.append((f"master{i}", row["master"], row["numel"] * 2))
    rates = [address for _, address, *_ in PACKED_GROUP.iter_unpack(launch.groups)]
    return ranges + [(f"lr{g}", address, wide) for g, address in enumerate(rates)]


def norm_ranges(launch: NormLaunch, chunk: int) -> list[Range]:
    """The memory of a launch that sums the squares of chunks of that many elements."""
    wide, tensors = SIZES[1] if launch.double else SIZES[0], len(launch.grads) // 8
    table = words(launch.rows, tensors * len(NORM_COLUMNS)).reshape(tensors, len(NORM_COLUMNS))
    ranges = [("rows", launch.rows, table.nbytes), ("chunk_rows", launch.chunk_rows, 4 * launch.chunks)]
    for i, (values, address) in enumerate(zip(table.tolist(), _addresses(launch.grads), strict=True)):
        row = dict(zip(NORM_COLUMNS, values, strict=True))
        ranges.append((f"grad{i}", address, row["numel"] * SIZES[launch.grad_dtype]))
        count = -(-row["numel"] // chunk)
        ranges.append((f"sums{i}", launch.sums + row["first_sum"] * SUMS * wide, count * SUMS * wide))
    return ranges


def total_ranges(launch: TotalLaunch) -> list[Range]:
    """The memory of the launch that adds up the chunks."""
    wide = SIZES[1] if launch.double else SIZES[0]
    return [("sums", launch.sums, launch.chunks * SUMS * wide), ("norm", launch.norm, wide)]


def _addresses(packed: bytes) -> list[int]:
    return np.frombuffer(packed, np.uint64).tolist()


def _mapped(ranges: Iterable[Range]) -> tuple[Device, dict[str, Buffer]]:
    """A device that may touch these, and its buffers by name. Names may share a range, as groups a learning rate."""
    device, buffers, seen = Device(), {}, {}
    for name, address, nbytes in ranges:
        if address and nbytes:
            if (address, nbytes) not in seen:
                seen[address, nbytes] = device.map(address, nbytes, name)
            buffers[name] = seen[address, nbytes]
    return device, buffers


@dataclass
class Launch:
    """A launch that has been made."""

    kernel: str
    stats: Stats
    buffers: dict[str, Buffer]

    def buffers_of(self, name: str) -> list[Buffer]:
        """The buffers "name0", "name1", ..."""
        return [buffer for key, buffer in self.buffers.items() if re.fullmatch(rf"{name}\d+", key)]

    def bytes_of(self, kind: str, name: str) -> int:
        """Bytes moved by "ld", "st" or "atom" to or from the buffers "name", "name0", "name1", ..."""
        moved = self.stats.buffer_bytes.items()
        return sum(count for (key, what), count in moved if what == kind and re.fullmatch(rf"{name}\d*", key))


class Simulation:
    """What a simulated launcher has besides the launcher's functions.

    Args:
        blocks: how many blocks a launch has at most.
        track: count the accesses of each byte (`Buffer.reads`, `Buffer.writes`).
        seed: shuffles the order of the blocks.
        approx_ulp: approximate instructions are off by up to so many units in the last place.
    """

    backend: str  # the name of the backend that it stands in for

    def __init__(self, *, blocks: int = 3, track: bool = False, seed: int | None = None, approx_ulp: int = 0):
        self.blocks, self.track, self.seed, self.approx_ulp = blocks, track, seed, approx_ulp
        self.max_lanes = 1 << 15  # threads that run side by side; with those of one block, blocks run one by one
        self.max_steps = 50_000_000  # of what runs side by side, to end an endless loop
        self.launches: list[Launch] = []
        self.only: dict[str, tuple[int, int]] = {}  # by a buffer's name: the address and size of what there is of it

    def simulate(
        self, name: str, module: Module, entry: str, chunks: int, threads: int, arguments: list,
        ranges: Iterable[Range], **options: object,
    ) -> None:  # fmt: skip
        """Runs a launch that may touch these ranges of memory."""
        device, buffers = _mapped((name, *self.only.get(name, (address, size))) for name, address, size in ranges)
        blocks = max(1, min(chunks, self.blocks))
        given = {"track": self.track, "seed": self.seed, "max_lanes": self.max_lanes, "max_steps": self.max_steps}
        given |= {"approx_ulp": self.approx_ulp}
        stats = module.launch(entry, blocks, threads, arguments, device, **given, **options)
        self.launches.append(Launch(name, stats, buffers))


def install_launcher(backend: object, launcher: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a GPU's backend drive CPU tensors through this launcher."""
    monkeypatch.setattr(backend, "why_not", lambda device: None)
    monkeypatch.setattr(backend, "_launcher", lambda: launcher)
    monkeypatch.setattr(gpu, "current_stream", lambda device: 0)
    monkeypatch.setattr(gpu, "record_event", lambda device: None)
    monkeypatch.setattr(gpu, "is_capturing", lambda: False)
    monkeypatch.setattr(registry, "_selected", {})
    monkeypatch.setattr(gpu, "step_tables", type(gpu.step_tables)())
    monkeypatch.setattr(gpu, "norm_tables", type(gpu.norm_tables)())
