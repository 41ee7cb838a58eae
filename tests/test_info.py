"""What the installation says of itself."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cases import needs_cpu_kernels

import maxva_kernels
from maxva_kernels import _ops, build_record, info
from maxva_kernels.backends import registry

BUILT = {"version": "1.2", "cpu": {"built": True}, "cuda": {"built": False, "reason": "no nvcc"}, "torch": "2.14.1"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty folder in the place of the installed package."""
    folder = tmp_path / "source" / "maxva_kernels"
    folder.mkdir(parents=True)
    monkeypatch.setattr(build_record, "PACKAGE", folder)
    monkeypatch.setattr(sys, "path", [])
    return folder


def test_record_is_read(package):
    (package / "_build.json").write_text(json.dumps(BUILT))
    assert build_record.read() == BUILT


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"cpu": true, "cuda": true}', '{"cpu": {}}', "\xff"])
def test_broken_record_counts_as_nothing_built(package, text):
    (package / "_build.json").write_text(text, encoding="latin-1")
    for module in ("cpu", "cuda"):
        entry = build_record.read()[module]
        assert entry["built"] is False
        assert "_build.json cannot be read" in entry["reason"]
        assert "install maxva-kernels again" in entry["reason"]


def test_record_whose_values_are_odd(package):
    (package / "_build.json").write_text('{"cpu": {"built": "yes"}, "cuda": {"built": 0}}')
    assert "neither true nor false" in build_record.read()["cpu"]["reason"]


def test_tree_that_was_not_built(package):
    reason = build_record.read()["cpu"]["reason"]
    assert str(package) in reason
    assert "pip install ." in reason


def test_tree_that_hides_the_installation(package, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "maxva_kernels").mkdir(parents=True)
    (site / "maxva_kernels" / "_build.json").write_text(json.dumps(BUILT))
    (site / "maxva_kernels-1.2.dist-info").mkdir()
    (site / "maxva_kernels-1.2.dist-info" / "METADATA").write_text("Name: maxva-kernels\nVersion: 1.2\n")
    monkeypatch.setattr(sys, "path", [str(package.parent), str(site)])
    reason = build_record.read()["cuda"]["reason"]
    assert str(package.parent) in reason
    assert str(site) in reason
    assert "run from another folder" in reason


def test_report_names_every_backend_and_why_not(package, monkeypatch):
    (package / "_build.json").write_text(json.dumps(BUILT))
    reasons = {"cuda": "there is no GPU", "triton": "Triton has no GPU either", "cpu": "the module is gone"}
    monkeypatch.setattr(registry, "why_not", lambda name, device: reasons.get(name))
    monkeypatch.setattr(_ops, "load_error", lambda module: f"{module} does not fit")
    lines = info.report().splitlines()
    assert lines[0].startswith(f"maxva-kernels {maxva_kernels.__version__} in {package}")
    assert any(line.startswith(f"torch {torch.__version__}") for line in lines)
    assert "CPU kernel: built with torch 2.14.1, but does not load: _C does not fit" in lines
    assert "CUDA kernels: not built: no nvcc" in lines
    rows = {line.split()[0]: line.split(maxsplit=3)[1:] for line in lines[lines.index("") + 2 :]}
    assert list(rows) == list(registry.BACKENDS)
    assert rows["cuda"] == ["no", "no", "there is no GPU"]
    assert rows["triton"] == ["-", "no", "Triton has no GPU either"]
    assert rows["cpu"] == ["yes", "no", "the module is gone"]
    assert rows["reference"][:2] == ["-", "yes"]


def test_report_of_cuda_kernels(package, monkeypatch):
    record = {**BUILT, "cuda": {"built": True}, "cuda_home": "/opt/cuda", "archs": "9.0"}
    (package / "_build.json").write_text(json.dumps(record))
    monkeypatch.setattr(registry, "why_not", lambda name, device: "not in this test")
    monkeypatch.setattr(_ops, "load_error", lambda module: None)
    assert "CUDA kernels: built with torch 2.14.1 and /opt/cuda for 9.0" in info.report().splitlines()


def test_kernels_older_than_their_sources_are_told_of(package, monkeypatch):
    """Guards against an editable installation that computes what a checkout did before a pull."""
    (package / "_build.json").write_text(json.dumps(BUILT))
    csrc = package.parent / "csrc"
    header, own, others = csrc / "maxva.h", csrc / "cpu" / "step.cpp", csrc / "cuda" / "step.cu"
    module = package / "_C.abi3.so"
    monkeypatch.setattr(_ops.importlib, "import_module", lambda name: sys)
    monkeypatch.setattr(_ops, "load_error", lambda name: None)
    monkeypatch.setattr(registry, "why_not", lambda name, device: "not in this test")

    def is_from(time: float, *paths: Path) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (time, time))

    def told() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert _ops._load("_C") is sys
        return [str(warning.message).removeprefix("maxva: ") for warning in caught]

    is_from(1e9, header, own, others, module)
    assert told() == []
    is_from(2e9, others)  # which the CPU's module is not made of
    assert told() == []
    for changed in (own, header):
        is_from(1e9, header, own, module)
        is_from(2e9, changed)
        (warning,) = told()
        assert f"({changed.relative_to(package.parent)} has changed since)" in warning
        assert "run pip install -e . again" in warning
        assert f"CPU kernel: built with torch 2.14.1; {warning}" in " ".join(info.report().split())
        is_from(2e9, module)
        assert told() == []


def test_reference_is_not_taken_in_silence(monkeypatch):
    """Guards against weeks of steps a hundred times slower than need be, as from an unbuilt source tree."""
    monkeypatch.setattr(registry, "_selected", {})
    for name in ("cuda", "triton", "cpu"):
        monkeypatch.setattr(registry._MODULES[name], "why_not", lambda device: "is away")
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match=r"backend='reference', a hundred .* \(cpu: is away\)"):
        assert registry.select("auto", cpu).NAME == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.select("auto", cpu).NAME == "reference"  # said once
        assert registry.select("reference", cpu).NAME == "reference"


def test_each_device_is_asked(monkeypatch):
    """Guards against a GPU taken for another one of the machine, and against Triton where the CUDA kernels can run."""
    monkeypatch.setattr(registry, "_selected", {})
    monkeypatch.setattr(registry._MODULES["cuda"], "why_not", lambda device: "is too old" if device.index else None)
    monkeypatch.setattr(registry._MODULES["triton"], "why_not", lambda device: None)
    names = [registry.select("auto", torch.device("cuda", index)).NAME for index in (0, 1, 0)]
    assert names == ["cuda", "triton", "cuda"]


def test_kernels_are_tried_on_the_device_itself(monkeypatch):
    """Guards against the answer of another GPU, and of all where the device has no number."""
    monkeypatch.setattr(_ops, "load_error", lambda module: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(registry.cuda, "_why_not_device", "GPU {}".format)
    reasons = [registry.why_not("cuda", torch.device(name)) for name in ("cuda:1", "cuda:0", "cuda")]
    assert reasons == ["GPU 1", "GPU 0", "GPU 3"]


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_oldest_gpu_of_triton(capability, runs, monkeypatch):
    """Guards against Triton refused on the oldest GPU that it supports, or tried on older ones."""
    monkeypatch.setattr(registry.triton, "_import_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    reason = registry.why_not("triton", torch.device("cuda", 0))
    assert (reason is None) == runs
    assert runs or "Triton does not support a GPU; use backend='cuda'" in reason


def test_devices_asked_about(monkeypatch):
    asked = {}
    monkeypatch.setattr(registry, "why_not", lambda name, device: asked.setdefault(name, device.type))
    info.report()
    assert asked == {"cuda": "cuda", "triton": "cuda", "cpu": "cpu", "reference": "cpu"}


@pytest.mark.parametrize("arguments", [[], ["info"]])
def test_command_line(tmp_path, arguments):
    command = [sys.executable, "-m", "maxva_kernels", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"maxva-kernels {maxva_kernels.__version__}")
    assert all(f"\n{name} " in result.stdout for name in registry.BACKENDS)


@needs_cpu_kernels
def test_instruction_set_of_no_name_is_reported(tmp_path):
    """Guards against a diagnosis that fails for the problem that it is to name."""
    environment = {**os.environ, "MAXVA_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-m", "maxva_kernels"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = " ".join(result.stdout.split())  # lines are wrapped
    problem = "the environment variable MAXVA_CPU_CAPABILITY is avx2; set it to AVX512, AVX2 or DEFAULT, or unset it"
    assert f" cpu yes no {problem} reference " in report
    assert all(f"\n{name} " in result.stdout for name in registry.BACKENDS)


def test_command_line_refuses_what_it_does_not_know(tmp_path):
    command = [sys.executable, "-m", "maxva_kernels", "bogus"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "bogus" in result.stderr
