"""Stage "speed": the device's time for a step, beside what else there is, and beside what memory allows.

Contenders take turns, so that a slow moment of the GPU meets all of them; the first turns only warm up. A step is timed
by events, and begins behind other work that outlasts the host's part of it, so that the host's time is not in it (where
a step has more launches than a queue holds, a thousand or so, as the eager reference, its time is mostly the host's).
Every turn moves more than the L2 holds, but where a line says otherwise. In the same turns the floors are measured: a
copy on the device, and in-place updates. A share is of the copy's rate. Not controlled: clock frequencies, temperature,
other users of the GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from step import bert_shapes

from gpu_check import compiled, contenders, machine, stage
from gpu_check.contenders import ADAMW, COPY, Contender
from gpu_check.stage import Lacking, Stage

SECONDS = 8.0  # for the turns of a case


class Case(NamedTuple):
    name: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    reference: bool = False  # the eager one too


def cases(rehearsal: bool) -> list[Case]:
    """The most important first."""
    base = bert_shapes(8, 1, vocabulary=50) if rehearsal else bert_shapes(768, 12)
    large = bert_shapes(16, 1, vocabulary=50) if rehearsal else bert_shapes(1024, 24)
    one = [(1000,)] if rehearsal else [(100_000_000,)]
    tiny = [(16,)] * 20 if rehearsal else [(1024,)] * 10_000
    models = {"BERT-Base": base, "BERT-Large": large, "one tensor of 100 M": one, "10,000 tensors of 1,024": tiny}
    listed = [
        Case(name, shapes, torch.float32, reference=shapes is base or shapes is one) for name, shapes in models.items()
    ]
    return listed + [Case(name, shapes, torch.bfloat16) for name, shapes in models.items()]


def run(stage: Stage) -> None:
    stage.check_package()
    gpu = machine.need()
    torch.manual_seed(0)
    stage.record["cache_bytes"] = gpu.cache_bytes()
    stage.record["cases"] = []
    listed = cases(stage.rehearsal)
    for case in listed[::2] if stage.rehearsal else listed:
        if stage.seconds_left() < 15:
            stage.record.lacks(f"time for {case.name}, {case.dtype}, and what follows")
            return
        stage.record["cases"] = [*stage.record["cases"], measure_case(stage, gpu, case)]
        gpu.free_bytes()
    if stage.seconds_left() < 45:
        stage.record.lacks("time for torch.compile")
        return
    try:
        stage.record["compiled"] = measure_compiled(stage, gpu, listed[2])
    except Exception as error:  # not what is tested here: whatever it raises is told and no problem
        stage.record.lacks(f"torch.compile of the paper's lines: {type(error).__name__}: {str(error)[:300]}")


def measure_case(stage: Stage, gpu: Any, case: Case) -> dict[str, Any]:
    """All contenders on one model's tensors."""
    start = time.perf_counter()
    lacks: Callable[[str], None] = stage.record.lacks
    entered = contenders.ours(case.shapes, case.dtype, gpu.device, reference=case.reference)
    entered += contenders.torchs(case.shapes, case.dtype, gpu.device)
    entered += contenders.others(case.shapes, case.dtype, gpu.device, lacks)
    entered += contenders.bandwidths(1 << 16 if stage.rehearsal else 1 << 30, gpu.device)
    parameters = sum(torch.Size(shape).numel() for shape in case.shapes)
    results = measure(gpu, entered, 2 if stage.rehearsal else 25)
    return {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tensors": len(case.shapes),
        "parameters": parameters,
        "results": figures(results, entered, parameters, gpu.cache_bytes()),
        "launches": launches(stage, gpu, entered),
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure(gpu: Any, entered: list[Contender], rounds: int, warm: int = 3) -> dict[str, list[float]]:
    """Milliseconds of the device, for each contender one a round; fewer rounds, but some, where they take long."""
    results: dict[str, list[float]] = {contender.name: [] for contender in entered}
    host: dict[str, float] = {}
    ends = time.perf_counter() + SECONDS
    for turn in range(-warm, rounds):
        if turn > min(7, rounds) and time.perf_counter() > ends:
            break
        for contender in entered:
            if contender.slow and turn not in (-1, 0, 2, 4):
                continue
            if turn < 0:
                start = time.perf_counter()
                contender.step()
                host[contender.name] = 1e3 * (time.perf_counter() - start)
                gpu.synchronize()
                continue
            behind = 0.0 if contender.slow else min(100.0, 1.5 * host[contender.name] + 0.2)
            results[contender.name].append(gpu.milliseconds(contender.step, behind))
    return results


def figures(
    results: dict[str, list[float]], entered: list[Contender], parameters: int, cache: int
) -> list[dict[str, Any]]:
    """The medians and what follows from them."""
    median = {name: statistics.median(times) for name, times in results.items()}
    moved = {contender.name: contender.bytes for contender in entered}
    copy_rate = (moved[COPY] or 0) / median[COPY]
    lines = []
    for contender in entered:
        name, times = contender.name, results[contender.name]
        line: dict[str, Any] = {"name": name, "ms": median[name], "min": min(times), "max": max(times), "turns": times}
        if contender.bytes:
            rate = contender.bytes / median[name]
            line |= {"bytes_per_parameter": round(contender.bytes / parameters, 2), "GB_per_s": rate / 1e6}
            line |= {"share_of_copy": rate / copy_rate, "in_cache": contender.tensors <= cache}
        line["of_adamw"] = median[name] / median[ADAMW]
        lines.append(line)
    return lines


def launches(stage: Stage, gpu: Any, entered: list[Contender]) -> dict[str, Any]:
    """What a step launches, by the profiler."""
    try:
        return {c.name: gpu.trace(c.step).summary() for c in entered if not c.slow}
    except Lacking as missing:
        stage.record.lacks(str(missing))
        return {}


def measure_compiled(stage: Stage, gpu: Any, case: Case) -> dict[str, Any]:
    """The paper's lines through torch.compile, on one tensor, beside AdamW and the copy."""
    entered = [
        compiled.contender(case.shapes[0], gpu.device, backend="eager" if stage.rehearsal else "inductor"),
        contenders.torchs(case.shapes, torch.float32, gpu.device)[0],
        contenders.bandwidths(1 << 16 if stage.rehearsal else 1 << 30, gpu.device)[0],
    ]
    parameters = torch.Size(case.shapes[0]).numel()
    results = measure(gpu, entered, 2 if stage.rehearsal else 10)
    return {"case": case.name, "dtype": "float32", "results": figures(results, entered, parameters, gpu.cache_bytes())}


if __name__ == "__main__":
    stage.main(run)
