"""The CPU, with as much of the face of gpu_check/machine.py's `Gpu` as it takes to time a step."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Cpu:
    device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def milliseconds(self, function: Callable[[], object], behind: float = 0.0) -> float:
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)

    def cache_bytes(self) -> int:
        """Of the largest cache, as Linux tells it; elsewhere a size that few exceed."""
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        units = {"K": 2**10, "M": 2**20}
        return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 * 2**20)

    def free_bytes(self) -> int:
        """What can be allocated without swapping, as Linux tells it; elsewhere no limit is known."""
        try:
            match = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        except OSError:
            match = None
        return 1024 * int(match[1]) if match else 2**60
