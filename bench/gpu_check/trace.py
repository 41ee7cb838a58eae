"""What the profiler saw: kernels, copies and fills on the device, and the host's calls of the CUDA runtime.

It is read from the profiler's trace file, which says of each event what it is, and of each kernel on which stream it
ran, with how many blocks and registers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME = ("cuda_runtime", "cuda_driver")


@dataclass
class Launch:
    kind: str  # of ON_DEVICE
    name: str
    microseconds: float
    stream: int | None = None
    blocks: int | None = None
    registers: int | None = None


@dataclass
class Trace:
    launches: list[Launch] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)  # of the runtime, by name

    def names(self) -> list[str]:
        return [launch.name for launch in self.launches]

    def summary(self) -> list[dict[str, Any]]:
        """A line for each kernel or kind of copy: how often, how long."""
        lines: dict[tuple[str, str], dict[str, Any]] = {}
        for launch in self.launches:
            line = lines.setdefault(
                (launch.kind, launch.name),
                {"kind": launch.kind, "name": launch.name[:160], "count": 0, "microseconds": 0.0},
            )
            line["count"] += 1
            line["microseconds"] = round(line["microseconds"] + launch.microseconds, 3)
            line.update(blocks=launch.blocks, registers=launch.registers)
        return list(lines.values())


def record(function: Callable[[], object], activities: Sequence[ProfilerActivity], kinds: tuple[str, ...]) -> Trace:
    """What `function` has the device do; events of the categories `kinds` count as launches."""
    with profile(activities=activities) as profiler:
        function()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read(json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"], kinds)


def read(events: list[dict[str, Any]], kinds: tuple[str, ...] = ON_DEVICE) -> Trace:
    """The events of a trace file, in the order in which they began."""
    trace = Trace()
    for event in sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"]):
        kind, details = event.get("cat"), event.get("args", {})
        if kind in kinds:
            grid = details.get("grid")
            trace.launches.append(
                Launch(
                    kind,
                    event["name"],
                    event["dur"],
                    details.get("stream"),
                    grid and grid[0] * grid[1] * grid[2],
                    details.get("registers per thread"),
                )
            )
        elif kind in RUNTIME:
            trace.calls.append(event["name"])
    return trace
