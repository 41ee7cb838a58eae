"""One launch of a kernel: its limits, its arguments, and the blocks of its grid in waves."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import PTXError
from .instructions import compile_kernel
from .memory import Buffer, Device
from .scheduler import Scheduler
from .stats import Stats
from .syntax import Kernel, Variable
from .tracking import Tracker
from .types import WARP
from .wave import SmallMemory, Wave

Dimensions = tuple[int, int, int]


@dataclass(frozen=True)
class Options:
    """How to run a launch; `Module.launch` explains them."""

    max_lanes: int = 1 << 14
    track: bool = False
    racecheck: bool = False
    coalescing: bool = False
    approx_ulp: int = 0
    seed: int | None = None
    strict: bool = True
    max_steps: int = 50_000_000


def dimensions(size: int | Sequence[int]) -> Dimensions:
    """The three extents of a grid or a block."""
    given = tuple(size) if isinstance(size, (tuple, list)) else (size,)
    x, y, z = (*(int(extent) for extent in given), 1, 1, 1)[:3]  # type: ignore[call-overload]
    return x, y, z


def check_limits(kernel: Kernel, grid: Dimensions, block: Dimensions, dynamic_shared_bytes: int) -> None:
    """Raise PTXError where a GPU would refuse the launch."""
    threads = math.prod(block)
    if not 1 <= threads <= 1024 or min(block) < 1 or block[2] > 64:
        raise PTXError(f"{kernel.name}: block {block} is outside the launch limits")
    if min(grid) < 1 or grid[0] > 2**31 - 1 or max(grid[1:]) > 65535:
        raise PTXError(f"{kernel.name}: grid {grid} is outside the launch limits")
    if kernel.required_block and block != kernel.required_block:
        raise PTXError(f"{kernel.name}: needs block {kernel.required_block} (.reqntid), got {block}")
    if kernel.maximum_block and threads > math.prod(kernel.maximum_block):
        raise PTXError(f"{kernel.name}: block {block} exceeds .maxntid {kernel.maximum_block}")
    if kernel.parameter_bytes > 32764:
        raise PTXError(f"{kernel.name}: {kernel.parameter_bytes} parameter bytes")
    if kernel.shared_bytes > 48 << 10 or kernel.shared_bytes + dynamic_shared_bytes > 227 << 10:
        raise PTXError(f"{kernel.name}: {kernel.shared_bytes}+{dynamic_shared_bytes} bytes of shared memory")


def pack_arguments(kernel: Kernel, arguments: Sequence[Any], device: Device, fill: bool) -> np.ndarray:
    """The parameter memory of a launch. fill gives the last parameters zero where there are fewer arguments."""
    given = list(arguments)
    if fill:
        given += [0] * (len(kernel.parameters) - len(given))
    if len(given) != len(kernel.parameters):
        raise PTXError(f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(given)}")
    packed = np.zeros(kernel.parameter_bytes, np.uint8)
    for parameter, argument in zip(kernel.parameters, given, strict=True):
        raw = _argument_bytes(kernel, parameter, argument, device)
        if len(raw) != parameter.nbytes:
            sizes = f"{parameter.nbytes} bytes, the argument has {len(raw)}"
            raise PTXError(f"{kernel.name}: {parameter.name} is {sizes}")
        packed[parameter.offset : parameter.offset + parameter.nbytes] = np.frombuffer(raw, np.uint8)
    return packed


def _argument_bytes(kernel: Kernel, parameter: Variable, argument: Any, device: Device) -> bytes:
    if isinstance(argument, Buffer):
        if argument.device is not device:
            raise PTXError(f"{argument} belongs to another Device")
        argument = argument.ptr
    if isinstance(argument, (np.generic, np.ndarray)):
        return argument.tobytes()
    if isinstance(argument, (bytes, bytearray, memoryview, ctypes.Structure, ctypes.Array)):
        return bytes(argument)
    bits = 8 * parameter.nbytes
    if parameter.type in ("f32", "f64") or isinstance(argument, float):
        return np.array([argument], np.float64 if bits == 64 else np.float32).tobytes()
    value = int(argument)
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise PTXError(f"{kernel.name}: {value} does not fit the {bits} bits of {parameter.name}")
    return (value & ((1 << bits) - 1)).to_bytes(parameter.nbytes, "little")


class Launch:
    """A kernel with its grid and arguments."""

    def __init__(
        self,
        kernel: Kernel,
        device: Device,
        grid: Dimensions,
        block: Dimensions,
        parameters: np.ndarray,
        const: np.ndarray,
        dynamic_shared_bytes: int,
        options: Options,
    ) -> None:
        self.kernel, self.device, self.grid, self.block, self.options = kernel, device, grid, block, options
        self.parameters = SmallMemory(parameters.size, contents=parameters)
        self.const = SmallMemory(const.size, contents=const)
        self.dynamic_shared_bytes = dynamic_shared_bytes
        self.shared_bytes = kernel.shared_bytes + dynamic_shared_bytes
        self.threads_per_block = math.prod(block)
        self.lanes_per_block = -(-self.threads_per_block // WARP) * WARP
        self.rng = np.random.default_rng(options.seed)
        self.shuffle = options.seed is not None
        self.tracker = Tracker() if options.track else None
        self.stats = Stats(kernel, grid, block)
        compile_kernel(kernel)

    def run(self) -> Stats:
        """Run all blocks."""
        blocks = math.prod(self.grid)
        order = self.rng.permutation(blocks) if self.shuffle else np.arange(blocks)
        blocks_per_wave = max(1, self.options.max_lanes // self.lanes_per_block)
        try:
            # Overflow, NaN and the like are results here, not mistakes.
            with np.errstate(all="ignore"):
                for first in range(0, blocks, blocks_per_wave):
                    Scheduler(Wave(self, order[first : first + blocks_per_wave])).run()
        finally:
            if self.tracker is not None:
                self.tracker.finish()
        if self.tracker is not None:
            self.tracker.check_non_coherent(self.kernel.name)
        return self.stats
