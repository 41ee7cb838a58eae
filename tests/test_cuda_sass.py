"""The machine code of the CUDA kernels, as ptxas makes it for each architecture: what a GPU would execute.

Needs nvcc, and cuobjdump, which the CUDA toolkit has and Triton brings along.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from simulated_cuda import CSRC, NVCC_FLAGS, needs_nvcc

SOURCES = ("step_float", "step_bfloat16", "step_half", "step_double", "grad_norm")
ARCHS = ("sm_80", "sm_90", "sm_100")
# One machine language with one of the above, or older: for these the kernels that people use most.
OTHER_ARCHS = ("sm_75", "sm_86", "sm_89", "sm_120")
OTHER_SOURCES = ("step_float", "step_bfloat16")

# Of a thread. A multiprocessor has 65,536, for three blocks of 256 threads, or two where an operand is not float32.
REGISTERS = {"step_kernel float32": 80, "step_kernel": 128, "norm_chunks_kernel": 96, "norm_total_kernel": 64}

# For one float32 element, the most. At 3.35 TB/s and 44 bytes an element, an H100 has time for some 390: it has 132
# multiprocessors of 128 lanes and runs at 1.755 GHz.
INSTRUCTIONS = 160


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


pytestmark = [needs_nvcc, pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")]


@dataclass
class Code:
    """One kernel's machine code."""

    name: str
    registers: int
    stack: int
    opcodes: list[str]

    def count(self, *patterns: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes for pattern in patterns)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _compile(source: str, arch: str, folder: Path) -> list[Code]:
    cubin = folder / f"{source}.{arch}.cubin"
    _run("nvcc", *NVCC_FLAGS, f"-arch={arch}", "-cubin", str(CSRC / "cuda" / f"{source}.cu"), "-o", str(cubin))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", _run(cuobjdump(), "-res-usage", str(cubin)))
    sass = _run(cuobjdump(), "-sass", str(cubin))
    opcodes = {}
    for part in sass.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        opcodes[name.strip()] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", body)
    plain = _run("c++filt", *(name for name, _, _ in usage)).splitlines()
    return [
        Code(re.sub(r"^void maxva::cuda::|\(.*\)$|maxva::", "", cpp.replace("(maxva::Algorithm)", "")), int(registers),
             int(stack), opcodes[name])
        for (name, registers, stack), cpp in zip(usage, plain, strict=True)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(architecture, kernel) for all kernels."""
    folder = tmp_path_factory.mktemp("sass")
    jobs = [(source, arch) for arch in ARCHS for source in SOURCES]
    jobs += [(source, arch) for arch in OTHER_ARCHS for source in OTHER_SOURCES]
    with ThreadPoolExecutor(2) as pool:
        codes = pool.map(lambda job: [(job[1], code) for code in _compile(*job, folder)], jobs)
        return [pair for some in codes for pair in some]


def test_every_kernel_is_there(compiled):
    """Guards the parsing that the other tests rest on."""
    names = Counter(arch for arch, code in compiled)
    assert all(names[arch] == 20 + 7 + 2 for arch in ARCHS), names
    assert all(names[arch] == 12 for arch in OTHER_ARCHS), names
    assert all(len(code.opcodes) > 100 and code.count("EXIT") for _, code in compiled)


def test_no_local_memory(compiled):
    """Guards against spilled registers and arrays that the compiler could not keep in registers."""
    for arch, code in compiled:
        assert code.stack == 0, (arch, code.name, code.stack)
        assert code.count(r"LDL", r"STL") == 0, (arch, code.name)


def test_registers(compiled):
    """Guards the number of threads that a multiprocessor holds."""
    for arch, code in compiled:
        kind = code.name.split("<")[0]
        budget = REGISTERS[
            kind + " float32" if re.fullmatch(r"step_kernel<[01], float, float, float>", code.name) else kind
        ]
        assert code.registers <= budget, (arch, code.name, code.registers)


def test_accesses_are_128_bits_wide(compiled):
    """Guards against a body that the compiler cut in narrower loads or stores: each operand, once in each slice of
    float32 state, must be a 128-bit access, and all accesses must be to global memory by name."""
    for arch, code in compiled:
        assert code.count(r"LD\.", r"ST\.", r"LD$", r"ST$") == 0, f"{arch} {code.name}: generic accesses"
        if not code.name.startswith("step_kernel"):
            continue
        _, arithmetic, param, grad = re.findall(r"\w+", code.name.split("<")[1])[:4]
        size = {"float": 4, "double": 8, "Half": 2, "BFloat16": 2}
        width = 16 // min(size[param], size[grad])
        state = 5 * width * size[arithmetic] // 16  # with AMSGrad
        in_out = width * size[param] // 16
        assert code.count(r"LDG\.E.*\.128") >= state + in_out + width * size[grad] // 16, (arch, code.name)
        assert code.count(r"STG\.E.*\.128") >= state + in_out, (arch, code.name)


def test_float64_only_where_it_is_asked_for(compiled):
    """Guards against a double constant or conversion, which consumer cards execute at 1/64 of the speed."""
    for arch, code in compiled:
        double = code.count(
            r"D(ADD|MUL|FMA|SETP|MNMX)", r"F2F\.F(32\.F64|64\.F32)", r"I2F\.F64", r"F2I.*F64", r"MUFU.*64H"
        )
        assert (double > 0) == ("double" in code.name), (arch, code.name, double)


def test_no_fused_multiply_add_of_ours(compiled):
    """Guards the same bits everywhere: -fmad=false must hold. What FFMA there is belongs to divisions and roots, whose
    sequences round correctly: at most 5 + 5 for each of a step's 4 reciprocals and square roots, and in their slow
    paths, which are shared."""
    for arch, code in compiled:
        if code.name.startswith("step_kernel") and "double" not in code.name:
            approximations = code.count(r"MUFU\.(RCP|RSQ)")
            assert code.count(r"FFMA") <= 6 * approximations + 12, (arch, code.name)


def test_instructions_for_an_element(compiled):
    """Guards the step against becoming bound by instructions: those between a float32 kernel's last load of a packet
    and its first store of one, which are all of the update of four elements (and some narrow loads, depending on the
    architecture), without the slow paths of divisions and roots."""
    for arch, code in compiled:
        if re.match(r"step_kernel<[01], float, float, float>", code.name):
            last_load = max(i for i, opcode in enumerate(code.opcodes) if re.match(r"LDG\.E.*\.128", opcode))
            first_store = min(i for i, opcode in enumerate(code.opcodes) if re.match(r"STG\.E.*\.128", opcode))
            assert 50 < (first_store - last_load) / 4 <= INSTRUCTIONS, (arch, code.name, first_store - last_load)
