"""What an optimizer costs under PyTorch's distributed engines: its memory on each rank, and the host time of a step.

    python bench/engines.py                 two processes on this machine's CPU, by gloo
    python bench/engines.py --ranks 4 --json FILE

The model is 400 small tensors, so that the time is that of Python, dispatch and collectives, as it is on a GPU that
waits for its host. Contenders take turns within each engine; medians of rank 0 with the range in brackets. Clipping
is `clip_grad_norm_` before AdamW, which writes the gradients, and part of the step in MAdam. Not controlled: clock
frequency, other processes, and that the ranks share the cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import OPTIONS, Contender, bytes_of, measure
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from maxva_kernels import LaMAdam, MAdam

TENSORS, ELEMENTS = 400, 24
CLIP = 1.0


class Tensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(torch.randn(ELEMENTS)) for _ in range(TENSORS))

    def forward(self) -> torch.Tensor:
        return torch.stack([tensor.square().sum() for tensor in self.tensors]).sum()


def shard(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def replicate(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


ENGINES: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "one process": (lambda model: model, False),
    "DDP": (replicate, False),
    "FSDP2": (shard, False),
    "ZeroRedundancyOptimizer": (replicate, True),
}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "AdamW (torch, fused)": (torch.optim.AdamW, {"fused": True}, False),
    "AdamW (torch, foreach)": (torch.optim.AdamW, {"foreach": True}, False),
    "MAdam": (MAdam, {}, False),
    "LaMAdam": (LaMAdam, {}, False),
    "AdamW (torch, fused), clip_grad_norm_": (torch.optim.AdamW, {"fused": True}, True),
    "AdamW (torch, foreach), clip_grad_norm_": (torch.optim.AdamW, {"foreach": True}, True),
    "MAdam, clipped": (MAdam, {"max_grad_norm": CLIP}, False),
}


def contender(name: str, engine: str) -> tuple[Contender, int]:
    """One that steps on gradients of a real backward pass, and the bytes of its state on this rank."""
    wrap, zero = ENGINES[engine]
    cls, options, clips = OPTIMIZERS[name]
    model = wrap(Tensors())
    model().backward()
    params = list(model.parameters())
    settings = {**OPTIONS, **options}
    optimizer = ZeroRedundancyOptimizer(params, cls, **settings) if zero else cls(params, **settings)

    def step() -> None:
        if clips:
            nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()

    step()
    state = (optimizer.optim if zero else optimizer).state
    tensors = [value for entries in state.values() for value in entries.values() if isinstance(value, torch.Tensor)]
    return Contender(name, step, 0), bytes_of([t.to_local() if isinstance(t, DTensor) else t for t in tensors])


def on_rank(rank: int, ranks: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    record = []
    for engine in ENGINES:
        pairs = [contender(name, engine) for name in OPTIMIZERS]
        results = measure([each for each, _ in pairs], rounds)
        for result, (_, state) in zip(results, pairs, strict=True):
            most = torch.tensor(state)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            times = [second * 1e6 for second in result.seconds]
            record.append(
                {
                    "engine": engine,
                    "name": result.name,
                    "us": result.median * 1e6,
                    "range": [min(times), max(times)],
                    "state_bytes_per_parameter": most.item() / (TENSORS * ELEMENTS),
                }
            )
    if rank == 0:
        Path(folder, "record.json").write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60, help="steps timed of each contender")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(on_rank, (args.ranks, args.rounds, folder), nprocs=args.ranks)
        results = json.loads(Path(folder, "record.json").read_text())
    print(f"torch {torch.__version__}, {args.ranks} ranks by gloo, {TENSORS} tensors of {ELEMENTS} float32\n")
    print(f"{'':24}{'':41}{'host us':>9} {'[min, max]':>16} {'/ fused':>8} {'state B/param':>14}")
    for engine in ENGINES:
        rows = [row for row in results if row["engine"] == engine]
        for row in rows:
            base = next(each for each in rows if each["name"].endswith("clip_grad_norm_") == ("clip" in row["name"]))
            print(
                f"{engine if row is rows[0] else '':24}{row['name']:41}{row['us']:9.0f} "
                f"{'[{:.0f}, {:.0f}]'.format(*row['range']):>16} {row['us'] / base['us']:8.2f} "
                f"{row['state_bytes_per_parameter']:14.2f}"
            )
    if args.json:
        record = {
            "torch": torch.__version__,
            "ranks": args.ranks,
            "tensors": TENSORS,
            "elements": ELEMENTS,
            "date": time.strftime("%Y-%m-%d"),
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
