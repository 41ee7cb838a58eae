"""The Triton backend without a GPU: its host code as it is, its kernels as Triton compiled them, run by ptxsim.

In place of the launch by Triton's runtime, `SimulatedTriton` compiles the kernel ahead of time and interprets its PTX.
"""

from __future__ import annotations

import functools
import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ptxsim import Module
from sass import Code, read
from simulated import Range, Simulation, install_launcher, norm_ranges, step_ranges, total_ranges

from maxva_kernels.backends import triton as backend
from maxva_kernels.launch import DTYPE_CODES

try:
    import triton
    from maxva_kernels.triton_kernels.launcher import TritonLauncher, options
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:  # what needs it is skipped
    TritonLauncher, why_not = object, f"Triton's kernels cannot be imported: {error}"  # type: ignore[assignment, misc]
else:
    why_not = ""

needs_triton = pytest.mark.skipif(bool(why_not), reason=why_not)

CAPABILITY = 80


def triton_version() -> tuple[int, ...]:
    """Its first two numbers; none where there is no Triton."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(map(int, version.split(".")[:2]))


def has_right_interpreter() -> bool:
    """Whether there is Triton, and its interpreter as a GPU: before 3.8 the larger of a number and a NaN is NaN."""
    return triton_version() >= (3, 8)


@functools.cache
def compiled(kernel: Any, constants: tuple[tuple[str, Any], ...], capability: int = CAPABILITY) -> Any:
    """A kernel as its launcher would have it compiled: all arguments that are no constants are int64."""
    names = kernel.arg_names
    given = {(names.index(name),): value for name, value in constants}
    signature = {name: "constexpr" if (i,) in given else "i64" for i, name in enumerate(names)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options(dict(constants)))


def constants_of(of_launch: Callable[[Any], dict[str, Any]], param: str, grad: str, state: str, **others: bool) -> Any:
    """Those that the launcher's function gives for dtypes, by their names, and what else a launch says."""
    said: dict[str, Any] = {"laprop": False, "amsgrad": False, "masters": False, "statistics": 0} | others
    for name, dtype in (("param", param), ("grad", grad), ("state", state)):
        said[f"{name}_dtype"] = DTYPE_CODES[getattr(torch, dtype)]
    return tuple(sorted(of_launch(SimpleNamespace(**said)).items()))


def machine_code(kernel: Any, constants: tuple[tuple[str, Any], ...], capability: int) -> Code:
    """A compiled kernel's."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled(kernel, constants, capability).asm["cubin"])
        (code,) = read(cubin)
    return code


@functools.cache
def _module(kernel: Any, constants: tuple[tuple[str, Any], ...], capability: int) -> Module:
    return Module(compiled(kernel, constants, capability).asm["ptx"])


class SimulatedTriton(Simulation, TritonLauncher):
    """A `TritonLauncher` whose launches are simulated."""

    backend = "triton"

    def __init__(self, *, capability: int = CAPABILITY, **options):
        Simulation.__init__(self, **options)
        TritonLauncher.__init__(self, "cpu")
        self.capability = capability
        self._ranges: list[Range] = []

    def step(self, launch):
        self._ranges = step_ranges(launch)
        TritonLauncher.step(self, launch)

    def update_norms(self, launch):
        self._ranges = step_ranges(launch)
        TritonLauncher.update_norms(self, launch)

    def norm_chunks(self, launch):
        self._ranges = norm_ranges(launch, self.NORM_CHUNK)
        TritonLauncher.norm_chunks(self, launch)

    def norm_total(self, launch):
        self._ranges = total_ranges(launch)
        TritonLauncher.norm_total(self, launch)

    def _send(self, data, device):
        sent = TritonLauncher._send(self, data, device)
        self._ranges.append(("sent", sent.data_ptr(), 8 * sent.numel()))
        return sent

    def run(self, kernel, chunks, device, arguments, constants):
        constants = tuple(sorted(constants.items()))
        metadata = compiled(kernel, constants, self.capability).metadata
        module = _module(kernel, constants, self.capability)
        self.simulate(
            metadata.name,
            module,
            metadata.name,
            chunks,
            32 * metadata.num_warps,
            list(arguments),
            self._ranges,
            shared_bytes=metadata.shared,
            pad_args=True,
            # Where several threads of a program hold a value, Triton has all of them store it: no race that matters.
            racecheck=False,
        )


def install_triton(launcher: SimulatedTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the backend "triton" drive CPU tensors through this launcher."""
    install_launcher(backend, launcher, monkeypatch)
