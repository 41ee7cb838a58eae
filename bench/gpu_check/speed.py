"""Stage "speed": the device's time for a step, beside what else there is, and beside what memory allows.

Contenders take turns, so that a slow moment of the GPU meets all of them; the first turns only warm up. A step is timed
by events, and begins behind other work that outlasts the host's part of it, so that the host's time is not in it (where
a step has more launches than a queue holds, a thousand or so, as the eager reference, its time is mostly the host's).
Every turn moves more than the L2 holds, but where a line says otherwise. In the same turns the floors are measured: a
copy on the device, and in-place updates. A share is of the copy's rate. Not controlled: clock frequencies, temperature,
other users of the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from stepbench import paper, timing
from stepbench.shapes import SHAPES, TITLES, Shapes, bert_shapes

from gpu_check import contenders, machine, stage
from gpu_check.contenders import COPY, Contender
from gpu_check.stage import Lacking, Stage

SECONDS = 8.0  # for the turns of a case


class Case(NamedTuple):
    name: str
    shapes: Shapes
    dtype: torch.dtype
    reference: bool = False  # the eager one too


def cases(rehearsal: bool) -> list[Case]:
    """The most important first."""
    models: dict[str, Shapes] = {TITLES[name]: SHAPES[name] for name in ("bert-base", "bert-large", "one", "10k")}
    with_reference = (TITLES["bert-base"], TITLES["one"])
    if rehearsal:
        small = (bert_shapes(8, 1, vocabulary=50), bert_shapes(16, 1, vocabulary=50), [(1000,)], [(16,)] * 20)
        models = dict(zip(models, small, strict=True))
    listed = [Case(name, shapes, torch.float32, name in with_reference) for name, shapes in models.items()]
    return listed + [Case(name, shapes, torch.bfloat16) for name, shapes in models.items()]


def run(stage: Stage) -> None:
    stage.check_package()
    gpu = machine.need()
    torch.manual_seed(0)
    stage.record["cache_bytes"] = gpu.cache_bytes()
    stage.record["cases"] = []
    listed = cases(stage.rehearsal)
    longest = 10.0  # seconds of a case so far
    for case in listed[::2] if stage.rehearsal else listed:
        if stage.seconds_left() < 1.5 * longest:
            stage.record.lacks(f"time for {case.name}, {case.dtype}, and what follows")
            return
        start = time.perf_counter()
        measure_case(stage, gpu, case)
        gpu.free_bytes()
        longest = max(longest, time.perf_counter() - start)
    if stage.seconds_left() < 45:
        stage.record.lacks("time for torch.compile")
        return
    try:
        stage.record["compiled"] = measure_compiled(stage, gpu, listed[2])
    except Exception as error:  # not what is tested here: whatever it raises is told and no problem
        stage.record.lacks(f"torch.compile of the paper's lines: {type(error).__name__}: {str(error)[:300]}")


def measure_case(stage: Stage, gpu: Any, case: Case) -> None:
    """All contenders on one model's tensors: their times, and when these are in the record what they launch."""
    lacks: Callable[[str], None] = stage.record.lacks
    entered = contenders.ours(case.shapes, case.dtype, gpu.device, reference=case.reference)
    entered += contenders.torchs(case.shapes, case.dtype, gpu.device)
    entered += contenders.others(case.shapes, case.dtype, gpu.device, lacks)
    entered += contenders.bandwidths(1 << 16 if stage.rehearsal else 1 << 30, gpu.device)
    parameters = sum(torch.Size(shape).numel() for shape in case.shapes)
    results = measure(gpu, entered, 2 if stage.rehearsal else 25)
    measured: dict[str, Any] = {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tensors": len(case.shapes),
        "parameters": parameters,
        "results": figures(results, entered, parameters, gpu.cache_bytes()),
        "launches": {},
    }
    stage.record["cases"] = [*stage.record["cases"], measured]
    measured["launches"] = launches(stage, gpu, entered)
    stage.record.save()


def measure(gpu: Any, entered: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the device, for each contender one a round; fewer rounds, but some, where they take long."""
    return {result.name: result.ms for result in timing.measure(entered, rounds, gpu, warm=3, seconds=SECONDS)}


def figures(
    times: dict[str, list[float]], entered: list[Contender], parameters: int, cache: int
) -> list[dict[str, Any]]:
    """The medians and what follows from them."""
    return timing.figures(times, entered, parameters, cache, floor=COPY, share="share_of_copy")


def launches(stage: Stage, gpu: Any, entered: list[Contender]) -> dict[str, Any]:
    """What a step launches, by the profiler."""
    try:
        return {c.name: gpu.trace(c.step).summary() for c in entered if not c.slow}
    except Lacking as missing:
        stage.record.lacks(str(missing))
        return {}


def measure_compiled(stage: Stage, gpu: Any, case: Case) -> dict[str, Any]:
    """The paper's lines through torch.compile, on one tensor, beside AdamW and the copy."""
    params = [contenders.make_params(case.shapes, torch.float32, gpu.device)]
    entered = [
        paper.compiled(params, backend="eager" if stage.rehearsal else "inductor"),
        contenders.torchs(case.shapes, torch.float32, gpu.device)[0],
        contenders.bandwidths(1 << 16 if stage.rehearsal else 1 << 30, gpu.device)[0],
    ]
    parameters = torch.Size(case.shapes[0]).numel()
    results = measure(gpu, entered, 2 if stage.rehearsal else 10)
    return {"case": case.name, "dtype": "float32", "results": figures(results, entered, parameters, gpu.cache_bytes())}


if __name__ == "__main__":
    stage.main(run)
