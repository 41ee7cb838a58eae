"""Stage "build": installs the package from a copy of the sources, as a user would, and says what this machine is.

pip builds without isolation, against the torch that is here, and for the GPU that this torch sees. It installs into a
folder of its own, which the later stages put before everything else on Python's path. In a rehearsal no kernels are
compiled: the installation gets those of the environment, if it has any.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpu_check import sources, stage
from gpu_check.stage import Stage

SMI = (
    *("name", "driver_version", "memory.total", "compute_cap", "ecc.mode.current", "mig.mode.current"),
    *("clocks.current.sm", "clocks.max.sm", "clocks.current.memory", "clocks.max.memory"),
    *("power.limit", "temperature.gpu", "pcie.link.gen.current"),
)

TORCH_FACTS = """
import json, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
for index in range(torch.cuda.device_count()):
    facts["gpus"].append(str(torch.cuda.get_device_properties(index)))
print(json.dumps(facts))
"""


def run(stage: Stage) -> None:
    record = stage.record
    record["machine"] = machine_facts(stage)
    copy = stage.work / "source"
    sources.copy(stage.root, copy)
    shutil.rmtree(stage.site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    command += ["--target", str(stage.site), str(stage.wheel or copy)]
    environment = {**os.environ, "MAXVA_BUILD": "python" if stage.rehearsal else "cuda"}
    record["installed"] = f"the wheel {stage.wheel.name}" if stage.wheel else "built from the sources"
    start = time.perf_counter()
    result = subprocess.run(command, env=environment)  # its output goes to the stage's log
    record["build_seconds"] = round(time.perf_counter() - start, 1)
    if result.returncode:
        record.problem(f"pip install ended with status {result.returncode}; what it printed is in the log")
        return
    if stage.rehearsal:
        record["kernels_of"] = borrow_kernels(stage.site)
    sources.mark(copy, stage.work)
    check_report(stage)
    record["resources"] = kernel_resources(stage.site)


def machine_facts(stage: Stage) -> dict[str, object]:
    """What the results depend on, as the machine's tools tell it."""
    facts: dict[str, object] = {
        "commit": output(["git", "-C", str(stage.root), "describe", "--always", "--dirty", "--abbrev=40"]).strip(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": output([sys.executable, "-c", TORCH_FACTS]).strip(),
        "nvcc": output(["nvcc", "--version"]).strip().splitlines()[-2:],
    }
    if shutil.which("nvidia-smi") and not stage.rehearsal:
        values = output(["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]).splitlines()
        facts["nvidia-smi"] = [dict(zip(SMI, map(str.strip, line.split(",")), strict=False)) for line in values]
        facts["nvidia-smi table"] = output(["nvidia-smi"]).splitlines()
    elif not stage.rehearsal:
        stage.record.lacks("nvidia-smi: no facts about the GPU but torch's")
    for package in ("triton", "pytest", "xdist", "numpy", "hypothesis", "transformers", "setuptools", "ninja"):
        if importlib.util.find_spec(package) is None:
            stage.record.lacks(f"the Python package {package}")
    for tool in ("nvcc", "g++", "c++filt", "compute-sanitizer", "cuobjdump"):
        if shutil.which(tool) is None:
            stage.record.lacks(f"the tool {tool} on PATH")
    return facts


def check_report(stage: Stage) -> None:
    """Runs `python -m maxva_kernels` where the sources are out of sight, and reads what it says of the backend."""
    report = subprocess.run([sys.executable, "-m", "maxva_kernels"], capture_output=True, text=True)
    stage.record["report"] = report.stdout.splitlines()
    print(report.stdout + report.stderr)
    if report.returncode or f" in {stage.site.resolve()}" not in report.stdout.splitlines()[0]:
        stage.record.problem(f"python -m maxva_kernels does not speak of {stage.site}: {report.stderr[-500:]}")
    elif not stage.rehearsal and not re.search(r"^cuda +yes +yes\b", report.stdout, re.MULTILINE):
        stage.record.problem("python -m maxva_kernels says that the backend cuda cannot run")


def kernel_resources(site: Path) -> list[str]:
    """Registers, stack and shared memory of each kernel as it was built."""
    modules = list((site / "maxva_kernels").glob("_C_cuda*.so"))
    if not modules or shutil.which("cuobjdump") is None:
        return []
    text = output(["cuobjdump", "--dump-resource-usage", str(modules[0])])
    lines = [" ".join(line.split()) for line in text.splitlines() if "Function" in line or "REG:" in line]
    return [f"{name} {usage}" for name, usage in zip(lines[::2], lines[1::2], strict=False)]


def borrow_kernels(site: Path) -> str:
    """Copies the environment's compiled modules into a rehearsal's installation; says where they are from."""
    script = "import importlib.util; print(importlib.util.find_spec('maxva_kernels').origin)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    package = Path(result.stdout.strip() or site / "none").parent
    modules = [path for path in package.glob("_C*.so") if (package / "_build.json").is_file()]
    for path in [*modules, *([package / "_build.json"] if modules else [])]:
        shutil.copy2(path, site / "maxva_kernels" / path.name)
    return f"{package}: {', '.join(path.name for path in modules)}" if modules else "nowhere: plain Python"


def processor() -> str:
    try:
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor()


def output(command: list[str]) -> str:
    """What a command prints, or why it does not."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    return result.stdout or result.stderr


if __name__ == "__main__":
    stage.main(run)
