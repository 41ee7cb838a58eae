"""The compiled modules as setuptools extensions, and the two setuptools commands that build and record them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from maxva_build_plan import CPU_SOURCES, CUDA_SOURCES, HEADERS, BuildError, Facts, Plan, module_sources, sources
from setuptools import Command, Extension
from setuptools.command.build_py import build_py

PACKAGE = "maxva_kernels"
RECORD = "_build.json"

# The oldest torch whose stable ABI the modules use: one wheel serves it and every later one.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# IEEE arithmetic as written, without contraction: the same bits on every backend. Dropping errno and traps lets the
# compiler vectorise square roots and selects; it changes no result. Never -ffast-math, never -march=native.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    TARGET,
]
# Relaxed constexpr: the formula uses std::numeric_limits in device code.
NVCC_FLAGS = ["-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden,-ffp-contract=off"]


def extensions(root: Path, plan: Plan, facts: Facts) -> list[Extension]:
    """The compiled modules of `plan`."""
    if plan.no_cpu and plan.no_cuda:
        return []
    if plan.no_cuda is None:  # torch reads these two when its module is imported, so they come first
        os.environ["CUDA_HOME"] = str(facts.cuda_home)
        if plan.archs:
            os.environ["TORCH_CUDA_ARCH_LIST"] = plan.archs
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    modules = [_extension(CppExtension, "_C", root, CPU_SOURCES, {"cxx": [*CXX_FLAGS]})]
    if plan.no_cuda is None:
        flags = {"cxx": [*CXX_FLAGS], "nvcc": [*NVCC_FLAGS]}
        modules.append(_extension(CUDAExtension, "_C_cuda", root, CUDA_SOURCES, flags))
    return modules


def _extension(
    make: Callable[..., Extension], name: str, root: Path, patterns: tuple[str, ...], flags: dict[str, list[str]]
) -> Extension:
    return make(
        f"{PACKAGE}.{name}",
        module_sources(root, patterns),
        include_dirs=[str(root / "csrc")],
        depends=sources(root, HEADERS),
        extra_compile_args=flags,
        py_limited_api=True,
    )


def commands(root: Path, plan: Plan, facts: Facts) -> dict[str, type[Command]]:
    """The setuptools commands that build what `plan` says and leave a record of it in the package."""

    class BuildPy(build_py):
        def run(self) -> None:
            package = (root if self.editable_mode else Path(self.build_lib)) / PACKAGE
            # What an earlier build with other switches left behind must not get into this one.
            if self.editable_mode:
                for left in (*package.glob("_C*.so"), package / RECORD):
                    left.unlink(missing_ok=True)
            else:
                shutil.rmtree(package, ignore_errors=True)
            super().run()
            record = plan.record(self.distribution.get_version(), facts)
            (package / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    if plan.no_cpu and plan.no_cuda:
        return {"build_py": BuildPy}
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise BuildError(
                    f"the kernels did not compile: {error}\n"
                    "The compiler's own messages stand above. MAXVA_BUILD=cpu leaves the CUDA kernels out, "
                    "MAXVA_BUILD=python installs without compiled kernels."
                ) from error

    return {"build_py": BuildPy, "build_ext": BuildExt}
