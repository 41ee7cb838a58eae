"""The CUDA backend without a GPU: its host code as it is, its kernels as nvcc compiled them, interpreted by ptxsim.

`SimulatedLauncher` stands in for the compiled module `_C_cuda`. It fills the arguments of a launch by the same C++ code
(csrc/cuda/arguments.cpp), makes the tensors that the table and the arguments point to accessible to a simulated device,
and nothing else, and runs the kernel's PTX over them. Tensors are CPU tensors: to the simulator their memory is the
device's.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import set_grads, states
from ptxsim import Buffer, Device, Module, Stats

from maxva_kernels import gpu
from maxva_kernels.backends import cuda, registry
from maxva_kernels.tensor_table import NORM_COLUMNS, STEP_COLUMNS

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{CSRC}"]
ARCH = "sm_80"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
needs_compilers = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("g++") is None, reason="nvcc or g++ is not installed"
)

SIZES = {0: 4, 1: 8, 2: 2, 3: 2}  # bytes of a dtype, by its code (csrc/dtype.h)
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


def step_entry(param: int, grad: int, laprop: bool) -> tuple[str, str]:
    """The source and the C++ name of the step kernel for these dtype codes."""
    source = {0: "step_float", 1: "step_double", 2: "step_half", 3: "step_bfloat16"}[param]
    arithmetic = "double" if param == 1 else "float"
    names = ", ".join([f"(maxva::Algorithm){int(laprop)}", arithmetic, TYPE_NAMES[param], TYPE_NAMES[grad]])
    return source, f"step_kernel<{names}>"


class StepInput(ctypes.Structure):
    """csrc/cuda/arguments.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("rows", "chunk_rows")),
        ("chunks", ctypes.c_int64),
        *((name, ctypes.c_uint64) for name in ("ticket", "grad_scale", "found_inf", "grad_norm")),
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


def words(address: int, count: int, dtype: type = np.int64) -> np.ndarray:
    """Memory of this process as an array."""
    if count == 0:
        return np.zeros(0, dtype)
    return np.frombuffer((ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address), dtype)


def _stack_memory(nbytes: int) -> ctypes.Array:
    """A launch before it is filled: what is not filled stays garbage, as in the compiled module."""
    return ctypes.create_string_buffer(b"\xa5" * nbytes, nbytes)


@dataclass
class Launch:
    """A launch that has been made."""

    kernel: str
    stats: Stats
    buffers: dict[str, Buffer]

    def buffers_of(self, name: str) -> list[Buffer]:
        """The buffers "name0", "name1", ..."""
        return [buffer for key, buffer in self.buffers.items() if re.fullmatch(rf"{name}\d+", key)]

    def bytes_of(self, kind: str, name: str) -> int:
        """Bytes moved by "ld", "st" or "atom" to or from the buffers "name", "name0", "name1", ..."""
        moved = self.stats.buffer_bytes.items()
        return sum(count for (key, what), count in moved if what == kind and re.fullmatch(rf"{name}\d*", key))


class SimulatedLauncher:
    """Has the functions of `_C_cuda`."""

    def __init__(self, *, blocks: int = 3, arch: str = ARCH, track: bool = False, seed: int | None = None):
        self.MAX_TENSORS, self.MAX_GROUPS = constant("max_tensors"), constant("max_groups")
        self.STEP_CHUNK, self.NORM_CHUNK = constant("step_chunk"), constant("norm_chunk")
        self.blocks, self.arch, self.track, self.seed = blocks, arch, track, seed
        self.max_lanes = 1 << 15  # threads that run side by side; with those of one block, blocks run one by one
        self.max_steps = 50_000_000  # of what runs side by side, to end an endless loop
        self.launches: list[Launch] = []
        self.replace_module: dict[str, Module] = {}  # by source: a mutant in its place
        self.only: dict[str, tuple[int, int]] = {}  # by a buffer's name: the address and size of what there is of it

    def probe(self, device: int) -> None:
        pass

    def step(
        self, device, stream, param, grad, laprop, rows, chunk_rows, chunks, ticket, groups, grads,
        grad_scale, found_inf, grad_norm, max_grad_norm,
    ):  # fmt: skip
        tensors, group_count = len(grads) // 8, len(groups) // constant("packed_group_bytes")
        given = StepInput(
            rows, chunk_rows, chunks, ticket, grad_scale, found_inf, grad_norm, max_grad_norm,
            groups, group_count, grads, tensors,
        )  # fmt: skip
        twice = param == 1
        launch = _stack_memory(constant("step_launch_double_bytes" if twice else "step_launch_bytes"))
        bridge().fill_step(launch, ctypes.c_bool(twice), ctypes.byref(given))

        wide = 8 if twice else 4
        table = words(rows, tensors * len(STEP_COLUMNS)).reshape(tensors, len(STEP_COLUMNS))
        ranges = [
            ("rows", rows, table.nbytes),
            ("chunk_rows", chunk_rows, 4 * chunks),
            ("ticket", ticket, 4),
            *(("grad_scale", grad_scale, wide), ("found_inf", found_inf, wide), ("grad_norm", grad_norm, wide)),
        ]
        for i, (row, address) in enumerate(zip(table, np.frombuffer(grads, np.uint64), strict=True)):
            if address == 0:
                continue  # nothing of this tensor may be touched
            numel = int(row[STEP_COLUMNS.index("numel")])
            ranges.append((f"grad{i}", int(address), numel * SIZES[grad]))
            ranges.append((f"step{i}", int(row[STEP_COLUMNS.index("step")]), 8))
            ranges.append((f"param{i}", int(row[0]), numel * SIZES[param]))
            for name in ("exp_avg", "grad_mean", "grad_var", "weight_sum", "max_denom"):
                if row[STEP_COLUMNS.index(name)]:
                    ranges.append((f"{name}{i}", int(row[STEP_COLUMNS.index(name)]), numel * wide))
        rates = np.frombuffer(groups, np.uint64).reshape(group_count, -1)[:, 1]
        ranges += [(f"lr{g}", int(address), wide) for g, address in enumerate(rates)]
        self._run(*step_entry(param, grad, laprop), constant("step_threads"), chunks, [launch.raw], ranges)

    def norm_chunks(self, device, stream, grad, double, rows, chunk_rows, chunks, grads, sums):
        tensors = len(grads) // 8
        given = NormInput(rows, chunk_rows, chunks, sums, grads, tensors)
        launch = _stack_memory(constant("norm_launch_bytes"))
        bridge().fill_norm(launch, ctypes.c_bool(double), ctypes.byref(given))
        wide = 8 if double else 4
        table = words(rows, tensors * len(NORM_COLUMNS)).reshape(tensors, len(NORM_COLUMNS))
        ranges = [("rows", rows, table.nbytes), ("chunk_rows", chunk_rows, 4 * chunks)]
        for i, ((numel, _, first_sum), address) in enumerate(zip(table, np.frombuffer(grads, np.uint64), strict=True)):
            ranges.append((f"grad{i}", int(address), int(numel) * SIZES[grad]))
            count = -(-int(numel) // constant("norm_chunk"))
            ranges.append((f"sums{i}", sums + int(first_sum) * 3 * wide, count * 3 * wide))
        threads = constant("norm_lanes") * SIZES[grad] // 16
        entry = f"norm_chunks_kernel<{'double' if double else 'float'}, {TYPE_NAMES[grad]}>"
        self._run("grad_norm", entry, threads, chunks, [launch.raw], ranges)

    def norm_total(self, device, stream, double, sums, chunks, norm):
        wide = 8 if double else 4
        ranges = [("sums", sums, chunks * 3 * wide), ("norm", norm, wide)]
        name = "double" if double else "float"
        self._run("grad_norm", f"norm_total_kernel<{name}>", 1024, 1, [sums, chunks, norm], ranges)

    def _run(self, source, entry, threads, chunks, arguments, ranges):
        device, buffers, seen = Device(), {}, {}
        for name, address, nbytes in ranges:
            address, nbytes = self.only.get(name, (address, nbytes))
            if address == 0 or nbytes == 0:
                continue
            if (address, nbytes) not in seen:  # two groups may share a learning rate
                seen[address, nbytes] = device.map(address, nbytes, name)
            buffers[name] = seen[address, nbytes]
        parsed, entries = module(source, self.arch)
        parsed = self.replace_module.get(source, parsed)
        stats = parsed.launch(
            entries[entry],
            max(1, min(chunks, self.blocks)),
            threads,
            arguments,
            device,
            track=self.track,
            racecheck=True,
            seed=self.seed,
            max_lanes=self.max_lanes,
            max_steps=self.max_steps,
        )
        self.launches.append(Launch(entry, stats, buffers))


@pytest.fixture
def simulated(monkeypatch):
    """The backend "cuda" on CPU tensors, by simulation; gives its launcher."""
    launcher = SimulatedLauncher()
    install(launcher, monkeypatch)
    return launcher


def install(launcher: SimulatedLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the backend "cuda" drive CPU tensors through this launcher."""
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    monkeypatch.setattr(cuda, "_launcher", lambda: launcher)
    monkeypatch.setattr(gpu, "current_stream", lambda device: 0)
    monkeypatch.setattr(gpu, "is_capturing", lambda: False)
    monkeypatch.setattr(registry, "_selected", {})
    monkeypatch.setattr(gpu, "step_tables", type(gpu.step_tables)())
    monkeypatch.setattr(gpu, "norm_tables", type(gpu.norm_tables)())


def same_as_cpu(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def at_offset(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy that begins so many elements behind where packets begin, as a view of a flat buffer may."""
    flat = tensor.new_zeros(elements + tensor.numel())
    assert flat.data_ptr() % 16 == 0
    return flat[elements:].copy_(tensor.detach())


def move(param: torch.nn.Parameter, state: dict[str, torch.Tensor], offsets: dict[str, int]) -> None:
    """Has a parameter, its gradient and its state begin at these offsets; names as in `Launch.buffers`."""
    param.data = at_offset(param.data, offsets.get("param", 0))
    param.grad = at_offset(param.grad, offsets.get("grad", 0))
    for name, value in state.items():
        if name != "step":
            state[name] = at_offset(value, offsets.get(name, 0))


def with_twin(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """An optimizer, and a copy of it that steps by the CPU kernels."""
    twin = copy.deepcopy(optimizer)
    twin.backend = "cpu"
    return optimizer, twin


def step_both(
    pair: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    step: int = 0,
    dtype: torch.dtype | None = None,
    offsets: list[dict[str, int]] | None = None,
) -> None:
    """One step of both; the first one's tensors begin at these offsets. The results must be identical."""
    for optimizer in pair:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        set_grads(params, step, dtype=dtype)
        if offsets is not None and optimizer is pair[0]:
            for param, its_offsets in zip(params, offsets, strict=True):
                move(param, optimizer.state[param], its_offsets)
        optimizer.step()
    assert_identical(*pair)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers, with one kind of NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integers) if tensor.is_floating_point() else tensor


def assert_identical(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Parameters and states have the same bits, which tells 0 from -0; NaN equals NaN."""
    left, right = dict(states(a)), dict(states(b))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        differ = bits(value.detach()) != bits(right[name].detach())
        assert not differ.any(), f"{name}: {int(differ.sum())} elements, first {int(differ.flatten().nonzero()[0])}"
