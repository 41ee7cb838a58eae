"""`bench/gpu_check.sh`, rehearsed: a GPU's time is short, and must not end at a wrong path, name or option."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from gpu_check import (  # noqa: E402
    contenders,
    correctness,
    machine,
    programme,
    sanitizer,
    sources,
    speed,
    stand_ins,
    table,
    trace,
)
from gpu_check.record import Record  # noqa: E402
from simulated_triton import has_right_interpreter  # noqa: E402

from maxva_kernels.backends import registry  # noqa: E402

MODULES = sorted((ROOT / "bench" / "gpu_check").glob("*.py"))
HAS_CPU_KERNELS = registry.why_not("cpu", torch.device("cpu")) is None


def test_rehearsal(tmp_path):
    """All of it once, in one test, since it takes a minute; then each of the checks below."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    before = {*os.listdir(ROOT)}
    result = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_check.sh"), "--rehearse", "--work", "work", "--minutes", "20"],
        env={**outer, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    built = {name for name in {*os.listdir(ROOT)} - before if name == "build" or name.endswith(".egg-info")}
    assert not built, "the checkout must stay as it was"
    records = {}
    for name in programme.STAGES:
        path = tmp_path / "out" / f"rehearsal_{name}.json"
        assert path.is_file(), result.stdout + result.stderr
        record = records[name] = json.loads(path.read_text())
        assert record["problems"] == [], (name, record["problems"], record.get("log", [])[-60:])
        assert record["status"] == "passed" or (record["status"] == "lacking" and record["lacking"]), name
    assert result.returncode == 0, result.stdout + result.stderr
    for check in CHECKS:
        check(records, tmp_path)


def check_nothing_of_it_can_be_taken_for_a_measurement(records, folder):
    """Guards against a rehearsal's figures quoted as a GPU's: each file and each line of the table says what it is."""
    for record in records.values():
        assert record["rehearsal"] is True
        assert "rehearsal" in record["device"]
    assert all(path.name.startswith("rehearsal_") for path in (folder / "out").iterdir())
    lines = (folder / "out" / "rehearsal_summary.txt").read_text().splitlines()
    assert len(lines) > 40
    assert all(line.startswith("REHEARSAL") for line in lines)


def check_build_installs_apart_from_the_sources(records, folder):
    site = folder / "work" / "site"
    assert records["build"]["report"][0].endswith(f" in {site.resolve() / 'maxva_kernels'}")
    assert (site / "maxva_kernels" / "triton_kernels" / "step.py").is_file()
    assert records["build"]["machine"]["torch"]


def check_correctness_runs_tests(records, folder):
    runs, lacking = records["correctness"]["runs"], records["correctness"]["lacking"]
    assert len(runs) == 3
    assert lacking or all(run["passed"] > 0 for run in runs)
    assert lacking or runs[0]["passed"] > 25
    assert all(run["failed"] == 0 for run in runs)
    expected = {"variants": 4, "differences": []} if HAS_CPU_KERNELS else None
    assert records["correctness"].get("table") == expected


def check_tritons_kernels_are_interpreted(records, folder):
    """Guards against an interpreter that is asked for and never starts: where it can run, its test must have passed,
    and have taken the seconds that interpreting takes."""
    run = records["correctness"]["runs"][2]
    can = has_right_interpreter() and HAS_CPU_KERNELS
    assert run["run"] == correctness.INTERPRETER
    assert (run["passed"], run["failed"]) == (int(can), 0), run
    assert not can or run["seconds"] > 2
    summary = (folder / "out" / "rehearsal_summary.txt").read_text()
    assert not can or f"REHEARSAL {correctness.INTERPRETER}: 1 passed" in summary


def check_figures_are_drawn(records, folder):
    """Guards against figures that are lost without a word."""
    pictures = [folder / "out" / f"rehearsal_{name}.png" for name in ("speed", "host", "training")]
    summary = (folder / "out" / "rehearsal_summary.txt").read_text()
    if importlib.util.find_spec("matplotlib") is None:
        assert "lacking (figures)" in summary
        return
    assert "lacking (figures)" not in summary
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def check_speed_has_all_contenders(records, folder):
    cases = records["speed"]["cases"]
    assert [(case["case"].split()[0], case["dtype"]) for case in cases] == [
        ("BERT-Base", "float32"),
        ("one", "float32"),
        ("BERT-Base", "bfloat16"),
        ("one", "bfloat16"),
    ]
    for case in cases:
        results = {result["name"]: result for result in case["results"]}
        ours = {f"{name}{kind}" for name in ("MAdam", "LaMAdam") for kind in ("", ", clipped", ", bfloat16 state")}
        assert {*ours, contenders.ADAMW, "AdamW (torch, foreach)", contenders.COPY, contenders.UPDATE} <= results.keys()
        moved = {"float32": (44, 48, 28, 28), "bfloat16": (38, 40, 22, 14)}[case["dtype"]]
        names = ("MAdam", "MAdam, clipped", "MAdam, bfloat16 state", contenders.ADAMW)
        assert [results[name]["bytes_per_parameter"] for name in names] == list(moved)
        for result in results.values():
            assert result["min"] <= result["ms"] <= result["max"]
            assert result["turns"]
        assert results[contenders.COPY]["share_of_copy"] == 1
        assert results[contenders.ADAMW]["of_adamw"] == 1
        counts = {name: sum(kind["count"] for kind in kinds) for name, kinds in case["launches"].items()}
        assert counts["MAdam"] == 1
        assert counts["MAdam, clipped"] == 3
    assert "MAdam (reference, eager)" in {result["name"] for result in cases[0]["results"]}
    compiled = records["speed"]["compiled"]["results"][0]
    assert compiled["name"] == "MAdam (paper, torch.compile)"
    assert not compiled["in_cache"], "the stand-in's L2 is one byte"


def check_host_tells_time_and_launches(records, folder):
    assert [case["case"].split()[0] for case in records["host"]["cases"]] == ["400", "BERT-Base", "10,000"]
    for case in records["host"]["cases"]:
        results = {result["name"]: result for result in case["results"]}
        assert {"MAdam", "MAdam, clipped", "MAdam, CUDA graph", contenders.ADAMW} <= results.keys()
        for name in ("MAdam", contenders.ADAMW):
            assert results[name]["us"] > 0
            assert results[name]["us_busy"] > 0
        assert case["launches"]["MAdam"]["launches"] == 1
        assert case["launches"]["MAdam, clipped"]["launches"] == 3
    assert [first["idle"] > 0 and first["busy"] > 0 for first in records["host"]["first_steps"]] == [True] * 3
    assert any("step_key" in line for line in records["host"]["functions"])


def check_sanitizer_has_its_controls(records, folder):
    runs = records["sanitizer"]["runs"]
    assert [(run["tool"], run["fault"], bool(run["ours"])) for run in runs] == [
        ("memcheck", "bounds", True),
        ("initcheck", "initial", True),
        ("racecheck", None, False),
    ]
    assert all(run["complete"] for run in runs)
    assert "--kernel-name" in runs[0]["command"]
    assert "--kernel-name" not in runs[1]["command"], "initcheck must see who wrote what our kernels read"


def check_simulator_is_compared(records, folder):
    if records["simulator"]["status"] == "lacking":
        return
    kernels = records["simulator"]["kernels"]
    assert {"norm, torch.float32", "halves (the same PTX)"} <= {kernel["kernel"] for kernel in kernels}
    assert all(kernel["differences"] == [] for kernel in kernels)


def check_training_tells_the_share(records, folder):
    results = {result["name"]: result for result in records["training"]["results"]}
    assert set(results) == {"AdamW (torch, fused)", "MAdam", "MAdam (reference, eager)"}
    for result in results.values():
        assert 0 < result["share"] < 1
        assert result["ms"] > result["optimizer_ms"] > 0
    # The stand-in launches nothing, so MAdam's model stays as it was, and AdamW's moves.
    assert len(set(results["MAdam"]["losses"])) == 1


CHECKS = [
    check_nothing_of_it_can_be_taken_for_a_measurement,
    check_build_installs_apart_from_the_sources,
    check_correctness_runs_tests,
    check_tritons_kernels_are_interpreted,
    check_figures_are_drawn,
    check_speed_has_all_contenders,
    check_host_tells_time_and_launches,
    check_sanitizer_has_its_controls,
    check_simulator_is_compared,
    check_training_tells_the_share,
]


# --- what a rehearsal does not reach ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [*MODULES, Path(__file__).with_name("test_cuda_gpu.py")], ids=lambda path: path.stem)
def test_names_of_torch_cuda(module):
    """Guards the code that only a GPU runs against names that are not there. This torch need not be that machine's, but
    none of them is new."""
    names = set(re.findall(r"\btorch\.cuda\.(\w+)", module.read_text(encoding="utf-8")))
    assert [name for name in names if not hasattr(torch.cuda, name)] == []


def public(cls):
    """The signatures of its methods, but for what they return."""
    found = inspect.getmembers(cls, inspect.isfunction)
    return {name: list(inspect.signature(value).parameters) for name, value in found if not name.startswith("_")}


def test_stand_in_has_the_gpus_face():
    """Guards against a rehearsal of calls that the GPU's side does not take."""
    gpu, stand_in = public(machine.Gpu), public(stand_ins.StandIn)
    assert gpu.pop("start") == ["self"]
    assert stand_in.pop("start") == ["self", "simulate", "patches"]
    assert gpu == stand_in


def test_gpus_side_runs(monkeypatch):
    """Executes the lines that a rehearsal passes by, on a torch.cuda in which everything is empty."""
    calls = []

    class Anything:
        L2_cache_size = 50

        def __init__(self, **options):
            pass

        def __getattr__(self, name):
            return lambda *arguments: calls.append(name)

        def elapsed_time(self, end):
            return 2.0

    empty = {name: lambda *a: calls.append("call") for name in ("synchronize", "empty_cache", "set_sync_debug_mode")}
    empty |= {name: lambda *a: contextlib.nullcontext() for name in ("stream", "graph")}
    empty |= dict.fromkeys(("Event", "Stream", "CUDAGraph", "current_stream"), Anything)
    empty |= {"get_device_properties": lambda device: Anything(), "_sleep": lambda cycles: calls.append(cycles)}
    empty |= {"current_device": lambda: 0, "get_device_name": lambda device: "one", "get_sync_debug_mode": lambda: 0}
    empty |= {"mem_get_info": lambda device: (5, 10), "memory_allocated": lambda device: 3}
    for name, value in empty.items():
        monkeypatch.setattr(torch.cuda, name, value)
    gpu = machine.Gpu()
    assert (gpu.name, gpu.device, gpu.real) == ("one", torch.device("cuda", 0), True)
    assert gpu.milliseconds(lambda: None, behind=3.0) == 2.0
    assert 75_000_000 in calls, "3 ms of a kernel that took 2 ms for 50 million cycles"
    assert gpu.milliseconds_of(lambda: None, lambda: None) == [2.0, 2.0]
    with gpu.no_waiting(), gpu.side_stream() as stream:
        gpu.join(stream)
    gpu.warm_up(lambda: calls.append("warm"), 2)
    assert calls.count("warm") == 2
    state = Anything()
    lives = weakref.ref(state)
    replay = gpu.capture(lambda state=state: calls.append("captured"))
    replay()
    assert calls[-2:] == ["captured", "replay"]
    del state
    assert lives() is not None, "a graph writes to its tensors at each replay: they must not be freed before it"
    del replay
    assert lives() is None
    assert (gpu.free_bytes(), gpu.allocated_bytes(), gpu.cache_bytes()) == (5, 3, 50)


def arguments(tmp_path, *stages, rehearse=True, minutes=5.0):
    return argparse.Namespace(
        stages=list(stages),
        rehearse=rehearse,
        out=tmp_path / "out",
        work=tmp_path / "work",
        minutes=minutes,
        wheel=None,
    )


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(programme, "gpu_name", lambda: None)
    assert programme.run(ROOT, arguments(tmp_path, rehearse=False)) == 2
    assert "--rehearse" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_gpu_is_named(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-01234567-89ab)"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert programme.gpu_name() == "NVIDIA H100 80GB HBM3"
    assert programme.folder("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert programme.path_of(tmp_path, "speed", False) == tmp_path / "speed.json"


def test_unknown_stage():
    command = ["bash", str(ROOT / "bench" / "gpu_check.sh"), "--rehearse", "sped"]
    result = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert result.returncode == 2
    assert "'sped'" in result.stderr
    assert "speed" in result.stderr


def test_stage_that_takes_too_long_is_stopped(tmp_path, monkeypatch, capsys):
    """Guards against a stage that hangs: it is ended with its processes, and recorded; and nothing runs unbuilt."""
    monkeypatch.setitem(programme.STAGES, "build", programme.Entry(0.3, "too short"))
    start = time.monotonic()
    assert programme.run(ROOT, arguments(tmp_path, "build", "host")) == 1
    assert time.monotonic() - start < 15
    build, host = (Record(tmp_path / "out" / f"rehearsal_{name}.json") for name in ("build", "host"))
    assert build["status"] == "out of time"
    assert "stopped after" in build["problems"][0]
    assert host["problems"] == ["the package was not built"]
    assert "out of time" in capsys.readouterr().out


def test_stage_that_dies_is_recorded(tmp_path, monkeypatch):
    """Guards against a crash, of CUDA say, that passes for success; what stood in the record stays."""
    monkeypatch.setitem(programme.STAGES, "nothing", programme.Entry(60, "has no module"))
    (tmp_path / "work" / "run").mkdir(parents=True)
    record = Record(tmp_path / "nothing.json")
    record["half"] = "a result"
    programme.run_stage("nothing", record, ROOT, tmp_path / "work", arguments(tmp_path), 60)
    record = Record(tmp_path / "nothing.json")
    assert record["status"] == "failed"
    assert record["half"] == "a result"
    assert "status 1" in record["problems"][0]
    assert any("gpu_check.nothing" in line for line in record["log"])


def test_table_of_stages_cut_short(tmp_path):
    """Guards the end of the programme: whatever a stage left, there is a table."""
    records = []
    for name in programme.STAGES:
        record = Record(tmp_path / f"{name}.json")
        record.data.update(stage=name, status="out of time", device="a GPU", cases=[{}], runs=[{}], results=[{}])
        records.append(record)
    records.append(Record(tmp_path / "never run.json"))
    text = table.summary(records, rehearsal=False)
    assert all(name in text for name in programme.STAGES)
    assert "REHEARSAL" not in text


def test_only_the_programmes_own_sources_count_as_built(tmp_path):
    """Guards against measuring an older build: a change of any source calls for a new one."""
    copy = tmp_path / "copy"
    sources.copy(ROOT, copy)
    assert not list(copy.rglob("*.so"))
    assert sources.fingerprint(copy) == sources.fingerprint(ROOT)
    (tmp_path / "work" / "site").mkdir(parents=True)
    assert not sources.is_current(copy, tmp_path / "work")
    sources.mark(copy, tmp_path / "work")
    assert sources.is_current(copy, tmp_path / "work")
    with (copy / "csrc" / "maxva.h").open("a") as file:
        file.write("// changed\n")
    assert not sources.is_current(copy, tmp_path / "work")


def test_trace_is_read():
    """Guards the launch counts: of a GPU's trace file only kernels, copies, fills and runtime calls are taken."""
    name = "void maxva::cuda::step_kernel<(maxva::Algorithm)0, float, float, float>(maxva::cuda::StepLaunch<float>)"
    kernel = {"ph": "X", "cat": "kernel", "name": name, "ts": 30, "dur": 12.5}
    kernel["args"] = {"stream": 7, "grid": [396, 1, 1], "block": [256, 1, 1], "registers per thread": 80}
    events = [
        kernel,
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 20, "dur": 1, "args": {"stream": 7}},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step#MAdam.step", "ts": 10, "dur": 50, "args": {}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 11, "dur": 5, "args": {}},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 11},
        {"ph": "M", "name": "process_name"},
    ]
    seen = trace.read(events)
    assert seen.names() == ["Memcpy HtoD", name]
    assert seen.calls == ["cudaLaunchKernel"]
    assert (seen.launches[1].stream, seen.launches[1].blocks, seen.launches[1].registers) == (7, 396, 80)
    assert [line["count"] for line in seen.summary()] == [1, 1]


CLEAN = "========= COMPUTE-SANITIZER\nthe run is complete\n========= ERROR SUMMARY: 0 errors\n"
OURS = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void maxva::cuda::norm_chunks_kernel<float, float>(maxva::cuda::NormLaunch<T1>)+0x3c0
=========         Host Frame: maxva::cuda::launch in _C_cuda.abi3.so
========= ERROR SUMMARY: 12 errors
"""
FOREIGN = """========= Program hit cudaErrorInvalidValue (error 1) on CUDA API call to cudaGetLastError.
the run is complete
========= ERROR SUMMARY: 1 error
"""
RACES = """========= Error: Race reported between Write access at void maxva::cuda::norm_total_kernel<float>(float)+0x20
the run is complete
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


@pytest.mark.parametrize(
    ("text", "errors", "ours", "complete"),
    [
        (CLEAN, 0, 0, True),
        (OURS, 12, 1, False),
        (FOREIGN, 1, 0, True),
        (RACES, 2, 1, True),
        ("Device not supported", None, 0, False),
    ],
    ids=["clean", "ours", "foreign", "races", "refused"],
)
def test_sanitizers_words_are_understood(text, errors, ours, complete):
    told = sanitizer.told(text)
    assert (told["errors"], told["ours"], told["complete"]) == (errors, ours, complete)


def test_junit_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="t" name="a" time="1.5"/>'
        '<testcase classname="t" name="b" time="0.5"><failure message="no"/></testcase>'
        '<testcase classname="t" name="c" time="0"><skipped message="no GPU"/></testcase>'
        '<testcase classname="t" name="d" time="0"><error message="broken"/></testcase>'
        '<testcase classname="" name="tests.test_paper" time="0"><error message="collection failure">'
        "E   ModuleNotFoundError: No module named 'hypothesis'</error></testcase></testsuite></testsuites>"
    )
    counts = correctness.counts(report)
    assert counts["missing"] == ["::tests.test_paper: hypothesis"]
    assert (counts["passed"], counts["failed"], counts["skipped"], counts["seconds"]) == (1, 2, 1, 2.0)
    assert counts["reasons of skips"] == {"no GPU": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_deviate_from_their_mean(dtype, monkeypatch):
    """Guards against a measurement of divisions of 0 by 0 in every coordinate, which take a GPU's kernels another way
    than training does, to which gradients that never change led."""
    kernels = registry._MODULES[registry.select("auto", torch.device("cpu")).NAME]
    monkeypatch.setitem(registry._MODULES, "cuda", kernels)
    monkeypatch.setattr(registry, "_selected", {})
    torch.manual_seed(0)
    entered = contenders.ours([(300, 100), (64,)], dtype, torch.device("cpu"), reference=False)
    for contender in entered:
        for _ in range(2 * (3 + 25)):  # two backends, whose turns these are
            contender.step()
    optimizers = {id(its): its for its in (contender.step.func.__defaults__[0] for contender in entered)}
    assert len(optimizers) == (6 if dtype == torch.float32 else 10)
    for optimizer in optimizers.values():
        same = torch.cat(
            [(param.grad == state["grad_mean"]).flatten() for param, state in optimizer.state.items()]
        ).double()
        assert same.mean() < 0.001


def test_figures():
    """Guards the arithmetic of the table: 44 bytes a parameter in 2 ms, beside a copy of 8 MB in 4 ms."""
    entered = [
        contenders.Contender("ours", lambda: None, 44_000_000, tensors=24_000_000),
        contenders.Contender(contenders.ADAMW, lambda: None, 28_000_000),
        contenders.Contender("eager", lambda: None, None),
        contenders.Contender(contenders.COPY, lambda: None, 8_000_000),
    ]
    times = {"ours": [1.0, 2.0, 9.0], contenders.ADAMW: [1.0], "eager": [50.0], contenders.COPY: [4.0]}
    ours, _, eager, copy = speed.figures(times, entered, 1_000_000, cache=50_000_000)
    assert (ours["ms"], ours["min"], ours["max"]) == (2.0, 1.0, 9.0)
    assert (ours["bytes_per_parameter"], ours["GB_per_s"], ours["of_adamw"]) == (44, 22, 2)
    assert (copy["GB_per_s"], copy["share_of_copy"], ours["share_of_copy"]) == (2, 1, 11)
    assert ours["in_cache"]
    assert "GB_per_s" not in eager


# --- the drawn figures -----------------------------------------------------------------------------------------------


def drawable(rehearsal=False):
    """A record of speed: 22 GB/s beside a copy at 44 GB/s."""
    common = {"min": 1.0, "max": 3.0, "of_adamw": 1.0}
    ours = {"name": "MAdam", "ms": 2.0, "GB_per_s": 22.0, "share_of_copy": 0.5, **common}
    eager = {"name": "MAdam (reference, eager)", "ms": 500.0, **common}
    copy = {"name": contenders.COPY, "ms": 4.0, "GB_per_s": 44.0, "share_of_copy": 1.0, **common}
    case = {"case": "one tensor", "dtype": "float32", "results": [ours, eager, copy]}
    return {"rehearsal": rehearsal, "device": "a GPU", "date": "2026-11-23 10:00:00", "cases": [case]}


def test_figure_of_the_speed():
    """Guards what the figure claims: the floor where the bytes are at the copy's rate, the share, the cut bar."""
    pytest.importorskip("matplotlib")
    from gpu_check import figures
    from matplotlib.collections import LineCollection
    from matplotlib.text import Text

    axes = figures.speed(drawable()).axes[0]
    texts = [text.get_text() for text in axes.findobj(Text)]
    assert "2.00 ms, 50.0% of copy" in texts
    assert "500 ms (cut)" in texts
    assert contenders.COPY not in texts, "its bytes are not the step's"
    lines = [line for drawn in axes.findobj(LineCollection) for line in drawn.get_segments()]
    assert [a[0] for a, b in lines if a[0] == b[0]] == [1.0], "the floor, half of 2 ms"


def test_figure_of_a_rehearsal_says_so():
    """Guards against a rehearsal's figure shown as a GPU's."""
    pytest.importorskip("matplotlib")
    from gpu_check import figures
    from matplotlib.text import Text

    for rehearsal in (False, True):
        texts = [text.get_text() for text in figures.speed(drawable(rehearsal)).findobj(Text)]
        assert sum("REHEARSAL" in text for text in texts) == 2 * rehearsal, "title and watermark"


def test_figures_of_stages_cut_short(tmp_path):
    """Guards the other figures against the record of a stage that broke off."""
    pytest.importorskip("matplotlib")
    (tmp_path / "speed.json").write_text(json.dumps(drawable()))
    (tmp_path / "host.json").write_text(json.dumps({"rehearsal": False, "status": "out of time"}))
    lacking = programme.draw(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT / "bench")})
    assert [line.split(":")[0] for line in lacking] == ["host.png"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"speed.png"}


@pytest.mark.parametrize(
    ("matplotlib", "limit", "said"),
    [
        ("raise ImportError('not here')", 60, "ImportError: not here"),
        ("import time; time.sleep(60)", 2, "stopped after 2 s"),
    ],
    ids=["missing", "hanging"],
)
def test_figures_are_no_condition(matplotlib, limit, said, tmp_path, monkeypatch):
    """Guards the programme's end against matplotlib: its figures are then lacking, and nothing else."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text(matplotlib)
    monkeypatch.setattr(programme, "FIGURES", limit)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "bench")])}
    (lacking,) = programme.draw(tmp_path, environment)
    assert said in lacking


def test_driver_imports_little():
    """Guards the driver against what can take it down."""
    script = "import sys, gpu_check.__main__; print(*{'torch', 'matplotlib', 'maxva_kernels'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
