"""Stage "simulator": is the simulator of the tests honest? The same inputs through it and through the GPU, bit for bit.

First our kernels: the simulator runs their PTX, the GPU what was built for it. Then kernels of its own tests, of many
instructions, as the very same PTX. Whether a NaN has the same bits is counted apart: only the value counts. In a
rehearsal the CPU kernels, and the simulator on other PTX, take the GPU's place.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_check import machine, same_bits, stage
from gpu_check.stage import Lacking, Stage
from maxva_kernels import LaMAdam, MAdam, functional
from maxva_kernels.backends import registry

SIZES = (0, 1, 3, 33, 513, 1025, 8195)


def run(stage: Stage) -> None:
    stage.check_package()
    for package in ("numpy", "pytest"):
        if importlib.util.find_spec(package) is None:
            raise Lacking(f"the simulator needs {package}")
    for tool in ("nvcc", "g++", "c++filt"):
        if shutil.which(tool) is None:
            raise Lacking(f"the simulator needs {tool}")
    gpu = machine.find()
    assert gpu is not None
    if gpu.real:
        gpu.start()
    elif reason := registry.why_not("cpu", gpu.device):
        raise Lacking(f"the CPU kernels, which rehearse the GPU's part: {reason}")
    same_bits.cases()  # the tests' folder is on the path
    stage.record["kernels"] = []
    for line in our_kernels(gpu):
        tell(stage, line)
    for line in instructions(stage, gpu):
        tell(stage, line)


def tell(stage: Stage, line: dict[str, Any]) -> None:
    stage.record["kernels"] = [*stage.record["kernels"], line]
    if line["differences"]:
        stage.record.problem(f"{line['kernel']}: the simulator differs: {line['differences'][:3]}")


def our_kernels(gpu: Any) -> Iterator[dict[str, Any]]:
    """Steps of both algorithms in several dtypes, clipped, and the norm."""
    import pytest
    from simulated_cuda import SimulatedLauncher, install

    table = same_bits.cases()
    kinds: list[same_bits.Kind] = [(torch.float32, torch.float32, None), (torch.bfloat16, torch.bfloat16, None)]
    kinds += [(torch.float16, torch.float32, None), (torch.float64, torch.float64, None)]
    kinds += [(torch.float32, torch.bfloat16, torch.bfloat16)]
    for algorithm in (MAdam, LaMAdam) if gpu.real else (MAdam,):
        for param, grad, state in kinds if gpu.real else kinds[:1]:
            of_bfloat16 = ("all_and_master_weights", "stochastic_rounding") if param == torch.bfloat16 else ()
            for option in ("base", "all", *of_bfloat16):
                options = {**table.BASE, **same_bits.options_named(option), "state_dtype": state}
                sizes = SIZES if gpu.real else SIZES[:4]
                with pytest.MonkeyPatch.context() as patch:
                    install(SimulatedLauncher(), patch)
                    simulated = algorithm(table.make_params(sizes, param), backend="cuda", **options)
                    steps(simulated, grad)
                backend = "cuda" if gpu.real else "cpu"
                real = algorithm(table.make_params(sizes, param, gpu.device), backend=backend, **options)
                steps(real, grad)
                states = [dict(table.states(optimizer)) for optimizer in (simulated, real)]
                yield {
                    "kernel": f"{algorithm.__name__}, {option}, {param} with {grad}, state_dtype {state}",
                    "differences": same_bits.differences(simulated, real),
                    "nan_bits": sum(nan_bits(value, states[1][name]) for name, value in states[0].items()),
                }
    for dtype in same_bits.DTYPES if gpu.real else same_bits.DTYPES[:1]:
        grads = [p.detach() for p in table.make_params((*SIZES, 20_000), dtype)]
        with pytest.MonkeyPatch.context() as patch:
            install(SimulatedLauncher(), patch)
            simulated_norm = functional.grad_norm(grads, backend="cuda")
        there = [grad.to(gpu.device) for grad in grads]
        norm = functional.grad_norm(there, backend="cuda" if gpu.real else "cpu")
        yield {
            "kernel": f"norm, {dtype}",
            "differences": same_bits.tensor_differences("norm", simulated_norm, norm),
            "nan_bits": 0,
        }


def steps(optimizer: torch.optim.Optimizer, grad: torch.dtype) -> None:
    """Three steps, with special values among the gradients of the last."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 1e-45, -0.0])
    for number in range(3):
        same_bits.cases().set_grads(params, number, dtype=grad)
        if number == 2:
            params[3].grad[: len(special)].copy_(special)
        optimizer.step()


def nan_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements are NaN in both, of different bits."""
    a, b = a.cpu(), b.cpu()
    if not a.is_floating_point():
        return 0
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int(((a.view(integers) != b.view(integers)) & a.isnan() & b.isnan()).sum())


def instructions(stage: Stage, gpu: Any) -> Iterator[dict[str, Any]]:
    """kernels/torture.cu of the simulator's tests: integer, float, double, half and warp instructions."""
    import numpy as np
    from ptxsim import Device, Module
    from ptxsim.testing import random_bits

    count, operations = 4096, 24
    x, y = random_bits(count, 8), random_bits(count, 9)
    x[:1500], y[:1500] = np.random.default_rng(10).standard_normal((2, 1500)).astype(np.float32).view(np.uint32)
    halves = np.random.default_rng(11).standard_normal(count).astype(np.float16)
    brains = (y[: count // 2] & 0xBFFFBFFF) | 0x20002000  # pairs of bfloat16 of ordinary size
    floats = x[:1000].view(np.float32)
    launches: dict[str, tuple[int, int, list[Any]]] = {
        "torture": (8, 256, [x, y, np.zeros((operations, count), np.uint32), count, operations]),
        "divergent_ops": (16, 256, [x, y, np.zeros(count, np.uint32), count, operations]),
        "halves": (8, 256, [halves, brains, np.zeros_like(halves), np.zeros_like(brains), count // 2]),
        "warps": (4, 256, [floats, np.zeros(1, np.float32), np.zeros(2, np.int32), len(floats)]),
    }
    text = compiled(stage, "sm_80")
    there: Any = None
    if gpu.real:
        from gpu_check.ptx_on_gpu import Module as ModuleOnGpu

        there = ModuleOnGpu(text)
    else:
        launches = {"halves": launches["halves"], "warps": launches["warps"]}
        there = Module(compiled(stage, "sm_90"))
    here = Module(text)
    for name, (grid, block, arguments) in launches.items():
        simulated = [np.copy(a) if isinstance(a, np.ndarray) else a for a in arguments]
        here.launch(name, grid, block, simulated, Device())
        if gpu.real:
            tensors = [torch.from_numpy(_signed(a)).cuda() if isinstance(a, np.ndarray) else a for a in arguments]
            there.launch(name, grid, block, tensors)
            real = [t.cpu().numpy() if isinstance(t, torch.Tensor) else t for t in tensors]
        else:
            real = [np.copy(a) if isinstance(a, np.ndarray) else a for a in arguments]
            there.launch(name, grid, block, real, Device())
        found = []
        for i, (a, b) in enumerate(zip(simulated, real, strict=True)):
            if isinstance(a, np.ndarray):
                differ = np.flatnonzero(_signed(a).ravel() != _signed(b).ravel())
                for at in differ[:5]:
                    row = f", operation {at // count}" if name == "torture" else ""
                    values = f"{_signed(a).ravel()[at]:x} and {_signed(b).ravel()[at]:x}"
                    found.append(f"argument {i}: {len(differ)} differ, at {at}{row}: {values}")
        yield {"kernel": f"{name} (the same PTX)", "differences": found, "nan_bits": 0}


def _signed(array: Any) -> Any:
    """The same bits as integers that torch has too."""
    return array.view({2: "int16", 4: "int32"}[array.dtype.itemsize])


def compiled(stage: Stage, arch: str) -> str:
    source = stage.root / "tests" / "ptxsim" / "kernels" / "torture.cu"
    out = Path(stage.work, f"torture.{arch}.ptx")
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "--ptx", f"-arch={arch}", str(source), "-o", str(out)]
    subprocess.run(command, check=True)
    return out.read_text()


if __name__ == "__main__":
    stage.main(run)
