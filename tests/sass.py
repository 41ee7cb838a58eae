"""The machine code of compiled kernels, read by cuobjdump, which the CUDA toolkit has and Triton brings along."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@functools.cache
def cuobjdump() -> str | None:
    """The program, from the toolkit or from Triton."""
    if path := shutil.which("cuobjdump"):
        return path
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder, "backends", "nvidia", "bin", "cuobjdump")
        if path.is_file():
            return str(path)
    return None


needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")


@dataclass
class Code:
    """One kernel's machine code."""

    name: str
    registers: int
    stack: int
    opcodes: list[str]
    targets: list[int | None]  # for each instruction the index that it may branch to,
    conditional: list[bool]  # and whether it may not

    def count(self, *patterns: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes for pattern in patterns)

    @property
    def double(self) -> int:
        """How many instructions compute in float64 or convert from or to it."""
        arithmetic = (r"D(ADD|MUL|FMA|SETP|MNMX)", r"MUFU.*64H")
        return self.count(*arithmetic, r"F2F\.F(32\.F64|64\.F32)", r"I2F\.F64", r"F2I.*F64")

    def turn(self) -> tuple[int, int]:
        """The fewest and the most instructions of a turn of the step's loop, over all ways through it that touch whole
        packets only and nothing that is for the rare operands of divisions and roots, or for state that is a NaN.

        Those are known by what the compiler puts beside its own divisions and roots: a check, or a call; and state that
        may be a NaN by the comparisons with itself, of at least two numbers in four lanes.
        """
        ends = {i + 1 for i, opcode in enumerate(self.opcodes) if self.targets[i] is not None or opcode == "EXIT"}
        bounds = sorted(ends | {to for to in self.targets if to is not None} | {0, len(self.opcodes)})
        block_end = dict(itertools.pairwise(bounds))
        wide = [i for i, opcode in enumerate(self.opcodes) if re.match(r"(LDG|STG).*\.128", opcode)]
        back = next(
            i for i, to in enumerate(self.targets) if to is not None and i > wide[-1] and to <= wide[0]
        )  # the branch at the loop's end

        def ops(begin: int) -> list[str]:
            return self.opcodes[begin : block_end.get(begin, begin)]

        def after(begin: int) -> list[int]:
            last = block_end[begin] - 1
            to = self.targets[last]
            return [last + 1, *([] if to is None else [to])] if to is None or self.conditional[last] else [to]

        def is_left_out(begin: int) -> bool:
            its = ops(begin)
            narrow = any(re.match(r"(LDG|STG)(?!.*\.128)", op) for op in its)
            of_root = sum(op.startswith("MUFU.RSQ") for op in its) == 1
            called = of_root and any(op.startswith("CALL") for following in after(begin) for op in ops(following))
            asks_for_nan = sum(op.startswith("FSETP.NAN") for op in its) >= 8
            return narrow or called or asks_for_nan or any(op.startswith(("FCHK", "CALL", "EXIT")) for op in its)

        known: dict[int, tuple[int, int] | None] = {}

        def rest(begin: int) -> tuple[int, int] | None:
            if begin not in known:
                known[begin] = None  # while it is looked for: who comes here again has gone in a circle
                count = block_end[begin] - begin
                if block_end[begin] - 1 == back:  # where before compute capability 9.0 the loop is left by a call
                    known[begin] = count, count
                elif not is_left_out(begin):
                    ways = [way for way in map(rest, after(begin)) if way is not None]
                    if ways:
                        known[begin] = count + min(way[0] for way in ways), count + max(way[1] for way in ways)
            return known[begin]

        start = self.targets[back]
        assert start is not None
        found = rest(start)
        assert found is not None
        return found

    @property
    def uses_local_memory(self) -> bool:
        return self.stack > 0 or self.count(r"LDL", r"STL") > 0


def run(*command: str) -> str:
    """A command's output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(cubin: Path) -> list[Code]:
    """The kernels of a file that ptxas made, under their mangled names."""
    program = cuobjdump()
    assert program is not None
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", run(program, "-res-usage", str(cubin)))
    used = {name: (int(registers), int(stack)) for name, registers, stack in usage}
    codes = []
    for part in run(program, "-sass", str(cubin)).split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", body)
        place = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
        targets: list[int | None] = []
        conditional = []
        for _, predicate, opcode, operands in lines:
            branch = re.search(r"(0x[0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
            targets.append(place[int(branch[1], 16)] if branch else None)
            conditional.append(bool(predicate) or "," in operands or opcode != "BRA")  # BRA.DIV: where threads diverge
        codes.append(Code(name.strip(), *used[name.strip()], [line[2] for line in lines], targets, conditional))
    return codes
