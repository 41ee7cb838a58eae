"""The CUDA backend without a GPU: its host code as it is, its kernels as nvcc compiled them, interpreted by ptxsim.

`SimulatedLauncher` stands in for the compiled module `_C_cuda`. It fills the arguments of a launch by the same C++ code
(csrc/cuda/arguments.cpp), makes the tensors that the table and the arguments point to accessible to a simulated device,
and nothing else, and runs the kernel's PTX over them. Tensors are CPU tensors: to the simulator their memory is the
device's.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from ptxsim import Module
from simulated import Simulation, install_launcher, norm_ranges, step_ranges, total_ranges

from maxva_kernels.backends import cuda

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{CSRC}"]
ARCH = "sm_80"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
needs_compilers = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("g++") is None, reason="nvcc or g++ is not installed"
)

TYPE_NAMES = {0: "float", 1: "double", 2: "maxva::Half", 3: "maxva::BFloat16"}


@functools.cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="maxva_ptx_")
    _folder.keep = folder  # type: ignore[attr-defined]  # removed when the process ends
    return Path(folder.name)


@functools.cache
def ptx(source: str, arch: str = ARCH) -> str:
    """The PTX of csrc/cuda/{source}.cu."""
    out = _folder() / f"{source}.{arch}.ptx"
    command = ["nvcc", *NVCC_FLAGS, f"-arch={arch}", "-ptx", str(CSRC / "cuda" / f"{source}.cu"), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out.read_text()


@functools.cache
def module(source: str, arch: str = ARCH) -> tuple[Module, dict[str, str]]:
    """The parsed PTX, and its entries by their C++ names: "step_kernel<(maxva::Algorithm)0, float, float, float>"."""
    parsed = Module(ptx(source, arch))
    mangled = parsed.entries()
    plain = subprocess.run(["c++filt", *mangled], check=True, capture_output=True, text=True).stdout.splitlines()
    names = [re.sub(r"^void maxva::cuda::|(?<=>)\(.*$", "", name) for name in plain]
    return parsed, dict(zip(names, mangled, strict=True))


def step_entry(param: int, grad: int, state: int, laprop: bool, statistics: bool = False) -> tuple[str, str]:
    """The source and the C++ name of the step kernel for these dtype codes."""
    source = {0: "step_float", 1: "step_double", 2: "step_half", 3: "step_bfloat16"}[param] + "_rounded" * (state == 3)
    arithmetic = "double" if param == 1 else "float"
    names = [f"(maxva::Algorithm){int(laprop)}", arithmetic, *(TYPE_NAMES[code] for code in (param, grad, state))]
    return source, f"step_kernel<{', '.join(names)}, {str(statistics).lower()}>"


class StepInput(ctypes.Structure):
    """csrc/cuda/arguments.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("param_dtype", "grad_dtype", "state_dtype")),
        *((name, ctypes.c_uint64) for name in ("rows", "chunk_rows")),
        ("chunks", ctypes.c_int64),
        *((name, ctypes.c_uint64) for name in ("ticket", "grad_scale", "found_inf", "grad_norm")),
        *((name, ctypes.c_uint64) for name in ("trust_ratios", "statistics", "saturation", "squares", "norms")),
        ("max_grad_norm", ctypes.c_double),
        *(("groups", ctypes.c_char_p), ("group_count", ctypes.c_int64)),
        *(("grads", ctypes.c_char_p), ("tensors", ctypes.c_int64)),
    ]


class NormInput(ctypes.Structure):
    """csrc/cuda/arguments.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("rows", "chunk_rows")),
        ("chunks", ctypes.c_int64),
        ("sums", ctypes.c_uint64),
        *(("grads", ctypes.c_char_p), ("tensors", ctypes.c_int64)),
    ]


@functools.cache
def bridge() -> ctypes.CDLL:
    """simulated_cuda_bridge.cpp, compiled."""
    out = _folder() / "bridge.so"
    sources = [Path(__file__).with_name("simulated_cuda_bridge.cpp"), CSRC / "cuda" / "arguments.cpp"]
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def constant(name: str) -> int:
    """A constant of csrc/cuda/launch.h, under its name in simulated_cuda_bridge.cpp."""
    return ctypes.c_int64.in_dll(bridge(), name).value


def _stack_memory(nbytes: int) -> ctypes.Array:
    """A launch before it is filled: what is not filled stays garbage, as in the compiled module."""
    return ctypes.create_string_buffer(b"\xa5" * nbytes, nbytes)


class SimulatedLauncher(Simulation):
    """Has the functions of `_C_cuda`."""

    backend = "cuda"
    GRAPHS = True

    def __init__(self, *, arch: str = ARCH, **options):
        super().__init__(**options)
        self.MAX_TENSORS, self.MAX_GROUPS = constant("max_tensors"), constant("max_groups")
        self.STEP_CHUNK, self.NORM_CHUNK = constant("step_chunk"), constant("norm_chunk")
        self.arch = arch
        self.replace_module: dict[str, Module] = {}  # by source: a mutant in its place

    def probe(self, device: int) -> None:
        pass

    def step(self, launch):
        dtypes = (launch.param_dtype, launch.grad_dtype, launch.state_dtype)
        entry = step_entry(*dtypes, launch.laprop, launch.statistics != 0)
        self._run(*entry, launch.chunks, [self._fill(launch)], step_ranges(launch))

    def update_norms(self, launch):
        arithmetic, algorithm = "double" if launch.param_dtype == 1 else "float", int(launch.laprop)
        entry = f"update_chunks_kernel<(maxva::Algorithm){algorithm}, {arithmetic}>"
        given = launch.chunks, [self._fill(launch)], step_ranges(launch)
        self._run("update_norm", entry, *given)
        self._run("update_norm", f"update_total_kernel<{arithmetic}>", *given)

    def _fill(self, launch):
        tensors, group_count = len(launch.grads) // 8, len(launch.groups) // constant("packed_group_bytes")
        given = StepInput(
            launch.param_dtype, launch.grad_dtype, launch.state_dtype,
            launch.rows, launch.chunk_rows, launch.chunks, launch.ticket,
            launch.grad_scale, launch.found_inf, launch.grad_norm,
            launch.trust_ratios, launch.statistics, launch.saturation, launch.squares, launch.norms,
            launch.max_grad_norm,
            launch.groups, group_count, launch.grads, tensors,
        )  # fmt: skip
        twice = launch.param_dtype == 1
        filled = _stack_memory(constant("step_launch_double_bytes" if twice else "step_launch_bytes"))
        bridge().fill_step(filled, ctypes.c_bool(twice), ctypes.byref(given))
        return filled.raw

    def norm_chunks(self, launch):
        tensors = len(launch.grads) // 8
        given = NormInput(launch.rows, launch.chunk_rows, launch.chunks, launch.sums, launch.grads, tensors)
        filled = _stack_memory(constant("norm_launch_bytes"))
        bridge().fill_norm(filled, ctypes.c_bool(launch.double), ctypes.byref(given))
        entry = f"norm_chunks_kernel<{'double' if launch.double else 'float'}, {TYPE_NAMES[launch.grad_dtype]}>"
        ranges = norm_ranges(launch, self.NORM_CHUNK)
        self._run("grad_norm", entry, launch.chunks, [filled.raw], ranges)

    def norm_total(self, launch):
        entry = f"norm_total_kernel<{'double' if launch.double else 'float'}>"
        arguments = [launch.sums, launch.chunks, launch.norm]
        self._run("grad_norm", entry, 1, arguments, total_ranges(launch))

    def _run(self, source, entry, chunks, arguments, ranges):
        """A block has as many threads as it may have: kernels are compiled for the number that launches give them."""
        parsed, entries = module(source, self.arch)
        parsed = self.replace_module.get(source, parsed)
        threads = parsed.kernel(entries[entry]).maximum_block[0]
        self.simulate(entry, parsed, entries[entry], chunks, threads, arguments, ranges, racecheck=True)


def install(launcher: SimulatedLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the backend "cuda" drive CPU tensors through this launcher."""
    install_launcher(cuda, launcher, monkeypatch)
