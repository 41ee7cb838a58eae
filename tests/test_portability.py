"""The kernels give the same bits whatever compiles them and wherever they run: other compilers, other architectures.

A compiler that is not installed is skipped. For 64-bit ARM: `apt-get install g++-aarch64-linux-gnu qemu-user`.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "tests/portability/bits.cpp", *sorted((ROOT / "csrc/cpu").glob("kernels*.cpp"))]
# Those of the build, in the oldest standard that it uses.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
X86 = platform.machine() == "x86_64"

TARGETS = {
    "g++": (["g++"], []),
    "g++ -O0": (["g++", "-O0"], []),
    "clang++": (["clang++"], []),
    "aarch64": (["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64"]),
}

# For what the rest of the suite proves right. A change of the formula's arithmetic changes it, and is then a change of
# every user's results.
EXPECTED = "95d9ce71f51510a6"


@functools.cache
def build(target: str, folder: Path) -> list[str]:
    compiler, emulator = TARGETS[target]
    for program in (compiler[0], *emulator):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    binary = folder / target.replace(" ", "_")
    flags = [flag for flag in FLAGS if not ("-O0" in compiler and flag == "-O3")]
    subprocess.run([*compiler, *flags, f"-I{ROOT / 'csrc'}", *map(str, SOURCES), "-o", str(binary)], check=True)
    return [*emulator, str(binary)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bits")


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("target", TARGETS)
def test_same_bits(target, capability, folder):
    if capability != "DEFAULT" and (target == "aarch64" or not X86):
        pytest.skip("an instruction set of x86-64")
    command = build(target, folder)
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "MAXVA_CPU_CAPABILITY": capability}
    ).stdout.split()
    if output[0] != capability:
        pytest.skip(f"this machine has no {capability}")
    assert output[1] == EXPECTED
