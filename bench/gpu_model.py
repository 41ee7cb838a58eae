"""What the step kernels should reach on a GPU that is not there: their instructions counted, and a rough model of how
they share a multiprocessor.

    python bench/gpu_model.py

needs nvcc, cuobjdump and Triton, takes a minute and prints a table of the CUDA kernels and one of the Triton kernels.
For each pair of dtypes, where w is 1 and where it is not: the bytes that an element moves; instructions on the way
through whole packets, in the modes of the defaults, and how many of them are for the integer and comparison units; for
how many a GPU has time while it copies as many bytes; and what share of the copy's rate the model gives. It is a
prediction and no measurement.

The model is one of the four sub-partitions of a multiprocessor of compute capability 9.0. Its warps go through turns of
the loop. In each cycle one warp issues an instruction: the same as before, or else the one that has been in its turn
for longest, if the stall count of its last instruction is over, the barriers that it waits for are open, and its unit
is free (1 cycle for float32 arithmetic, 2 for integers and comparisons and for integer multiplication, 8 for
reciprocals and roots, 4 for accesses). Stall counts and barriers are those that ptxas wrote into the code. Memory is a
queue at the copy's rate and then a latency. Not in it: chunks' beginnings and ends, the cache of instructions, banks of
registers. In which order a GPU takes its warps is not known either, and that alone moves a share by some 0.06 where
instructions bind.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
ARCH = "sm_90"
LATENCY = 650  # cycles that memory takes when nobody else asks
BRANCH = 8  # and a branch, whatever its stall count
WARP = 32
REGISTERS = 65536  # of a multiprocessor
FACTOR = f"-{2**32 - 0x85EBCA77:#x}"  # of the parameter's random number (csrc/rounding.h), as it is printed


class Machine(NamedTuple):
    """A GPU: the rate of a copy in bytes/s, its multiprocessors, and their clock in 1/s."""

    name: str
    copy: float
    multiprocessors: int = 132
    clock: float = 1.755e9

    @property
    def bytes_per_cycle(self) -> float:
        """Of a sub-partition."""
        return self.copy / self.multiprocessors / self.clock / 4


MACHINES = (Machine("H100", 3.0e12), Machine("H200", 4.25e12))


class Line(NamedTuple):
    """A kernel and where it is looked at: types of parameter, gradient and state, whether w is 1, and the mode."""

    source: str  # a file of csrc/cuda, or TRITON
    param: str
    grad: str
    state: str
    saturated: bool
    amsgrad: bool = False

    @property
    def bytes(self) -> int:
        """Moved for an element: parameter and moments both ways, w unless it is 1, the gradient once."""
        size = {"float": 4, "BFloat16": 2}
        moments = 4 - self.saturated + self.amsgrad
        return 2 * size[self.param] + size[self.grad] + 2 * moments * size[self.state]

    @property
    def elements(self) -> int:
        """Of a thread's turn."""
        return 4 if self.source == TRITON or {self.param, self.grad, self.state} == {"float"} else 8


TRITON = "Triton"
LINES = [
    Line(*kernel, saturated)
    for kernel in (
        ("step_float", "float", "float", "float"),
        ("step_float", "float", "BFloat16", "float"),
        ("step_bfloat16", "BFloat16", "BFloat16", "float"),
        ("step_float_rounded", "float", "float", "BFloat16"),
        ("step_bfloat16_rounded", "BFloat16", "BFloat16", "BFloat16"),
    )
    for saturated in (False, True)
]
TRITON_LINES = [line._replace(source=TRITON) for line in LINES]

INTEGER = r"F(SETP|SEL|MNMX)|IADD3|LOP3|SHF|LEA|PRMT|ISETP|SEL|VIADD|V?IMNMX|PLOP3|MOV|F2FP|VOTE|P2R|R2P"
UNITS = (  # by the first pattern that an opcode matches: the unit, and for how many cycles
    (r"MUFU", "special", 8),
    (r"IMAD", "multiply", 2),
    (r"F(ADD|MUL|FMA)|H(FMA|ADD|MUL)2", "float", 1),
    (INTEGER, "integer", 2),
    (r"LDG|STG|LDS|STS|LDC", "access", 4),
    (r"", "other", 1),
)


class Issue(NamedTuple):
    """An instruction to the scheduler."""

    unit: str
    busy: int  # cycles of the unit
    stall: int = 1  # cycles until the warp's next instruction
    opens_done: int | None = None  # the barrier that is closed until the result is there
    opens_read: int | None = None  # and until the operands have been read
    waits: tuple[int, ...] = ()  # barriers that must be open
    moved: int = 0  # bytes of a warp's access to memory
    latency: int = 22  # cycles until the result is there


@dataclass
class Warp:
    ready: int
    place: int = 0
    turns: int = 0
    begun: int = 0
    open_at: list[float] = field(default_factory=lambda: [0.0] * 6)


def cycles_of_a_turn(turn: Sequence[Issue], warps: int, bytes_per_cycle: float, turns: int = 24) -> float:
    """How many cycles lie between one warp's end of a turn and the next one's, on average once all are under way."""
    crew = [Warp(ready=37 * k, begun=k) for k in range(warps)]
    free: dict[str, int] = {}
    memory, now = 0.0, 0
    ends: list[int] = []
    last = crew[0]
    while len(ends) < turns * warps:
        for warp in sorted(crew, key=lambda warp: (warp is not last, warp.begun)):
            issue = turn[warp.place]
            if (
                warp.turns == turns
                or warp.ready > now
                or free.get(issue.unit, 0) > now
                or any(warp.open_at[barrier] > now for barrier in issue.waits)
            ):
                continue
            free[issue.unit] = now + issue.busy
            done: float = now + issue.latency
            if issue.moved:
                memory = max(memory, now) + issue.moved / bytes_per_cycle
                done = memory + LATENCY
            for barrier, opens in ((issue.opens_done, done), (issue.opens_read, now + 20)):
                if barrier is not None:
                    warp.open_at[barrier] = max(warp.open_at[barrier], opens)
            warp.ready = now + issue.stall
            warp.place += 1
            if warp.place == len(turn):
                warp.place, warp.turns, warp.begun = 0, warp.turns + 1, now
                ends.append(now)
            last = warp
            break
        now += 1
    first, behind = len(ends) // 4, 3 * len(ends) // 4
    return (ends[behind] - ends[first]) / (behind - first)


def issues(turn: Sequence[Any], moved: int) -> list[Issue]:
    """A turn's instructions (tests/sass.py), of which so many accesses to memory are made that a thread moves so many
    bytes: all without a predicate, and of those that depend on the modes the first loads and stores."""
    accesses = [k for k, each in enumerate(turn) if each.opcode.startswith(("LDG", "STG"))]
    made = {k for k in accesses if not turn[k].text.startswith("@")}
    left = moved - sum(_width(turn[k]) for k in made)
    others = [k for k in accesses if k not in made]
    loads, stores = ([k for k in others if turn[k].opcode.startswith(kind)] for kind in ("LDG", "STG"))
    for k in chain.from_iterable(zip_longest(loads, stores)):
        if k is not None and left > 0:
            made.add(k)
            left -= _width(turn[k])
    assert left == 0, f"the accesses do not add up to {moved} bytes"
    return [_issue(each, k in made) for k, each in enumerate(turn)]


def _width(access: Any) -> int:
    """Bytes of a thread's access."""
    bits = re.search(r"\.(64|128)", access.opcode)
    return int(bits[1]) // 8 if bits else 4


def _issue(each: Any, moves: bool) -> Issue:
    unit, busy = next((unit, busy) for pattern, unit, busy in UNITS if re.match(pattern, each.opcode))
    return Issue(
        unit,
        busy,
        stall=max(1, each.stall, BRANCH if each.opcode in ("BRA", "BSYNC") else 0),
        opens_done=each.opens_done,
        opens_read=each.opens_read,
        waits=each.waits,
        moved=_width(each) * WARP if moves else 0,
    )


def kernel_of(line: Line, kernels: Sequence[Any]) -> Any:
    """The machine code (tests/sass.py) of MAdam's step without statistics."""
    name = f"step_kernel<0, float, {line.param}, {line.grad}, {line.state}, false>"
    (code,) = (code for code in kernels if code.name == name)
    return code


def warps_of(line: Line, code: Any) -> int:
    """How many warps a scheduler holds: of blocks whose turn is 1,024 elements (csrc/cuda/step.cuh, Note [Blocks]; in
    Triton 512) as many as there are registers for, which a thread gets in eights."""
    threads = (512 if line.source == TRITON else 1024) // line.elements
    blocks = REGISTERS // (-(-code.registers // 8) * 8 * threads)
    return blocks * threads // WARP // 4


def turn_of(line: Line, code: Any) -> list[Any]:
    """The instructions of a turn. Where w is 1 an element has a division and a root less, of three and two; bfloat16
    parameters are rounded stochastically, which multiplies a random number once more."""
    approximations = (3 if line.saturated else 5) * line.elements
    rounded = line.elements if line.param == "BFloat16" else 0
    if line.source == TRITON:  # which branches around the store of w, where the other has a predicate
        turns = code.triton_turns("MUFU", FACTOR, "LDG|STG")
        turn: list[Any] = turns[approximations, rounded, 11 - line.saturated + 2 * line.amsgrad]
    else:
        turn = code.turns("MUFU", FACTOR)[approximations, rounded]
    return turn


def compiled() -> dict[str, list[Any]]:
    """The CUDA kernels of each source."""
    from sass import compile_kernels

    sources = list(dict.fromkeys(line.source for line in LINES))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        kernels = pool.map(lambda source: compile_kernels(source, ARCH, Path(folder)), sources)
        return dict(zip(sources, kernels, strict=True))


def compiled_by_triton(line: Line) -> Any:
    """The machine code of MAdam's step without statistics and masters."""
    from maxva_kernels.triton_kernels.launcher import step_constants
    from maxva_kernels.triton_kernels.step import step_kernel
    from simulated_triton import constants_of, machine_code

    name = {"float": "float32", "BFloat16": "bfloat16"}
    dtypes = (name[line.param], name[line.grad], name[line.state])
    constants = constants_of(step_constants, *dtypes, amsgrad=line.amsgrad)
    return machine_code(step_kernel, constants, int(ARCH.removeprefix("sm_")))


def row(line: Line, code: Any) -> list[str]:
    """A line of the table, about a kernel's machine code."""
    turn, warps = turn_of(line, code), warps_of(line, code)
    moved = line.bytes * line.elements * WARP  # by a warp in a turn
    integer = sum(bool(re.match(INTEGER, each.opcode)) for each in turn)
    cells = [f"{line.param}, {line.grad}, {line.state}" + ", w at 1" * line.saturated, str(line.bytes)]
    cells += [f"{len(turn) / line.elements:.0f}", f"{integer / line.elements:.0f}"]
    for machine in MACHINES:
        floor = moved / machine.bytes_per_cycle
        cycles = cycles_of_a_turn(issues(turn, moved // WARP), warps, machine.bytes_per_cycle)
        cells += [f"{floor / line.elements:.0f}", f"{min(1, floor / cycles):.2f}"]
    return cells


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from sass import cuobjdump

    if cuobjdump() is None or shutil.which("nvcc") is None:
        raise SystemExit("nvcc and cuobjdump are needed, from the CUDA toolkit (the latter comes with Triton too)")
    kernels = compiled()
    print_table("CUDA", [row(line, kernel_of(line, kernels[line.source])) for line in LINES])
    print_table("Triton", [row(line, compiled_by_triton(line)) for line in TRITON_LINES])


def print_table(backend: str, rows: Sequence[Sequence[str]]) -> None:
    header = [f"{backend}: parameter, gradient, state", "bytes", "instructions", "integer"]
    for machine in MACHINES:
        header += [f"time for, {machine.name}", "of copy"]
    for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print("|", " | ".join(cells), "|")
    print(flush=True)


if __name__ == "__main__":
    main()
