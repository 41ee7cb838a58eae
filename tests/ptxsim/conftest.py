"""Compiles the kernels of the tests, each once in a session."""

import functools
import pathlib
import shutil
import subprocess

import pytest

from . import Module

KERNELS = pathlib.Path(__file__).parent / "kernels"


@pytest.fixture(scope="session")
def ptx_of(tmp_path_factory):
    """ptx_of(name, arch, *options): the PTX that nvcc makes of kernels/<name>.cu."""
    folder = tmp_path_factory.mktemp("ptx")

    @functools.cache
    def compile_to_ptx(name, arch, *options):
        if shutil.which("nvcc") is None:
            pytest.skip("needs nvcc, which is not on the PATH")
        out = folder / "-".join([name, arch, *(option.strip("-") for option in options)])
        command = ["nvcc", "-std=c++17", "-O3", *options, "--ptx", f"-arch={arch}", f"{KERNELS / name}.cu", "-o", out]
        result = subprocess.run(command, capture_output=True, text=True)
        if "Unsupported gpu architecture" in result.stderr:
            pytest.skip(f"this nvcc does not know {arch}")
        assert result.returncode == 0, result.stderr
        return out.read_text()

    return compile_to_ptx


@pytest.fixture(scope="session")
def nvcc(ptx_of):
    """nvcc(name, arch, *options): kernels/<name>.cu as a Module."""
    return functools.cache(lambda *arguments: Module(ptx_of(*arguments)))


@pytest.fixture(scope="session")
def triton(tmp_path_factory):
    """triton(variant, arch): a kernel of kernels/triton_kernels.py as a Module, and its bytes of shared memory."""
    pytest.importorskip("triton", reason="needs triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        from .kernels.triton_kernels import compile_to_ptx

        @functools.cache
        def compile_variant(variant, arch):
            text, shared_bytes = compile_to_ptx(variant, int(arch.removeprefix("sm_")))
            return Module(text), shared_bytes

        yield compile_variant


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """The functions of kernels/torture.cu, built by the host compiler."""
    import ctypes

    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("host") / "torture.so"
    options = ["-O2", "-ffp-contract=off", "-shared", "-fPIC", "-x", "c++"]
    subprocess.run([compiler, *options, KERNELS / "torture.cu", "-o", library], check=True)
    return ctypes.CDLL(str(library))
