"""A PTX module: its kernels, and how to launch them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from .launch import Launch, Options, check_limits, dimensions, pack_arguments
from .memory import Buffer, Device
from .parser import parse_kernel
from .source import find_entry, parse_source
from .stats import Stats
from .syntax import Kernel


class Module:
    """The text of a PTX module. An entry is parsed and compiled when it is first launched, and kept."""

    def __init__(self, text: str) -> None:
        self._source = parse_source(text)
        self.version, self.target = self._source.version, self._source.target
        self._kernels: dict[str, Kernel] = {}
        # The memory of the module's own .global variables, on each device.
        self._globals: weakref.WeakKeyDictionary[Device, dict[str, Buffer]] = weakref.WeakKeyDictionary()

    def entries(self) -> list[str]:
        """The (mangled) names of all entries."""
        return list(self._source.entries)

    def entry(self, name: str | None = None) -> str:
        """The full name of an entry, from it or from a part that no other entry has; None for the only one."""
        return find_entry(self._source.entries, name)

    def kernel(self, name: str | None = None) -> Kernel:
        """An entry, parsed. Names are as for `entry`."""
        full = self.entry(name)
        if full not in self._kernels:
            self._kernels[full] = parse_kernel(self._source, full)
        return self._kernels[full]

    def launch(
        self,
        name: str | None = None,
        grid: int | Sequence[int] = 1,
        block: int | Sequence[int] = 1,
        args: Sequence[Any] = (),
        device: Device | None = None,
        shared_bytes: int = 0,
        *,
        pad_args: bool = False,
        max_lanes: int = 1 << 14,
        track: bool = False,
        racecheck: bool = False,
        coalescing: bool = False,
        approx_ulp: int = 0,
        seed: int | None = None,
        strict: bool = True,
        max_steps: int = 50_000_000,
    ) -> Stats:
        """Run a kernel to its end.

        name            an entry, as for `entry`
        args            for each parameter a Buffer or an int (pointers), an int or float, a numpy scalar, the bytes
                        of a struct (bytes, ctypes.Structure, numpy.void), or an array that is copied in and back
        shared_bytes    of dynamic shared memory
        pad_args        fill missing last parameters with zero (the scratch pointers of Triton)
        max_lanes       threads that run together, at least a block (by default as many as the caches can hold)
        track           count reads and writes of each byte in Buffer.reads and Buffer.writes, and check ld.global.nc
        racecheck       look for hazards between warps in shared memory
        coalescing      count 32-byte sectors in Stats.sectors
        approx_ulp      perturb the results of approximate instructions by up to so many units in the last place
        seed            shuffle the order of blocks and of atomics
        strict          refuse warp operations whose mask names threads that have exited
        max_steps       give up after so many steps of a wave
        """
        kernel = self.kernel(name)
        grid, block = dimensions(grid), dimensions(block)
        check_limits(kernel, grid, block, shared_bytes)
        device = device or Device()
        self._place_globals(device)
        options = Options(max_lanes, track, racecheck, coalescing, approx_ulp, seed, strict, max_steps)
        arguments = list(args)
        copied = []
        for i, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray) and argument.ndim:
                arguments[i] = device.buffer(argument, f"argument {i}")
                copied.append((argument, arguments[i]))
        try:
            parameters = pack_arguments(kernel, arguments, device, pad_args)
            launch = Launch(kernel, device, grid, block, parameters, self._const(), shared_bytes, options)
            stats = launch.run()
        finally:
            for _, buffer in copied:
                device.unmap(buffer)
        for argument, buffer in copied:
            argument[...] = buffer.array
        return stats

    def symbol(self, name: str, device: Device) -> Buffer:
        """The memory of a module-scope .global variable."""
        self._place_globals(device)
        return self._globals[device][name]

    def _place_globals(self, device: Device) -> None:
        """Give the .global variables of the module their memory on a device, and their addresses there."""
        placed = self._globals.setdefault(device, {})
        for variable in self._source.variables.values():
            if variable.space == "global":
                if variable.name not in placed:
                    contents = variable.initial or bytes(variable.nbytes)
                    placed[variable.name] = device.buffer(np.frombuffer(contents, np.uint8), variable.name)
                variable.offset = placed[variable.name].ptr

    def _const(self) -> np.ndarray:
        """The contents of constant memory."""
        memory = np.zeros(self._source.const_bytes, np.uint8)
        for variable in self._source.variables.values():
            if variable.space == "const" and variable.initial:
                end = variable.offset + variable.nbytes
                memory[variable.offset : end] = np.frombuffer(variable.initial, np.uint8)
        return memory
