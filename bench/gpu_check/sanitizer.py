"""Stage "sanitizer": compute-sanitizer's four tools over a small run of every kernel (sanitized.py), side by side.

Two runs have a fault in them, which the tool must find: else it saw no kernel of ours, and its silence says nothing.
Only our kernels are watched, but by initcheck, which must see who writes what ours read. What the tools find in other
kernels or in calls of the runtime is told, and no failure. In a rehearsal a script stands in for the tool: it takes the
same options and runs the command.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check import stage
from gpu_check.stage import Lacking, Stage

FOUND = 86  # the exit status that tells findings from a crash
# How to watch our kernels only has been spelled in several ways; the last one watches everything, slowly.
FILTERS = (("--kernel-name", "kernel_substring=maxva"), ("--kernel-regex", "kns=maxva"), ())
REFUSED = r"[Dd]evice not supported|[Uu]nsupported|not supported on this"


def run(stage: Stage) -> None:
    stage.check_package()
    tool = [sys.executable, "-m", "gpu_check.stand_in_sanitizer"] if stage.rehearsal else find()
    control: dict[str, Any] = {}
    for only in FILTERS:
        (control,) = watch(stage, tool, only, [("memcheck", "bounds")])
        if control["ours"]:
            break
    stage.record["runs"] = [control]
    if not control["ours"]:
        if re.search(REFUSED, "\n".join(control["output"])):
            raise Lacking(f"compute-sanitizer does not work on this machine: {control['output'][-3:]}")
        stage.record.problem("memcheck did not find the fault that was put there: it sees nothing of the kernels")
        return
    tools = ("racecheck",) if stage.rehearsal else ("memcheck", "racecheck", "initcheck", "synccheck")
    results = watch(stage, tool, only, [("initcheck", "initial"), *((name, None) for name in tools)])
    stage.record["runs"] = [control, *results]
    for result in results:
        what = f"{result['tool']}{' of the planted fault' if result['fault'] else ''}"
        if result["fault"]:
            if not result["ours"]:
                stage.record.problem(f"{what}: it was not found")
        elif result["errors"] is None or result["status"] not in (0, FOUND) or not result["complete"]:
            stage.record.problem(f"{what}: the run was not completed (status {result['status']})")
        elif result["ours"]:
            stage.record.problem(f"{what}: {result['ours']} reports about our kernels")
        elif result["errors"]:
            stage.record.lacks(f"{what}: {result['errors']} errors, none of our kernels; see its output")


def find() -> list[str]:
    """compute-sanitizer, on the path or in a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    folders = [str(Path(home, place)) for home in homes if home for place in ("bin", "compute-sanitizer")]
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if path is None:
        raise Lacking("compute-sanitizer: neither on PATH nor in the CUDA toolkit")
    return [path]


def watch(
    stage: Stage, tool: list[str], only: Sequence[str], watched: list[tuple[str, str | None]]
) -> list[dict[str, Any]]:
    """Runs each of (tool, fault), all at once; what they say."""
    processes = []
    for name, fault in watched:
        command = [*tool, "--tool", name, "--error-exitcode", str(FOUND), *(() if name == "initcheck" else only)]
        command += [sys.executable, "-m", "gpu_check.sanitized", *(["--fault", fault] if fault else [])]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        log = stage.work / f"sanitizer_{name}{'_fault' if fault else ''}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        processes.append((name, fault, command, log, process))
    results = []
    for name, fault, command, log, process in processes:
        try:
            status: int | None = process.wait(max(1.0, min(stage.seconds_left() - 5, 1e6)))
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
        text = log.read_text(encoding="utf-8", errors="replace")
        print(f"--- {' '.join(command)}\n{text[-4000:]}")
        results.append({"tool": name, "fault": fault, "status": status, "command": command[1:], **told(text)})
    return results


def told(text: str) -> dict[str, Any]:
    """The number of errors, which racecheck words otherwise (None: the tool did not come so far); and how many lines of
    its reports name a kernel of ours."""
    summaries = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    return {
        "errors": sum(int(a or b) for a, b in summaries) if summaries else None,
        "ours": sum("maxva::" in line and "Host Frame" not in line for line in lines),
        "complete": "the run is complete" in text,
        "output": lines[:40] + lines[40:][-3:],
    }


if __name__ == "__main__":
    stage.main(run)
