"""Quotients and roots from the hardware's approximations: right in every case, but for those that a note names."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sass import needs_cuobjdump, read
from simulated_cuda import CSRC, NVCC_FLAGS, needs_nvcc

SOURCE = Path(__file__).parent / "refine" / "refine.cpp"

# csrc/cuda/refine.h, Note [Short chains], as 24-bit integers: what is off by a unit, and the approximation's error.
EXCEPTIONS = [
    "quotient 8388608 16777215, reciprocal -1",
    "root 15635314, reciprocal +1",
    "root 33038996, reciprocal +1",
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_all_hard_cases(tmp_path):
    """Guards against a result that is off by a unit in the last place, and operands let through that are too large or
    too small: such an error would be one in millions, and no other test would see it."""
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    flags += ["-mfma"] if platform.machine() == "x86_64" and " fma " in Path("/proc/cpuinfo").read_text() else []
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(tmp_path / "refine")], check=True)
    output = subprocess.run([tmp_path / "refine"], check=True, capture_output=True, text=True).stdout
    *wrong, cases = output.splitlines()
    assert wrong == EXCEPTIONS
    quotients, roots, specials = map(int, cases.split()[1:])
    assert quotients > 40e6
    assert roots > 50e6
    assert specials > 5e5


KERNELS = """
__global__ void quotient(float* x, const float* y) { *x = *x / *y; }
__global__ void root(float* x) { *x = sqrtf(*x); }
"""


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_compilers_chains(arch, tmp_path):
    """Guards the note's claim that the exceptions come out as in a division of the compiler's: by the same chains."""
    (tmp_path / "plain.cu").write_text(KERNELS)
    command = ["nvcc", *NVCC_FLAGS, f"-arch={arch}", "-cubin", str(tmp_path / "plain.cu")]
    subprocess.run([*command, "-o", str(tmp_path / "plain.cubin")], check=True)
    for code in read(tmp_path / "plain.cubin"):
        is_root = "root" in code.name
        approximation = "MUFU.RSQ" if is_root else "MUFU.RCP"
        chain = ["FMUL"] * 2 + ["FFMA"] * 2 if is_root else ["FFMA"] * 5
        end = next(i for i, opcode in enumerate(code.opcodes) if opcode == "EXIT")
        operations = [re.split(r"\.", opcode)[0] for opcode in code.opcodes[:end]]
        assert code.opcodes.index(approximation) < end
        assert [operation for operation in operations if operation in ("FFMA", "FMUL", "FADD")] == chain, operations
