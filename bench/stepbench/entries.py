"""Who is entered for a set of tensors, who is not and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from maxva_kernels import LaMAdam, MAdam
from stepbench import contenders, paper
from stepbench.contenders import Contender, Missing, Options, Params

REFERENCE = "MAdam (reference, eager)"
STATE = 24  # bytes of free memory for each parameter without which a contender is not tried


class Entry(NamedTuple):
    name: str
    make: Callable[[], Contender]
    quick: bool = True  # neither eager code nor compiled at first use
    slow: bool = False  # is made and measured after the others


def entries(
    sets: Sequence[Params], device: Any, backends: Sequence[str], options: Options, features: bool = False
) -> list[Entry]:
    listed = [
        Entry(name, partial(contenders.torchs, name, sets, options), slow=contenders.is_slow(name, device))
        for name in contenders.TORCHS
    ]
    for algorithm in (MAdam, LaMAdam):
        for backend in backends:
            name = algorithm.__name__ + (f" ({backend})" if len(backends) > 1 else "")
            eager = backend == "reference"
            name = f"{algorithm.__name__} (reference, eager)" if eager else name
            listed.append(Entry(name, partial(contenders.ours, name, algorithm, backend, sets, options), slow=eager))
            for feature, changed in contenders.FEATURES.items() if features and algorithm is MAdam else ():
                with_it, name_with_it = replace(options, **changed), f"{name}, {feature}"
                make = partial(contenders.ours, name_with_it, algorithm, backend, sets, with_it)
                listed.append(Entry(name_with_it, make, slow=eager))
    for name, other in contenders.OTHERS.items():
        make = partial(contenders.others, name, lambda: sets, device, options)
        listed.append(Entry(name, make, quick=not other.compiles))
    listed.append(Entry(paper.COMPILED, partial(paper.compiled, sets, options), quick=False))
    if "reference" not in backends:
        make = partial(contenders.ours, REFERENCE, MAdam, "reference", sets, options)
        listed.append(Entry(REFERENCE, make, quick=False, slow=True))
    listed.append(Entry(paper.EAGER, partial(paper.eager, sets, options), quick=False, slow=True))
    return listed


def admit(entry: Entry, parameters: int, machine: Any, quick: bool, lacking: dict[str, str]) -> list[Contender]:
    """It, or nothing and the reason among the lacking."""
    needed = STATE * parameters
    try:
        if quick and not entry.quick:
            raise Missing("left out by --quick")
        if machine.free_bytes() < needed:
            raise Missing(f"less than {needed / 1e9:.0f} GB of memory free")
        return [entry.make()]
    except Missing as missing:
        lacking[entry.name] = str(missing)
        return []
