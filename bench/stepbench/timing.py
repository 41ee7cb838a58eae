"""Contenders in turns: one step each, again and again, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stepbench.contenders import ADAMW, Contender
from stepbench.cpu import Cpu


@dataclass
class Result:
    name: str
    ms: list[float] = field(default_factory=list)  # of the device, by turn
    host_ms: list[float] = field(default_factory=list)  # until step() returned; a CPU's is the same

    @property
    def seconds(self) -> list[float]:
        return [ms / 1e3 for ms in self.ms]

    @property
    def median(self) -> float:
        """In seconds."""
        return statistics.median(self.seconds)


def measure(
    entered: Sequence[Contender],
    rounds: int,
    machine: Any = None,
    *,
    warm: int = 1,
    least: int = 8,
    seconds: float = float("inf"),
) -> list[Result]:
    """Times a step of each in every round, after `warm` that are not timed; after `least` rounds only while there are
    `seconds` left. Of slow ones among others a few."""
    machine = machine or Cpu()
    results = [Result(contender.name) for contender in entered]
    host: dict[str, float] = {}
    ends = time.perf_counter() + seconds
    for turn in range(-warm, rounds):
        if turn >= min(least, rounds) and time.perf_counter() > ends:
            break
        for contender, result in zip(entered, results, strict=True):
            if contender.slow and len(entered) > 1 and turn not in (-1, 0, 2, 4):
                continue
            if turn < 0:
                host[contender.name] = host_ms(contender)
                machine.synchronize()
                continue
            # The device is kept busy until the host has queued the step, so that the host's time is not in it.
            behind = 0.0 if contender.slow else min(100.0, 1.5 * host[contender.name] + 0.2)
            step = lambda c=contender, r=result: r.host_ms.append(host_ms(c))  # noqa: E731
            result.ms.append(machine.milliseconds(step, behind))
    return results


def host_ms(contender: Contender) -> float:
    """Takes a step and does not wait for the device."""
    start = time.perf_counter()
    contender.step()
    return 1e3 * (time.perf_counter() - start)


def figures(
    times: dict[str, list[float]],
    entered: Sequence[Contender],
    parameters: int,
    cache: int,
    floor: str,
    share: str = "share_of_floor",
) -> list[dict[str, Any]]:
    """The medians of these milliseconds, and what follows from them; `floor` is whose rate a `share` is of."""
    median = {name: statistics.median(own) for name, own in times.items()}
    moved = {contender.name: contender.bytes for contender in entered}
    floor_rate = (moved[floor] or 0) / median[floor]
    lines = []
    for contender in entered:
        name, own = contender.name, times[contender.name]
        line: dict[str, Any] = {"name": name, "ms": median[name], "min": min(own), "max": max(own), "turns": own}
        if contender.bytes:
            rate = contender.bytes / median[name]
            line |= {"bytes_per_parameter": round(contender.bytes / parameters, 2), "GB_per_s": rate / 1e6}
            line |= {share: rate / floor_rate, "in_cache": contender.tensors <= cache}
        line["of_adamw"] = median[name] / median[ADAMW]
        lines.append(line)
    return lines
