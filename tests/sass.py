"""The machine code of compiled kernels, read by cuobjdump, which the CUDA toolkit has and Triton brings along."""

from __future__ import annotations

import functools
import importlib.util
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

    def paths(self) -> list[int]:
        """How many instructions one turn of the step's loop has, ascending, on each way through it: for whole packets
        only, never through what divisions and roots do for rare operands, and in modes where the code falls through.

        A part of the code is for rare operands if each of its approximations has a call beside it.
        """
        first_load = next(i for i, opcode in enumerate(self.opcodes) if re.match(r"LDG.*\.128", opcode))
        last_store = max(i for i, opcode in enumerate(self.opcodes) if re.match(r"STG.*\.128", opcode))
        end = next(i for i, to in enumerate(self.targets) if i > last_store and to is not None and to <= first_load)

        def calls(begin: int, end: int) -> tuple[int, int]:
            part = self.opcodes[begin:end]
            return sum(op.startswith("CALL") for op in part), sum(
                op.startswith(("MUFU.RCP", "MUFU.RSQ")) for op in part
            )

        def walk(i: int) -> set[int]:
            count = 0
            while i < end:
                count += 1
                to = self.targets[i]
                if to is None or to <= i:
                    i += 1
                    continue
                called, approximations = calls(i + 1, to)
                accesses = [op for op in self.opcodes[i + 1 : to] if op.startswith(("LDG", "STG"))]
                if (
                    not self.conditional[i]
                    or called >= max(1, approximations)
                    or (accesses and ".128" not in accesses[0])
                ):
                    i = to
                elif called:
                    return {count + rest for way in (i + 1, to) for rest in walk(way)}
                else:
                    i += 1
            return {count + 1}

        start = self.targets[end]
        assert start is not None
        return sorted(walk(start))

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
            conditional.append(bool(predicate) or operands.count(",") > 0)
        codes.append(Code(name.strip(), *used[name.strip()], [line[2] for line in lines], targets, conditional))
    return codes
