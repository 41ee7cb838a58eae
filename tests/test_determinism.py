"""The same bits for every thread count and instruction set."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cases import ALGORITHMS, BASE, DTYPES, OPTIONS, assert_same_bits, make_params, needs_cpu_kernels, set_grads, states

from maxva_kernels import _ops, functional

SIZES = (0, 1, 31, 1000, 40_001, 70_000)  # the last two are divided between threads


def run(algorithm, dtype, **options):
    params = make_params(SIZES, dtype=dtype)
    optimizer = algorithm(params, **{**BASE, **options}, backend="cpu")
    for step in range(4):
        set_grads(params, step)
        optimizer.step()
    return optimizer


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_counts(dtype):
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(run(ALGORITHMS[0], dtype, max_grad_norm=1.0, amsgrad=True))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert_same_bits(runs[0], other)


@contextmanager
def flushing():
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def rounding_down():
    library, downward = ctypes.CDLL(None), 0x400
    assert library.fesetround(downward) == 0
    try:
        yield
    finally:
        library.fesetround(0)


@needs_cpu_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the modes are set as on x86-64")
@pytest.mark.parametrize("mode", [flushing, rounding_down])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes_of_the_caller(dtype, mode):
    """Guards against results that depend on which thread computes them, where the caller's has been told to take
    subnormals for zeros or to round otherwise, and against float16 parameters set to 0."""
    tiny = torch.finfo(dtype).tiny
    scale = tiny / 4
    runs, norms = [], []
    for chosen in (nullcontext, mode):
        params = make_params(SIZES, dtype=dtype)
        for param in params:
            param.data *= scale
        optimizer = ALGORITHMS[0](params, **{**BASE, "lr": scale}, trust_ratio=True, max_grad_norm=1e-5, backend="cpu")
        for step in range(3):
            set_grads(params, step, scale=scale)
            with chosen():
                optimizer.step()
                norms.append(functional.grad_norm([param.grad for param in params]))
        runs.append(optimizer)
    assert_same_bits(*runs)
    assert norms[:3] == norms[3:]
    assert any(((param != 0) & (param.abs() < tiny)).any() for param in params)


def every_bit() -> tuple[str, dict[str, torch.Tensor]]:
    """The instruction set in use, and the results of many steps by it."""
    results = {}
    for algorithm in ALGORITHMS:
        for dtype in DTYPES:
            for option in ("all", "clip", "base"):
                for state_dtype in (None, torch.bfloat16) if dtype != torch.float64 else (None,):
                    done = run(algorithm, dtype, **OPTIONS[option], state_dtype=state_dtype)
                    for name, value in states(done):
                        results[f"{algorithm.__name__} {dtype} {option} {state_dtype} {name}"] = value
    return _ops.cpu_capability(), results


@needs_cpu_kernels
@pytest.mark.skipif(
    _ops.load_error("_C") is not None or _ops.cpu_capability() == "DEFAULT", reason="one instruction set only"
)
def test_instruction_sets(tmp_path):
    """Each set that this machine runs, in a process of its own, since the choice is made once."""
    capability, expected = every_bit()
    seen = {capability}
    for named in ("AVX2", "DEFAULT"):
        file = tmp_path / named
        script = f"import torch, test_determinism as t; torch.save(t.every_bit(), {str(file)!r})"
        path = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "MAXVA_CPU_CAPABILITY": named, "PYTHONPATH": path}
        # From another folder: `python -c` would import the package's unbuilt sources from this one.
        subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
        used, results = torch.load(file)
        seen.add(used)
        assert used == named
        assert results.keys() == expected.keys()
        for name, value in results.items():
            assert torch.equal(value, expected[name]), f"{used} against {capability}: {name}"
    assert "DEFAULT" in seen


@needs_cpu_kernels
def test_instruction_set_of_no_name(tmp_path):
    """Guards against the slowest set for whoever writes one's name as torch has it."""
    script = "import torch, maxva_kernels; maxva_kernels.MAdam([torch.nn.Parameter(torch.ones(1))])"
    for named in ("avx2", ""):
        environment = {**os.environ, "MAXVA_CPU_CAPABILITY": named}
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        refused = "MAXVA_CPU_CAPABILITY is avx2; set it to AVX512, AVX2 or DEFAULT" in result.stderr
        assert (refused, result.returncode == 0) == (bool(named), not named), result.stderr
