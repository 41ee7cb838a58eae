"""All contenders on one model's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gpu_check.stage import Lacking
from gpu_check.table import COPY, UPDATE

from stepbench import contenders
from stepbench.contenders import ADAMW, PLAIN, Contender, Missing, Options, make_params
from stepbench.entries import admit, entries
from stepbench.shapes import DTYPES, SHAPES, TITLES, elements
from stepbench.timing import figures, measure

MEMORY_BOUND = 1_000_000  # parameters; fewer are bound by the host
ROTATION = 4  # all copies together are as many times as large as the cache
FLOOR_BYTES = {"cpu": 2**28, "cuda": 2**30}


@dataclass(frozen=True)
class Case:
    shapes: str
    dtype: str = "float32"
    options: Options = PLAIN
    backends: Sequence[str] = ("cpu",)
    quick: bool = False
    features: bool = False  # MAdam with each of contenders.FEATURES too
    rounds: int = 300  # at most
    seconds: float = 6.0  # for what takes turns
    copies: int | None = None


def copies_of(shapes: str, dtype: str, cache: int) -> int:
    """How many sets of parameters and gradients lie well beyond the cache."""
    parameters = elements(SHAPES[shapes])
    return 1 if parameters < MEMORY_BOUND else -(-ROTATION * cache // (2 * parameters * DTYPES[dtype].itemsize))


def run(case: Case, machine: Any) -> dict[str, Any]:
    """Measures it.

    Raises:
        Missing: there is not the memory for it.
    """
    shapes, device, cache = SHAPES[case.shapes], machine.device, machine.cache_bytes()
    parameters, on_cpu = elements(shapes), machine.device.type == "cpu"
    copies = case.copies or copies_of(case.shapes, case.dtype, cache)
    sets = [make_params(shapes, DTYPES[case.dtype], device) for _ in range(copies)]
    listed = entries(sets, device, case.backends, case.options, case.features)
    floors = contenders.bandwidths(FLOOR_BYTES[device.type], device)[on_cpu:]
    lacking: dict[str, str] = {}
    entered: list[Contender] = []
    results: dict[str, dict[str, Any]] = {}

    def take_turns(group: Sequence[Contender], **limits: Any) -> None:
        entered.extend(group)
        for result in measure(group, case.rounds, machine, **limits):
            results[result.name] = {"turns": result.ms} if on_cpu else {"turns": result.ms, "host": result.host_ms}
        for contender in group:
            if not on_cpu:
                try:
                    results[contender.name]["kernels"] = len(machine.trace(contender.step).launches)
                except Lacking as missing:
                    lacking["kernels launched"] = str(missing)
            contender.release()

    fast = [c for entry in listed if not entry.slow for c in admit(entry, parameters, machine, case.quick, lacking)]
    if ADAMW in lacking:
        raise Missing(lacking[ADAMW])
    take_turns([*fast, *floors], warm=1 if on_cpu else 3, seconds=case.seconds)
    del fast, floors
    for entry in listed:
        for contender in admit(entry, parameters, machine, case.quick, lacking) if entry.slow else ():
            take_turns([contender], warm=0, least=3, seconds=case.seconds / 3)

    floor = next(contender for contender in entered if contender.name in (COPY, UPDATE))
    times = {name: result["turns"] for name, result in results.items()}
    order = [entry.name for entry in listed]
    entered.sort(key=lambda contender: order.index(contender.name) if contender.name in order else len(order))
    lines = [
        {**line, **results[line["name"]], "bytes": contender.bytes}
        for line, contender in zip(figures(times, entered, parameters, cache, floor.name), entered, strict=True)
    ]
    return {
        "shapes": case.shapes,
        "title": TITLES[case.shapes],
        "dtype": case.dtype,
        "options": asdict(case.options),
        "backends": list(case.backends),
        "quick": case.quick,
        "device": device.type,
        "tensors": len(shapes),
        "parameters": parameters,
        "memory_bound": parameters >= MEMORY_BOUND,
        "copies": copies,
        "floor": floor.name,
        "results": lines,
        "lacking": lacking,
    }
