"""Stage "correctness": the tests that want a GPU, on this one; where there is no pytest, the option table without it.

First tests/test_cuda_gpu.py by itself, one test at a time. The tests of every backend, which run on the simulator where
there is no GPU, follow, several processes side by side where pytest-xdist is installed; last everything of Triton,
which takes its time to compile, side by side but for what needs the GPU for itself. In a rehearsal these are a few, and
simulated; Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from gpu_check import stage
from gpu_check.stage import Lacking, Stage

REHEARSED = ("test_grad_norm.py", "test_special_values and cuda")
WORKERS = 8
INTERPRETER = "Triton's kernels in its interpreter"


def run(stage: Stage) -> None:
    stage.check_package()
    has_pytest = importlib.util.find_spec("pytest") is not None
    if has_pytest:
        stage.record["runs"] = []
        tests = stage.root / "tests"
        run_pytest(stage, "tests of the GPU", ["-m", "gpu", "-k", "not triton", str(tests / "test_cuda_gpu.py")])
        if stage.rehearsal:
            run_pytest(stage, REHEARSED[0], ["-m", "simulated", "-k", REHEARSED[1], str(tests / REHEARSED[0])])
            # It starts a process with TRITON_INTERPRET=1, and compares with the CPU kernels after each step.
            run_pytest(stage, INTERPRETER, ["-k", "test_interpreter", str(tests / "test_triton_kernels.py")])
        else:
            selected = ["-m", "gpu and not alone", str(tests)]
            if importlib.util.find_spec("xdist"):
                cores = os.cpu_count() or 1
                selected += ["-n", str(min(WORKERS, cores))]
                os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // WORKERS)))  # theirs; the first run has all
            apart = f"--ignore={tests / 'test_cuda_gpu.py'}"
            run_pytest(stage, "tests of every backend but Triton", [*selected, apart, "-k", "not triton"])
            if importlib.util.find_spec("triton"):
                run_pytest(stage, "tests of Triton", [*selected, "-k", "triton"])
                run_pytest(stage, "tests of Triton alone", ["-m", "gpu and alone", "-k", "triton", str(tests)])
    if not has_pytest or stage.rehearsal:
        if not has_pytest:
            stage.record.lacks("pytest: only the option table is checked")
        run_table(stage)


def run_pytest(stage: Stage, label: str, selected: list[str]) -> None:
    """One run of pytest, its counts and failures in the record."""
    report, log = stage.work / "pytest.xml", stage.work / "pytest.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["-c", str(stage.root / "pyproject.toml"), "--rootdir", str(stage.root), f"--junitxml={report}"]
    with log.open("wb") as file:
        try:
            limit = max(1.0, min(stage.seconds_left() - 5, 1e6))
            code: int | None = subprocess.run(
                [*command, *selected], stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text[-20_000:])
    result: dict[str, object] = {"run": label, "selected": selected, **(counts(report) if report.is_file() else {})}
    if code is None or not report.is_file():
        words = Counter(re.findall(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b", text))
        result |= {word.lower(): count for word, count in words.items()}
        result["failures"] = [{"test": line, "message": ""} for line in re.findall(r".*\bFAILED\b.*", text)[:50]]
    stage.record["runs"] = [*stage.record["runs"], result]
    for name in result.get("missing", ()):  # type: ignore[attr-defined]
        stage.record.lacks(f"{label}: a Python package, and with it {name}")
    if code is None:
        stage.record.problem(f"{label}: no time was left for all of them")
    elif code and (result.get("failed") or not result.get("missing")):
        stage.record.problem(f"{label}: pytest ended with status {code}")
    elif not result.get("passed") and stage.rehearsal:
        stage.record.lacks(f"{label}: none could be rehearsed ({result.get('reasons of skips')})")
    elif not result.get("passed"):
        stage.record.problem(f"{label}: none ran")


def counts(report: Path) -> dict[str, object]:
    """What a JUnit file of pytest says."""
    passed, skipped, failures = 0, Counter[str](), []
    missing = set()
    seconds = 0.0
    for test in ElementTree.parse(report).iter("testcase"):
        name = f"{test.get('classname')}::{test.get('name')}"
        seconds += float(test.get("time") or 0)
        bad = [*test.findall("failure"), *test.findall("error")]
        skip = test.find("skipped")
        lost = re.search(r"No module named '([\w.]+)'", bad[0].text or "") if bad else None
        if lost and "collection failure" in (bad[0].get("message") or ""):
            missing.add(f"{name}: {lost[1]}")
        elif bad:
            message, text = bad[0].get("message") or "", bad[0].text or ""
            failures.append({"test": name, "message": message[:600], "text": text[-2500:].splitlines()})
        elif skip is not None:
            skipped[(skip.get("message") or "")[:200]] += 1
        else:
            passed += 1
    return {
        "passed": passed,
        "failed": len(failures),
        "skipped": sum(skipped.values()),
        "failures": failures[:60],
        "reasons of skips": dict(skipped),
        "missing": sorted(missing),
        "seconds": round(seconds, 1),
    }


def run_table(stage: Stage) -> None:
    """The option table by torch alone. A rehearsal has the CPU kernels on both sides, and hides pytest."""
    import torch

    from gpu_check import machine, same_bits
    from maxva_kernels.backends import registry

    if reason := registry.why_not("cpu", torch.device("cpu")):
        raise Lacking(f"the CPU kernels, to compare with: {reason}")
    if stage.rehearsal:
        sys.modules["pytest"] = None  # type: ignore[assignment]  # its import fails
        device, backends = torch.device("cpu"), ["cpu"]
    else:
        device = machine.need().device
        backends = [name for name in ("cuda", "triton") if registry.why_not(name, device) is None]
    found: list[str] = []
    listed = itertools.product(backends, same_bits.variants(few=stage.rehearsal))
    for checked, (backend, variant) in enumerate(listed, 1):
        found += [f"{backend}: {text}" for text in same_bits.check(*variant, device, backend)[:3]]
        stage.record["table"] = {"variants": checked, "differences": found[:100]}
    if found:
        stage.record.problem(f"the option table: {len(found)} differences from the CPU's bits")


if __name__ == "__main__":
    stage.main(run)
