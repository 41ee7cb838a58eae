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

    def count(self, *patterns: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes for pattern in patterns)

    @property
    def double(self) -> int:
        """How many instructions compute in float64 or convert from or to it."""
        arithmetic = (r"D(ADD|MUL|FMA|SETP|MNMX)", r"MUFU.*64H")
        return self.count(*arithmetic, r"F2F\.F(32\.F64|64\.F32)", r"I2F\.F64", r"F2I.*F64")

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
    opcodes = {}
    for part in run(program, "-sass", str(cubin)).split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        opcodes[name.strip()] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", body)
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", run(program, "-res-usage", str(cubin)))
    return [Code(name, int(registers), int(stack), opcodes[name]) for name, registers, stack in usage]
