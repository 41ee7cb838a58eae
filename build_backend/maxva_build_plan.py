"""Decides which compiled modules a build makes, and why not the others.

`plan()` is a pure function from what was asked (`requested_mode`) and what the machine has (`Facts`) to a `Plan`, so
that every case can be tested on any machine. `gather_facts()` is the only part that looks around.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

MODES = ("auto", "cuda", "cpu", "python")
MIN_TORCH = (2, 10)
MIN_NVCC = (12, 1)
CPU_SOURCES = ("csrc/*.cpp", "csrc/cpu/*.cpp")
CUDA_SOURCES = ("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
HEADERS = ("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.inc")


class BuildError(SystemExit):
    """What was asked for cannot be built. Exits with the message alone: no traceback between a user and the advice."""

    def __init__(self, message: str):
        super().__init__(f"\nmaxva-kernels: {message}\n")


@dataclass(frozen=True)
class Facts:
    """What the machine has. Where something is missing, its `no_*` says what, and mostly how to get it."""

    torch: str | None = None  # torch.__version__
    torch_cuda: str | None = None  # torch.version.cuda
    no_torch: str | None = None
    no_compiler: str | None = None
    cuda_home: str | None = None
    nvcc: tuple[int, int] | None = None  # release of the nvcc in cuda_home
    no_nvcc: str | None = None  # counts where `nvcc` is None
    gpu: bool = False  # torch sees a GPU


@dataclass(frozen=True)
class Plan:
    """What is built; `no_cpu` and `no_cuda` say why a module is not, or are None where it is."""

    no_cpu: str | None
    no_cuda: str | None
    archs: str | None = None  # value for TORCH_CUDA_ARCH_LIST; None leaves the choice to torch

    def record(self, version: str, facts: Facts) -> dict[str, object]:
        """What `python -m maxva_kernels` will show: pip hides the output of a build that succeeds."""

        def built(reason: str | None) -> dict[str, object]:
            return {"built": True} if reason is None else {"built": False, "reason": reason}

        record: dict[str, object] = {
            "version": version,
            "cpu": built(self.no_cpu),
            "cuda": built(self.no_cuda),
            "torch": None if self.no_cpu else facts.torch,
        }
        if self.no_cuda is None:
            record |= {"cuda_home": facts.cuda_home, "archs": self.archs or "the GPUs seen at build time"}
        return record


def requested_mode(env: Mapping[str, str]) -> str:
    """MAXVA_BUILD, with FORCE_CUDA=1 as another spelling of `cuda`."""
    mode = env.get("MAXVA_BUILD", "").strip().lower() or "auto"
    if mode not in MODES:
        raise BuildError(f"MAXVA_BUILD={env['MAXVA_BUILD']!r} is not known: use {', '.join(MODES)}.")
    if env.get("FORCE_CUDA", "").strip().lower() not in ("1", "on", "true", "yes", "y"):
        return mode
    if mode in ("cpu", "python"):
        raise BuildError(f"FORCE_CUDA={env['FORCE_CUDA']} contradicts MAXVA_BUILD={mode}: unset one of them.")
    return "cuda"


def plan(mode: str, facts: Facts, arch_list: str | None = None) -> Plan:
    """Decide what to build. `auto` builds what can be built; a mode that names a module raises where it cannot be.

    `arch_list` is the user's TORCH_CUDA_ARCH_LIST.
    """
    if mode == "python":
        reason = "the build was asked for Python code only (MAXVA_BUILD=python)"
        return Plan(no_cpu=reason, no_cuda=reason)

    no_cpu = facts.no_torch or facts.no_compiler
    no_cuda = "the build was asked for the CPU kernel only (MAXVA_BUILD=cpu)" if mode == "cpu" else _no_cuda(facts)

    if mode == "cuda" and no_cuda:
        raise BuildError(
            f"the CUDA kernels were asked for (MAXVA_BUILD=cuda or FORCE_CUDA=1) but cannot be built: {no_cuda}.\n"
            "MAXVA_BUILD=auto, the default, builds what can be built."
        )
    if mode == "cpu" and no_cpu:
        raise BuildError(
            f"the CPU kernel was asked for (MAXVA_BUILD=cpu) but cannot be built: {no_cpu}.\n"
            "MAXVA_BUILD=python installs without compiled kernels."
        )
    if no_cuda:
        return Plan(no_cpu, no_cuda)
    assert facts.nvcc is not None
    return Plan(no_cpu, None, arch_list or (None if facts.gpu else default_archs(facts.nvcc)))


def _no_cuda(facts: Facts) -> str | None:
    """The first thing that stands between this machine and the CUDA kernels."""
    if facts.no_torch or facts.no_compiler:
        return facts.no_torch or facts.no_compiler
    if facts.torch_cuda is None:
        return f"torch {facts.torch} is not a CUDA build: install one as pytorch.org/get-started says"
    if facts.nvcc is None:
        return f"{facts.no_nvcc}: install the CUDA toolkit {facts.torch_cuda} and set CUDA_HOME to it"
    if facts.nvcc < MIN_NVCC:  # the first whose kernels take more than 4 KB of arguments
        return f"nvcc {'.'.join(map(str, facts.nvcc))} in {facts.cuda_home} is too old: install CUDA 12.1 or newer"
    if facts.nvcc[0] != int(facts.torch_cuda.split(".")[0]):
        nvcc = ".".join(map(str, facts.nvcc))
        return (
            f"nvcc {nvcc} in {facts.cuda_home} cannot build for torch {facts.torch}, which uses CUDA "
            f"{facts.torch_cuda}: install that CUDA toolkit (the major version counts) and set CUDA_HOME to it"
        )
    return None


def default_archs(nvcc: tuple[int, int]) -> str:
    """For a build machine without a GPU: the GPUs people train on, and PTX for those to come."""
    return "7.5;8.0;9.0;10.0;12.0+PTX" if nvcc >= (12, 8) else "7.5;8.0;9.0+PTX"


def gather_facts(env: Mapping[str, str]) -> Facts:
    """Look at the machine. Imports torch, and runs nvcc where torch was built for CUDA."""
    facts = Facts(no_compiler=no_compiler(env))
    try:
        import torch

        found = {"torch": str(torch.__version__), "torch_cuda": torch.version.cuda, "gpu": torch.cuda.is_available()}
    except Exception as error:  # a torch that is broken, or a folder of that name, fails in its own way
        return replace(facts, no_torch=f"torch cannot be imported by the build ({error}): install torch>=2.10 first")
    facts = replace(facts, **found)
    if parse_version(torch.__version__) < MIN_TORCH:
        facts = replace(facts, no_torch=f"torch {torch.__version__} is too old: install torch>=2.10")
    if torch.version.cuda is None:
        return facts
    home, no_nvcc = find_cuda_home(env)
    if home is None:
        return replace(facts, no_nvcc=no_nvcc)
    return replace(facts, cuda_home=str(home), nvcc=nvcc_release(home), no_nvcc=f"{home}/bin/nvcc does not run")


def parse_version(version: str) -> tuple[int, int]:
    """'2.10.0+cu130' -> (2, 10); (0, 0) for what is no version."""
    major, minor = [*re.findall(r"\d+", version), "0", "0"][:2]
    return int(major), int(minor)


def sources(root: Path, patterns: tuple[str, ...]) -> list[str]:
    """The files under `root` that match, relative to it and sorted, so that every machine builds the same."""
    return sorted(path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern))


def module_sources(root: Path, patterns: tuple[str, ...]) -> list[str]:
    """The sources of one compiled module. Each needs an object file of its own: ops.cpp and ops.cu would share one."""
    files = sources(root, patterns)
    if len({Path(file).with_suffix("") for file in files}) < len(files):
        raise BuildError(f"two of these sources differ only in their suffix, rename one: {', '.join(files)}.")
    return files


def no_compiler(env: Mapping[str, str]) -> str | None:
    """Why C++ cannot be compiled here, or None where it can."""
    if os.name == "nt":
        return "the compiled kernels are not built on Windows yet"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "the compiled kernels need Python's stable ABI, which free-threaded Python does not have"
    try:
        command = [*shlex.split(env.get("CXX", "")), "c++"][0]
    except ValueError as error:
        return f"CXX={env['CXX']} cannot be understood ({error}): set it to a C++ compiler"
    if shutil.which(command, path=env.get("PATH")) is None:
        return f"no C++ compiler was found ({command}): install g++ or clang++, or set CXX"
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        return f"Python.h is not in {headers}: install Python's headers (python3-dev or python3-devel)"
    return None


def find_cuda_home(env: Mapping[str, str]) -> tuple[Path | None, str | None]:
    """The root of the CUDA toolkit, or why there is none.

    An nvcc on PATH may be a script around the real one, so its own word is taken for where the toolkit lies.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if value := env.get(name):
            home = Path(value)
            return (home, None) if _has_nvcc(home) else (None, f"{name}={value} has no bin/nvcc")
    candidates = [Path("/usr/local/cuda")]
    if nvcc := shutil.which("nvcc", path=env.get("PATH")):
        dryrun = _run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull])
        if top := re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE):
            candidates.insert(0, Path(top[1].strip()).resolve())
        candidates.insert(1, Path(nvcc).resolve().parent.parent)
    for home in candidates:
        if _has_nvcc(home):
            return home, None
    return None, "no nvcc was found (looked at CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"


def nvcc_release(home: Path) -> tuple[int, int] | None:
    """(13, 0) for CUDA 13.0."""
    release = re.search(r"release (\d+)\.(\d+)", _run([str(home / "bin" / "nvcc"), "--version"]))
    return (int(release[1]), int(release[2])) if release else None


def _has_nvcc(home: Path) -> bool:
    return (home / "bin" / "nvcc").is_file()


def _run(command: list[str]) -> str:
    """What the command prints, on either stream; nothing where it cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout + result.stderr
