"""Stage "host": how long step() keeps the host, and what it launches.

Each contender is timed with an idle device (queued work would hide a wait) and with a busy one (a step that waits for
it takes as long as its work). The clock is the host's; the device is waited for between the calls, not in them.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from step import bert_shapes

from gpu_check import contenders, machine, stage
from gpu_check.contenders import OPTIONS, Contender
from gpu_check.stage import Lacking, Stage
from maxva_kernels import MAdam
from maxva_kernels.backends import cuda

BUSY = 60.0  # milliseconds of other work before a step; a third of it where there are few tensors


def run(stage: Stage) -> None:
    stage.check_package()
    gpu = machine.need()
    torch.manual_seed(0)
    cases: dict[str, list[tuple[int, ...]]] = {
        "400 tensors of 16": [(16,)] * (10 if stage.rehearsal else 400),
        "BERT-Base": bert_shapes(8, 1, vocabulary=50) if stage.rehearsal else bert_shapes(768, 12),
        "10,000 tensors of 16": [(16,)] * (20 if stage.rehearsal else 10_000),
    }
    stage.record["cases"], stage.record["first_steps"] = [], []
    all_entered = []
    for name, shapes in cases.items():
        entered = contenders.ours(shapes, torch.float32, gpu.device, reference=name.startswith("400"))
        entered += contenders.torchs(shapes, torch.float32, gpu.device)
        entered += contenders.others(shapes, torch.float32, gpu.device, stage.record.lacks)
        try:
            entered.append(replayed(gpu, shapes))
        except Lacking as missing:
            stage.record.lacks(str(missing))
        all_entered.append(entered)
        many = len(shapes) > 1000
        rounds = 2 if stage.rehearsal else 15 if many else 60
        busy = BUSY if many else BUSY / 3
        results = measure(gpu, entered, rounds, busy)
        case = {"case": name, "tensors": len(shapes), "busy_ms": busy, "results": results, "launches": {}}
        stage.record["cases"] = [*stage.record["cases"], case]
        stage.record["first_steps"] = [*stage.record["first_steps"], first_step(gpu, name, shapes)]
        if name.startswith("400"):
            stage.record["functions"] = functions(entered[0].step, 2 if stage.rehearsal else 200)
    # Last, since the profiler stays in the process once it was used, and the host's calls go through it.
    for case, entered in zip(stage.record["cases"], all_entered, strict=True):
        case["launches"] = launches(stage, gpu, entered)
        stage.record.save()


def replayed(gpu: Any, shapes: list[tuple[int, ...]]) -> Contender:
    """MAdam's step as a CUDA graph.

    Raises:
        Lacking: the driver takes none.
    """
    if not cuda._launcher().GRAPHS:
        raise Lacking("CUDA graphs: they need a driver for CUDA 13")
    params = contenders.make_params(shapes, torch.float32, gpu.device)
    optimizer = MAdam(params, **OPTIONS, capturable=True, backend="cuda")
    gpu.warm_up(optimizer.step)
    return Contender("MAdam, CUDA graph", gpu.capture(optimizer.step), None)


def measure(gpu: Any, entered: list[Contender], rounds: int, busy: float) -> list[dict[str, Any]]:
    """Microseconds of the host, idle and busy, contenders in turns."""
    times: dict[str, dict[str, list[float]]] = {c.name: {"idle": [], "busy": []} for c in entered}
    for turn in range(-2, rounds):
        for contender in entered:
            if contender.slow and turn not in (-1, 0, 1):
                continue
            for device in ("idle", "busy"):
                gpu.synchronize()
                if device == "busy":
                    if contender.slow or turn % 5:  # the work before it takes long
                        continue
                    gpu.delay(busy)
                start = time.perf_counter()
                contender.step()
                if turn >= 0:
                    times[contender.name][device].append(1e6 * (time.perf_counter() - start))
        gpu.synchronize()
    return [
        {
            "name": name,
            "us": statistics.median(both["idle"]),
            "min": min(both["idle"]),
            "max": max(both["idle"]),
            "us_busy": statistics.median(both["busy"]) if both["busy"] else None,
            "turns": both,
        }
        for name, both in times.items()
    ]


def first_step(gpu: Any, name: str, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Milliseconds of the host for MAdam's first step, which makes state and table: device idle, and busy for BUSY ms.
    Other first steps have been before, so that kernels are loaded and the allocator has memory."""
    times: dict[str, Any] = {"case": name, "device_busy_ms": BUSY}
    for device in ("before", "idle", "busy"):
        optimizer = MAdam(contenders.make_params(shapes, torch.float32, gpu.device), **OPTIONS, backend="cuda")
        gpu.synchronize()
        if device == "busy":
            gpu.delay(BUSY)
        start = time.perf_counter()
        optimizer.step()
        times[device] = 1e3 * (time.perf_counter() - start)
        gpu.synchronize()
    return times


def launches(stage: Stage, gpu: Any, entered: list[Contender]) -> dict[str, Any]:
    """How many kernels, copies and fills a step is, and the runtime's calls for it."""
    seen: dict[str, Any] = {}
    try:
        for contender in entered:
            trace = gpu.trace(contender.step)
            calls = {name: trace.calls.count(name) for name in dict.fromkeys(trace.calls)}
            seen[contender.name] = {"launches": len(trace.launches), "kinds": trace.summary()[:10], "calls": calls}
    except Lacking as missing:
        stage.record.lacks(str(missing))
    return seen


def functions(step: Callable[[], object], times: int) -> list[str]:
    """Where the host's time goes, function by function; the profile itself takes time, most from small functions."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(times):
        step()
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(18)
    return [line for line in text.getvalue().splitlines() if line.strip()]


if __name__ == "__main__":
    stage.main(run)
