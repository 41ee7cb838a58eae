"""The build: what is decided for which machine, what it records, and the wheel without compiled kernels."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import maxva_build_backend as backend
import maxva_build_plan as build
import pytest

ROOT = Path(__file__).resolve().parent.parent

# A machine that can build everything; each case below takes something away.
FULL = build.Facts(torch="2.14.1+cu130", torch_cuda="13.0", cuda_home="/opt/cuda", nvcc=(13, 0))

OBSTACLES = [
    pytest.param({"no_torch": "torch is gone"}, "torch is gone", "torch is gone", id="no torch"),
    pytest.param({"no_compiler": "no c++"}, "no c++", "no c++", id="no compiler"),
    pytest.param({"torch_cuda": None}, None, "not a CUDA build", id="CPU torch"),
    pytest.param({"nvcc": None, "no_nvcc": "no nvcc"}, None, "no nvcc: install the CUDA toolkit 13.0", id="no nvcc"),
    pytest.param({"nvcc": (12, 8)}, None, "nvcc 12.8 in /opt/cuda cannot build for torch", id="older major"),
    pytest.param({"nvcc": (14, 0)}, None, "nvcc 14.0 in /opt/cuda cannot build for torch", id="newer major"),
    pytest.param({"nvcc": (13, 2)}, None, None, id="other minor"),
    pytest.param({"nvcc": (12, 0), "torch_cuda": "12.6"}, None, "nvcc 12.0 in /opt/cuda is too old", id="before 12.1"),
    pytest.param({}, None, None, id="nothing missing"),
]


def matches(reason: str | None, expected: str | None) -> bool:
    return reason is None if expected is None else reason is not None and expected in reason


@pytest.mark.parametrize(
    ("env", "mode"),
    [
        ({}, "auto"),
        ({"MAXVA_BUILD": ""}, "auto"),
        ({"MAXVA_BUILD": " CPU "}, "cpu"),
        ({"MAXVA_BUILD": "python", "FORCE_CUDA": "0"}, "python"),
        ({"FORCE_CUDA": "1"}, "cuda"),
        ({"FORCE_CUDA": "ON", "MAXVA_BUILD": "auto"}, "cuda"),
    ],
)
def test_requested_mode(env, mode):
    assert build.requested_mode(env) == mode


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MAXVA_BUILD": "gpu"}, "MAXVA_BUILD='gpu' is not known: use auto, cuda, cpu, python"),
        ({"MAXVA_BUILD": "cpu", "FORCE_CUDA": "1"}, "FORCE_CUDA=1 contradicts MAXVA_BUILD=cpu"),
    ],
)
def test_requested_mode_refuses(env, message):
    with pytest.raises(SystemExit, match=message):
        build.requested_mode(env)


@pytest.mark.parametrize(("changes", "no_cpu", "no_cuda"), OBSTACLES)
def test_auto_builds_what_can_be_built(changes, no_cpu, no_cuda):
    plan = build.plan("auto", replace(FULL, **changes))
    assert matches(plan.no_cpu, no_cpu)
    assert matches(plan.no_cuda, no_cuda)


@pytest.mark.parametrize(("changes", "no_cpu", "no_cuda"), OBSTACLES)
def test_cuda_stops_where_it_cannot_be_built(changes, no_cpu, no_cuda):
    facts = replace(FULL, **changes)
    if no_cuda is None:
        assert build.plan("cuda", facts) == build.plan("auto", facts)
        return
    with pytest.raises(SystemExit) as stopped:
        build.plan("cuda", facts)
    assert no_cuda in str(stopped.value)
    assert "MAXVA_BUILD=auto" in str(stopped.value)


@pytest.mark.parametrize(("changes", "no_cpu", "no_cuda"), OBSTACLES)
def test_cpu_stops_only_for_what_the_cpu_kernel_needs(changes, no_cpu, no_cuda):
    facts = replace(FULL, **changes)
    if no_cpu is None:
        plan = build.plan("cpu", facts)
        assert plan.no_cpu is None
        assert matches(plan.no_cuda, "MAXVA_BUILD=cpu")
        return
    with pytest.raises(SystemExit) as stopped:
        build.plan("cpu", facts)
    assert no_cpu in str(stopped.value)
    assert "MAXVA_BUILD=python" in str(stopped.value)


@pytest.mark.parametrize("facts", [FULL, build.Facts()])
def test_python_builds_nothing_and_needs_nothing(facts):
    plan = build.plan("python", facts)
    assert matches(plan.no_cpu, "MAXVA_BUILD=python")
    assert matches(plan.no_cuda, "MAXVA_BUILD=python")


def test_archs():
    assert build.plan("auto", FULL).archs == "7.5;8.0;9.0;10.0;12.0+PTX"
    assert build.plan("auto", replace(FULL, torch_cuda="12.6", nvcc=(12, 6))).archs == "7.5;8.0;9.0+PTX"
    assert build.plan("auto", FULL, arch_list="9.0").archs == "9.0"
    assert build.plan("auto", replace(FULL, gpu=True)).archs is None, "torch takes the GPUs it sees"


def test_record():
    built = build.plan("auto", FULL).record("1.2", FULL)
    assert built == {
        "version": "1.2",
        "cpu": {"built": True},
        "cuda": {"built": True},
        "torch": "2.14.1+cu130",
        "cuda_home": "/opt/cuda",
        "archs": "7.5;8.0;9.0;10.0;12.0+PTX",
    }
    cpu_torch = replace(FULL, torch_cuda=None)
    record = build.plan("auto", cpu_torch).record("1.2", cpu_torch)
    assert record["cpu"] == {"built": True}
    assert record["cuda"]["built"] is False
    assert "not a CUDA build" in record["cuda"]["reason"]
    assert "archs" not in record


def toolkit(root: Path) -> Path:
    """A CUDA toolkit as far as the build looks at one."""
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.1, V13.1.80"\n'
        f"else echo '#$ TOP={root}/bin/..' >&2; fi\n"
    )
    nvcc.chmod(0o755)
    return root


def test_cuda_home_is_taken_at_its_word(tmp_path):
    home = toolkit(tmp_path / "cuda")
    assert build.find_cuda_home({"CUDA_HOME": str(home)}) == (home, None)
    assert build.nvcc_release(home) == (13, 1)
    empty = str(tmp_path / "empty")
    assert build.find_cuda_home({"CUDA_HOME": empty, "PATH": str(home / "bin")}) == (
        None,
        f"CUDA_HOME={empty} has no bin/nvcc",
    )


def test_nvcc_on_path_may_be_a_wrapper(tmp_path):
    home = toolkit(tmp_path / "cuda")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    assert build.find_cuda_home({"PATH": f"{wrapper.parent}:/bin"}) == (home.resolve(), None)


def test_missing_compiler_is_named(tmp_path):
    assert matches(build.no_compiler({"PATH": str(tmp_path)}), "no C++ compiler was found (c++)")
    assert matches(build.no_compiler({"PATH": str(tmp_path), "CXX": "ccache clang++-99"}), "(ccache)")
    assert matches(build.no_compiler({"PATH": str(tmp_path), "CXX": " "}), "(c++)")
    assert matches(build.no_compiler({"CXX": '"g++'}), 'CXX="g++ cannot be understood')


@pytest.mark.parametrize("broken", [types.ModuleType("torch"), types.SimpleNamespace(__version__="weird")])
def test_broken_torch_is_named(broken, monkeypatch):
    """Guards against a traceback from a half-removed torch, of which a folder may be left that Python takes for it."""
    monkeypatch.setitem(sys.modules, "torch", broken)
    assert "torch cannot be imported by the build" in build.gather_facts({}).no_torch


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.10.0+cu130", (2, 10)), ("2.9.1", (2, 9)), ("3.0.0a0+git12", (3, 0)), ("2", (2, 0)), ("weird", (0, 0))],
)
def test_parse_version(version, expected):
    assert build.parse_version(version) == expected


def test_sources_that_would_share_an_object_are_refused(tmp_path):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for name in ("step.cpp", "norm.cu"):
        (tmp_path / "csrc" / "cuda" / name).touch()
    assert build.module_sources(tmp_path, build.CUDA_SOURCES) == ["csrc/cuda/norm.cu", "csrc/cuda/step.cpp"]
    (tmp_path / "csrc" / "cuda" / "step.cu").touch()
    with pytest.raises(SystemExit, match="differ only in their suffix"):
        build.module_sources(tmp_path, build.CUDA_SOURCES)


def test_backend_asks_for_torch_only_where_there_is_none(monkeypatch):
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    monkeypatch.delenv("MAXVA_BUILD", raising=False)
    assert backend.get_requires_for_build_wheel() == ["ninja"]
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)  # as pip's isolation has it
    backend._installed_torch.cache_clear()
    monkeypatch.setattr(backend, "FIND_TORCH", "print('a greeting of a .pth file')\n" + backend.FIND_TORCH)
    assert backend._installed_torch()["version"] == importlib.metadata.version("torch")
    assert backend.get_requires_for_build_wheel() == ["ninja"]
    monkeypatch.setattr(backend, "_installed_torch", lambda: None)
    assert backend.get_requires_for_build_wheel() == ["ninja", "torch>=2.10"]
    monkeypatch.setenv("MAXVA_BUILD", "python")
    assert backend.get_requires_for_build_wheel() == []


def test_wheel_without_kernels_needs_neither_torch_nor_compiler(tmp_path):
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "_build.json", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignore)
    poison = tmp_path / "poison" / "torch"
    poison.mkdir(parents=True)
    (poison / "__init__.py").write_text("raise AssertionError('the build imported torch')\n")
    env = {**os.environ, "MAXVA_BUILD": "python", "CXX": "no-compiler", "PYTHONPATH": str(poison.parent)}
    env.pop("FORCE_CUDA", None)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], env=env, check=True)

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("maxva_kernels/_build.json"))
    assert not [name for name in names if name.endswith(".so")]
    assert "maxva_kernels/info.py" in names
    assert "maxva_kernels/triton_kernels/__init__.py" in names
    assert not record["cpu"]["built"]
    assert "MAXVA_BUILD=python" in record["cuda"]["reason"]
