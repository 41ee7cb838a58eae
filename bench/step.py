"""How long one optimizer step takes, beside AdamW, the eager reference and the floor that memory sets.

    python bench/step.py                        on a CPU two minutes: 100 M parameters in 25 tensors; then with --quick
                                                BERT-Base, 10,000 tensors, and 400 of one element (host time)
    python bench/step.py --out DIR              writes all turns to DIR/step.json and a figure to DIR/step.png as well
    python bench/step.py --shapes gpt2 resnet50 --dtype bfloat16
    python bench/step.py --shapes 100m --amsgrad --max-grad-norm 1
    python bench/step.py --shapes 100m --quick --features   what the optimizer's options cost
    python bench/step.py --backend cuda triton  both GPU backends in the same turns

Contenders take turns, so that a slow moment of a shared machine meets all of them; medians with the range in brackets.
They step on the same parameters and gradients, each with its own state. Where these would stay in the cache there are
copies that are stepped on in turns, four times the cache in all; few parameters are bound by the host, and have one.
Bytes are what a step must move, each operand once each way, and not measured. The floor is those bytes at the rate of
a copy on the device, measured in the same turns; on a CPU at that of in-place updates of six arrays, as many as a step
reads (a copy would pay for reading what it overwrites, and is no ceiling). Eager code comes after the others in turns
of its own: its temporaries would leave them a cold machine; in one large tensor most of its time would be page faults.

On a GPU the time is the device's, and host time is until step() returns; on a CPU they are the same. Not controlled:
clock frequency, other processes, huge pages, NUMA placement, and what a real training step leaves in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_check.build import output, processor
from gpu_check.machine import Gpu
from stepbench import contenders, report
from stepbench.case import Case, run
from stepbench.contenders import OPTIONS, Contender, Missing, Options, bytes_of
from stepbench.cpu import Cpu
from stepbench.shapes import DTYPES, SHAPES, TITLES, bert_shapes
from stepbench.timing import measure

from maxva_kernels import _ops
from maxva_kernels.backends import registry

__all__ = ["OPTIONS", "Contender", "bert_shapes", "bytes_of", "measure"]  # for the other benchmarks

DEFAULT = {"100m": False, "bert-base": True, "10k": True, "tiny": True}  # and whether with --quick


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Any]:
    """The arguments, with the backends that they mean, and the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    titles = "; ".join(f"{name}: {title}" for name, title in TITLES.items())
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", help=f"which tensors ({titles})")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"], help="of parameters and gradients")
    names = ("auto", *registry.BACKENDS)
    parser.add_argument("--backend", choices=names, nargs="+", default=["auto"], help="of MAdam and LaMAdam")
    parser.add_argument("--amsgrad", action="store_true")
    parser.add_argument(
        "--max-grad-norm", type=float, metavar="NORM", help="clip; the others by clip_grad_norm_ before"
    )
    parser.add_argument("--saturated", action="store_true", help="set MAdam's w to 1, as after some thousand steps")
    parser.add_argument(
        "--features", action="store_true", help=f"MAdam with each of these as well: {', '.join(contenders.FEATURES)}"
    )
    parser.add_argument("--quick", action="store_true", help="leave out eager code and what compiles at first use")
    parser.add_argument("--rounds", type=int, default=Case.rounds, help="at most so many turns (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=Case.seconds, help="after which turns end, but for the first 8 (%(default)s)"
    )
    parser.add_argument("--copies", type=int, help="so many sets of tensors (default: by the cache)")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all turns to this file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write step.json and step.png there")
    args = parser.parse_args(arguments)
    for name in ("rounds", "copies", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    wanted = set(args.backend)
    on_gpu = bool(wanted & {"cuda", "triton"}) or ("cpu" not in wanted and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        args.backends = list(dict.fromkeys(registry.select(name, device).NAME for name in args.backend))
        return args, Gpu() if on_gpu else Cpu()
    except RuntimeError as error:
        parser.error(str(error))


def facts(args: argparse.Namespace, machine: Any) -> dict[str, Any]:
    """What the results depend on."""
    root = str(Path(__file__).resolve().parents[1])
    commit = output(["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40"]).strip()
    about: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "cache_bytes": machine.cache_bytes()}
    if machine.device.type == "cuda":
        about["gpu"] = machine.name
    elif _ops.load_error("_C") is None:
        about["kernels"] = _ops.cpu_capability()
    return {
        "torch": torch.__version__,
        "commit": commit,
        "machine": about,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "runs": [],
    }


def main(arguments: list[str] | None = None) -> int:
    args, machine = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    record = facts(args, machine)
    about = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    print(f"torch {record['torch']}, {record['threads']} threads, {about}")
    options = Options(args.amsgrad, args.max_grad_norm, args.saturated)
    limits = {"rounds": args.rounds, "seconds": args.seconds, "copies": args.copies, "features": args.features}
    wanted = dict.fromkeys(args.shapes, args.quick) if args.shapes else DEFAULT
    for name, quick in wanted.items():
        for dtype in args.dtype:
            try:
                done = run(Case(name, dtype, options, args.backends, quick or args.quick, **limits), machine)
            except Missing as missing:
                print(f"\n{TITLES[name]}, {dtype}: {missing}")
                continue
            record["runs"].append(done)
            print(report.table(done), flush=True)
            machine.free_bytes()  # which on a GPU gives back what was freed
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    for path in [path for path in (args.json, args.out and args.out / "step.json") if path]:
        path.write_text(json.dumps(record, indent=1) + "\n")
    if args.out:
        try:
            report.draw(record, args.out / "step.png")
        except ImportError as error:
            print(f"no figure: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
