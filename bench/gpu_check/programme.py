"""The driver: stages one after another, each a process with a time limit, whatever becomes of the others.

It imports neither torch nor the package, so that nothing a stage does can take it down.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from gpu_check import sources, table
from gpu_check.record import Record
from gpu_check.stage import LIMIT


class Entry(NamedTuple):
    limit: float  # seconds
    about: str


# In order of importance; the limits together exceed the whole's, and whoever comes late gets what is left.
STAGES = {
    "build": Entry(240, "pip install from a copy of the sources, what the package then reports, the GPU's facts"),
    "correctness": Entry(240, "pytest -m gpu; without pytest the option table in plain Python"),
    "speed": Entry(150, "device time of a step beside AdamW, the eager reference and the bandwidth of a copy"),
    "sanitizer": Entry(150, "compute-sanitizer's four tools over each kernel"),
    "host": Entry(90, "host time of step(), and what it launches"),
    "simulator": Entry(90, "the PTX simulator of the tests against the GPU, bit for bit"),
    "training": Entry(90, "the optimizer's share of a BERT training step with AMP"),
}  # fmt: skip

FIGURES = 40.0  # seconds for the figures, which come after everything else

REHEARSAL = "no GPU: a rehearsal, whose figures mean nothing"


def run(root: Path, args: argparse.Namespace) -> int:
    """Runs the stages; 0 if all of them passed."""
    work = args.work.resolve()
    (work / "run").mkdir(parents=True, exist_ok=True)
    device = REHEARSAL if args.rehearse else gpu_name()
    if device is None:
        print("no GPU is to be seen here (nvidia-smi -L lists none); --rehearse runs the programme without one")
        return 2
    out = args.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    out = (out or (work / "rehearsal" if args.rehearse else root / "bench" / "results" / folder(device))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in STAGES if not args.stages or name in args.stages]
    built = sources.is_current(root, work)
    if "build" not in wanted and not built:
        wanted = ["build", *wanted]
    ends = time.time() + 60 * args.minutes
    passed = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the table is printed all the same
    try:
        for name in wanted:
            record = Record(_fresh(path_of(out, name, args.rehearse)))
            record.data.update(stage=name, status="not run", rehearsal=args.rehearse, device=device)
            record["date"] = time.strftime("%Y-%m-%d %H:%M:%S")
            if name != "build" and not built:
                record.problem("the package was not built")
            elif ends - time.time() < 5:
                record.problem(f"no time was left of {args.minutes:g} minutes")
            else:
                run_stage(name, record, root, work, args, min(STAGES[name].limit, ends - time.time()))
                record["sources"] = sources.installed(work)
            if name == "build":
                built = sources.installed(work) is not None
            passed = passed and not record["problems"]
    finally:
        records = [Record(path_of(out, name, args.rehearse)) for name in STAGES]
        for record in records:
            if record.get("status") == "running":  # the programme itself was stopped
                record.problem("stopped from outside")
                record["status"] = "stopped"
        text = table.summary(records, args.rehearse)
        summary = out / ("rehearsal_summary.txt" if args.rehearse else "summary.txt")
        summary.write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n\nresults: {out}", flush=True)
    if lacking := draw(out, environment(root, work, args.rehearse, time.time() + FIGURES)):
        text = table.marked([f"lacking (figures): {line}"[:150] for line in lacking], args.rehearse)
        with summary.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(text, flush=True)
    return 0 if passed else 1


def draw(out: Path, environment: dict[str, str]) -> list[str]:
    """The figures, by a process of their own; whatever becomes of it, the results stand. Gives what is lacking."""
    command = [sys.executable, "-m", "gpu_check.figures", str(out)]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=FIGURES)
    except subprocess.TimeoutExpired:
        return [f"stopped after {FIGURES:g} s"]
    lacking = [line.removeprefix("lacking: ") for line in result.stdout.splitlines() if line.startswith("lacking: ")]
    if result.returncode and not lacking:
        lacking.append((result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1])
    return lacking


def run_stage(name: str, record: Record, root: Path, work: Path, args: argparse.Namespace, limit: float) -> None:
    """One stage in a process of its own, which is stopped with all that it started when its time is up."""
    print(f"=== {name}: {STAGES[name].about} (at most {limit:.0f} s)", flush=True)
    command = [sys.executable, "-m", f"gpu_check.{name}", "--root", root, "--work", work, "--record", record.path]
    command += ["--rehearse"] * args.rehearse + (["--wheel", args.wheel.resolve()] if args.wheel else [])
    log = work / f"{name}.log"
    start = time.time()
    record["status"] = "running"
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=work / "run",  # an empty folder: the source tree must not hide what was installed
            env=environment(root, work, args.rehearse, start + limit),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    record.data = Record(record.path).data  # what the stage wrote
    if code is None:
        record.problem(f"stopped after {limit:.0f} s; what was measured until then is here")
        record["status"] = "out of time"
    elif code != 0 and not record["problems"]:
        record.problem(f"its process ended with status {code}")
        record["status"] = "failed"
    record["seconds"] = round(time.time() - start, 1)
    text = log.read_text(encoding="utf-8", errors="replace")
    if record["problems"]:
        record["log"] = text.splitlines()[-150:]
        print("\n".join(text.splitlines()[-40:]))
    print(f"=== {name}: {record['status']} in {record['seconds']:.0f} s", flush=True)


def environment(root: Path, work: Path, rehearsal: bool, ends: float) -> dict[str, str]:
    """What a stage's process sees: the installed package first, then this folder's packages."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TORCH_CUDA_ARCH_LIST")}
    bench = str(root / "bench")
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != bench]
    kept["PYTHONPATH"] = os.pathsep.join([str(work / "site"), bench, *others])
    kept |= {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", LIMIT: str(ends)}
    if rehearsal:  # a GPU that is there plays no part
        kept |= {"CUDA_VISIBLE_DEVICES": "", "MAXVA_REHEARSE": "1", "OMP_NUM_THREADS": "1"}
    return kept


def gpu_name() -> str | None:
    """The first GPU's name, or None where there is none."""
    if shutil.which("nvidia-smi"):
        result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        if match := re.search(r"^GPU \d+: (.+?) \(UUID", result.stdout, re.MULTILINE):
            return match[1]
    script = "import torch; print(torch.cuda.get_device_name())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return result.stdout.strip() or None


def folder(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3" """
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-") or "gpu"


def path_of(out: Path, stage: str, rehearsal: bool) -> Path:
    return out / (f"rehearsal_{stage}.json" if rehearsal else f"{stage}.json")


def _fresh(path: Path) -> Path:
    """Without what an earlier run left there, its figure included."""
    path.unlink(missing_ok=True)
    path.with_suffix(".png").unlink(missing_ok=True)
    return path


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process's whole group: first politely, so that a stage's own processes can end too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
