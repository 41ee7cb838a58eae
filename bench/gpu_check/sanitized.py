"""A small run of every kernel, for compute-sanitizer (sanitizer.py) to watch: sizes around packets and chunks, tensors
that begin anywhere in a packet, every dtype, option and scalar.

    python -m gpu_check.sanitized                     a run without fault
    python -m gpu_check.sanitized --fault bounds      one kernel reads beyond its tensor: memcheck must say so
    python -m gpu_check.sanitized --fault initial     one kernel reads what nothing wrote: initcheck must say so
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from torch.nn import Parameter

from gpu_check import machine, same_bits
from maxva_kernels import LaMAdam, MAdam, functional
from maxva_kernels.backends import cuda
from maxva_kernels.gpu import current_stream
from maxva_kernels.launch import DTYPE_CODES, NormLaunch
from maxva_kernels.tensor_table import make_norm_table

SIZES = (0, 1, 7, 513, 8193, 16_390)


def steps(gpu: Any) -> None:
    """Every step kernel: aligned and not, with and without all modes."""
    table = same_bits.cases()
    kinds = [kind for kind in same_bits.KINDS if (kind[0] == torch.float64) == (kind[1] == torch.float64)]
    for algorithm in (MAdam, LaMAdam):
        for param_dtype, grad_dtype, state_dtype in kinds if gpu.real else (kinds[0], kinds[-1]):
            tried = [(0, "all"), (1, "base")]
            if param_dtype == torch.bfloat16:
                tried += [(0, "all_and_master_weights"), (1, "master_weights"), (0, "stochastic_rounding")]
            for offset, option in tried:
                whole = [p.detach() for p in table.make_params([n + offset for n in SIZES], param_dtype, gpu.device)]
                params = [Parameter(tensor[offset:]) for tensor in whole]
                options = {**table.BASE, **same_bits.options_named(option), "state_dtype": state_dtype}
                optimizer: Any = algorithm(params, backend="cuda", **options)
                optimizer.grad_scale, optimizer.found_inf = (torch.full((), v, device=gpu.device) for v in (2.0, 0.0))
                for number in range(2):
                    table.set_grads(params, number, dtype=grad_dtype)
                    params[number + 2].grad = None
                    optimizer.step()
                optimizer.found_inf.fill_(2.0)
                optimizer.step()
    params = table.make_params(SIZES, torch.float32, gpu.device)
    optimizer = MAdam(params, capturable=True, backend="cuda", **table.BASE)  # the learning rate is on the device
    table.set_grads(params, 0)
    optimizer.step()


def norms(gpu: Any) -> None:
    """Every kernel of the norm."""
    for dtypes in (same_bits.FLOATS, same_bits.DTYPES):
        grads = [
            p.detach()[offset:]
            for dtype in dtypes
            for offset in (0, 1)
            for p in same_bits.cases().make_params([n + offset for n in SIZES], dtype, gpu.device)
        ]
        functional.grad_norm(grads, backend="cuda")


def read_beyond(gpu: Any) -> None:
    """Has the norm's kernel read a chunk where there is a part of one."""
    launcher = cuda._launcher()
    chunk = torch.ones(launcher.NORM_CHUNK, device=gpu.device)
    table = make_norm_table([chunk], launcher.NORM_CHUNK, launcher.MAX_TENSORS)
    grad, sums = torch.ones(1024, device=gpu.device), torch.zeros((table.chunks, 3), device=gpu.device)
    ((dtype, segment),) = table.segments
    address = grad.data_ptr().to_bytes(8, "little")
    stream = current_stream(gpu.device) if gpu.real else 0
    cut = (segment.rows, segment.chunk_rows, segment.chunks)
    launcher.norm_chunks(
        NormLaunch(gpu.device.index or 0, stream, DTYPE_CODES[dtype], False, *cut, address, sums.data_ptr())
    )


def read_unwritten(gpu: Any) -> None:
    functional.grad_norm([torch.empty(2048, device=gpu.device)], backend="cuda")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", choices=("bounds", "initial"))
    args = parser.parse_args()
    # Each tensor is its own piece of memory, so that what lies beyond one is nobody's.
    assert os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1"
    gpu = machine.need()
    if args.fault == "bounds":
        read_beyond(gpu)
    elif args.fault == "initial":
        read_unwritten(gpu)
    else:
        steps(gpu)
        norms(gpu)
    gpu.synchronize()
    print("the run is complete")


if __name__ == "__main__":
    main()
