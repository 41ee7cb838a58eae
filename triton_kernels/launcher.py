"""Launches the Triton kernels: what csrc/cuda/module.cpp is to the CUDA kernels, with the same functions.

Triton cannot pass kilobytes of arguments by value, so what travels with a launch, gradients' addresses and
hyperparameters, goes to the device in one small copy before it.
"""

from __future__ import annotations

import functools
import math
import struct
from array import array
from typing import Any

import torch
import triton.language as tl

from .grad_norm import norm_chunks_kernel, norm_total_kernel
from .step import step_kernel
from .update_norm import update_chunks_kernel, update_total_kernel

# By the codes of csrc/dtype.h.
_TYPES = {0: tl.float32, 1: tl.float64, 2: tl.float16, 3: tl.bfloat16}

# As maxva_kernels/launch.py packs a group: lr and its address, six coefficients, four modes.
_PACKED_GROUP = struct.Struct("=dQ6d4q")

# No contraction: results are those of the other backends, bit for bit.
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
# A step's programs for each multiprocessor: twice as many as fit it.
_PROGRAMS = 8
# Pinned memory that is kept for captures, in words of 8 bytes, and for how many copies like the last it must suffice.
_PINNED = 1 << 17
_COPIES = 8
# Bytes that the driver copies from pageable memory at once; for more it may wait for the stream (CUDA's notes on
# synchronization), and so they are copied to pinned memory first.
_STAGED = 1 << 16


class TritonLauncher:
    """Implements `maxva_kernels.launch.Launcher`; addresses are of memory of the device."""

    # One launch takes any number of tensors and groups.
    MAX_TENSORS = 1 << 30
    MAX_GROUPS = 1 << 30
    STEP_CHUNK = 8192
    NORM_CHUNK = 16384
    GRAPHS = True

    def __init__(self, device_type: str = "cuda"):
        self._device_type = device_type
        # What is left for captures, during which none can be had.
        self._pinned = torch.empty(0, dtype=torch.int64, device="cpu")
        self._captured: list[torch.Tensor] = []  # what captured graphs copy from at each replay

    def step(self, launch: Any, /) -> None:
        """Launches one step (`maxva_kernels.launch.StepLaunch`) on the device's current stream."""
        _sent, grads, integers, values, max_norm = self._send_step(launch)  # kept until the launch
        self.run(
            step_kernel,
            launch.chunks,
            launch.device,
            (
                *(launch.rows, launch.chunk_rows, launch.chunks, launch.ticket),
                *(grads, len(launch.grads) // 8, integers, values),
                *(launch.grad_scale, launch.found_inf, launch.grad_norm, max_norm),
                *(launch.trust_ratios, launch.statistics, launch.saturation),
            ),
            step_constants(launch),
        )

    def update_norms(self, launch: Any, /) -> None:
        """Launches the norms of parameters and updates (`StepLaunch`) on the device's current stream."""
        _sent, grads, integers, values, max_norm = self._send_step(launch)
        constants = update_constants(launch)
        self.run(
            update_chunks_kernel,
            launch.chunks,
            launch.device,
            (
                *(launch.rows, launch.chunk_rows, launch.chunks, grads, integers, values),
                *(launch.grad_scale, launch.found_inf, launch.grad_norm, max_norm, launch.squares),
            ),
            constants,
        )
        tensors = len(launch.grads) // 8
        arguments = (launch.rows, grads, tensors, launch.found_inf, launch.squares, launch.norms)
        self.run(
            update_total_kernel, tensors, launch.device, arguments, {name: constants[name] for name in ("T", "CHUNK")}
        )

    def _send_step(self, launch: Any) -> tuple[torch.Tensor, int, int, int, int]:
        """What travels with a step's launch: its memory, and the addresses in it of the gradients' addresses, the
        groups' integers and numbers, and max_grad_norm."""
        double = launch.param_dtype == 1
        integers, values = _hyperparameters(launch.groups, launch.max_grad_norm, double)
        sent = self._send(launch.grads + integers + values, launch.device)
        grads_at = sent.data_ptr()
        integers_at = grads_at + len(launch.grads)
        values_at = integers_at + len(integers)
        max_norm_at = values_at + len(values) - 2 * (8 if double else 4)  # the last but one
        return sent, grads_at, integers_at, values_at, max_norm_at

    def norm_chunks(self, launch: Any, /) -> None:
        """Launches the sums of squares of chunks (`NormLaunch`) on the device's current stream."""
        sent = self._send(launch.grads, launch.device)
        arguments = (launch.rows, launch.chunk_rows, launch.chunks, sent.data_ptr(), launch.sums)
        constants = {"T": _TYPES[int(launch.double)], "GRAD": _TYPES[launch.grad_dtype], "CHUNK": self.NORM_CHUNK}
        self.run(norm_chunks_kernel, launch.chunks, launch.device, arguments, constants)

    def norm_total(self, launch: Any, /) -> None:
        """Launches the root of the sum of all chunks (`TotalLaunch`) on the device's current stream."""
        arguments = (launch.sums, launch.chunks, launch.norm)
        self.run(norm_total_kernel, 1, launch.device, arguments, {"T": _TYPES[int(launch.double)]})

    def run(self, kernel: Any, chunks: int, device: int, arguments: tuple[int, ...], constants: dict[str, Any]) -> None:
        """Launches a kernel with a program for each chunk: a fixed number would have a last round that leaves
        multiprocessors idle. Only those of a step, which count each other, are few."""
        programs = max(1, min(chunks, _PROGRAMS * _processors(device)) if kernel is step_kernel else chunks)
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants, **options(constants))

    def _send(self, data: bytes, device: int) -> torch.Tensor:
        """Copies to the device; the memory may be dropped once a kernel that reads it has been launched."""
        host = torch.frombuffer(bytearray(data), dtype=torch.int64)
        if self._device_type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                host = self._pinned_copy(host)
            else:
                if self._pinned.numel() < _COPIES * host.numel():
                    words = max(_PINNED, 2 * _COPIES * host.numel())
                    self._pinned = torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=True)
                if host.nbytes > _STAGED:
                    host = host.pin_memory()  # which torch keeps until the copy is done
        return host.to(torch.device(self._device_type, device), non_blocking=True)

    def _pinned_copy(self, host: torch.Tensor) -> torch.Tensor:
        """For a graph, whose copies read their source at each replay: memory that stays, and that was pinned before."""
        if self._pinned.numel() < host.numel():
            raise RuntimeError(
                "maxva: no pinned memory is left for this step of a CUDA graph; run some steps on a side stream before "
                "each capture, as PyTorch's notes on CUDA graphs show"
            )
        pinned, self._pinned = self._pinned[: host.numel()], self._pinned[host.numel() :]
        self._captured.append(pinned.copy_(host))
        return pinned


def update_constants(launch: Any) -> dict[str, Any]:
    """What `update_chunks_kernel` is compiled for. Maxima and masters take registers, for want of which a thread would
    wait longer for memory: who has none does not pay for them."""
    return {
        "LAPROP": bool(launch.laprop),
        "T": _TYPES[int(launch.param_dtype == 1)],
        "PARAM": _TYPES[launch.param_dtype],
        "GRAD": _TYPES[launch.grad_dtype],
        "STATE": _TYPES[launch.state_dtype],
        "AMSGRAD": launch.amsgrad,
        "MASTERS": launch.masters,
        "CHUNK": TritonLauncher.STEP_CHUNK,
    }


def step_constants(launch: Any) -> dict[str, Any]:
    """What `step_kernel` is compiled for."""
    return {
        **update_constants(launch),
        "BLOCK": 256 if launch.param_dtype == 1 else 512,
        "STATISTICS": launch.statistics != 0,
    }


def options(constants: dict[str, Any]) -> dict[str, Any]:
    """How a kernel with these constants is compiled."""
    if "PARAM" not in constants:
        return _OPTIONS
    chosen = dict(_OPTIONS)
    if "BLOCK" not in constants:  # update_chunks_kernel, whose threads then have four lanes each
        chosen["num_warps"] = 8
    if constants["T"] is tl.float32:
        # ptxas, left to itself, chooses fewer registers on some architectures, and spills, or more. With 128 each, four
        # programs of a step fit a multiprocessor, two of an update's norm.
        chosen["maxnreg"] = 128
    return chosen


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _hyperparameters(groups: bytes, max_grad_norm: float, double: bool) -> tuple[bytes, bytes]:
    """What the kernel reads of the groups: six int64 each, and ten numbers of the arithmetic's type each; after
    these max_grad_norm. A 0 fills words of 8 bytes. csrc/maxva.h (make_hyperparameters) computes the same."""
    integers, values = array("q"), array("d")
    for group in _PACKED_GROUP.iter_unpack(groups):
        lr, lr_address, alpha, lower, upper, first, eps, weight_decay, decoupled, maximize, adam_eps, rounds = group
        decay_mode = 0 if weight_decay == 0 else 1 if decoupled else 2
        # alpha as a 64-bit fraction, whose bits a signed integer has too
        fraction = int(math.ldexp(alpha, 64))
        integers.extend((fraction - (1 << 64) * (fraction >> 63), lr_address, decay_mode, adam_eps, maximize, rounds))
        most = 2.0**-43 if double else 2.0**-14
        stall = (2.0**-53 if double else 2.0**-24) / (1 - upper) if upper < 1 else most
        values.extend((lr, eps, weight_decay, alpha, 1 - alpha, 1 - upper, 1 - lower, 1 - first, min(stall, most), 0.0))
    values.extend((max_grad_norm, 0.0))
    return integers.tobytes(), array("d" if double else "f", values).tobytes()  # rounded to nearest
