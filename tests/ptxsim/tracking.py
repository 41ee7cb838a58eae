"""How often a launch reads and writes each byte."""

from __future__ import annotations

import numpy as np

from .errors import PTXError
from .memory import Buffer


class Tracker:
    """The accesses of one launch to global memory, for each byte."""

    def __init__(self) -> None:
        # For each kind of access, how many more accesses cover a byte than the one before it.
        self._steps: dict[Buffer, dict[str, np.ndarray]] = {}

    def add(self, buffer: Buffer, kinds: list[str], address: np.ndarray, width: int) -> None:
        """Count accesses of width bytes, of each of the kinds "ld", "st" and "nc" (a load as ld.global.nc)."""
        relative = (address - np.uint64(buffer.ptr)).astype(np.int64)
        of_buffer = self._steps.setdefault(buffer, {})
        for kind in kinds:
            steps = of_buffer.get(kind)
            if steps is None:
                steps = of_buffer[kind] = np.zeros(buffer.nbytes + 1, np.int64)
            np.add.at(steps, relative, 1)
            np.add.at(steps, relative + width, -1)

    def finish(self) -> None:
        """Hand the counts to the buffers."""
        for buffer, of_buffer in self._steps.items():
            for kind, steps in of_buffer.items():
                if kind != "nc":
                    buffer.count(kind, np.cumsum(steps[:-1]))

    def check_non_coherent(self, kernel_name: str) -> None:
        """Raise PTXError if ld.global.nc read a byte that this launch wrote: it may return either value."""
        for buffer, of_buffer in self._steps.items():
            if "nc" in of_buffer and "st" in of_buffer:
                both = (np.cumsum(of_buffer["nc"][:-1]) > 0) & (np.cumsum(of_buffer["st"][:-1]) > 0)
                if both.any():
                    raise PTXError(
                        f"{kernel_name}: ld.global.nc read {np.count_nonzero(both)} bytes of {buffer.name} that this "
                        f"launch also wrote (first at offset {np.argmax(both)})"
                    )
