"""What the launches of a backend's kernels are given, addresses, sizes and scalars."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .groups import Hyperparameters

# The numbers of csrc/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

# csrc/cuda/arguments.h (PackedGroup): lr and its address, six coefficients, four modes.
PACKED_GROUP = struct.Struct("=dQ6d4q")


class StepLaunch(NamedTuple):
    """What a step's launch is given. Addresses are of device memory; 0 is what is not there."""

    device: int
    stream: int
    param_dtype: int  # a number of DTYPE_CODES
    grad_dtype: int
    state_dtype: int
    laprop: bool
    amsgrad: bool  # whether any row has AMSGrad's maximum
    masters: bool  # whether any has a master
    rows: int  # address of the table
    chunk_rows: int  # address
    chunks: int
    ticket: int  # address
    groups: bytes  # PACKED_GROUP of each
    grads: bytes  # for each row eight bytes: the gradient's address
    grad_scale: int  # addresses of scalars of the arithmetic's type
    found_inf: int
    grad_norm: int
    trust_ratios: int  # address: for each row a number of the arithmetic's type
    statistics: int  # address: for each chunk a record of statistics.py
    saturation: int  # address: for each chunk a stamp of saturation.py
    squares: int  # addresses of what `Launcher.update_norms` fills: for each chunk six numbers,
    norms: int  # for each row two
    max_grad_norm: float


class NormLaunch(NamedTuple):
    """What the launch is given that sums the squares of chunks."""

    device: int
    stream: int
    grad_dtype: int  # a number of DTYPE_CODES
    double: bool  # the arithmetic is float64
    rows: int  # address of the table
    chunk_rows: int  # address
    chunks: int
    grads: bytes  # for each row eight bytes: the gradient's address
    sums: int  # address: for each chunk of all launches three numbers


class TotalLaunch(NamedTuple):
    """What the launch is given that adds up the chunks."""

    device: int
    stream: int
    double: bool
    sums: int  # address
    chunks: int
    norm: int  # address of the result


class Launcher(Protocol):
    """The compiled side of a backend, as csrc/cuda/module.cpp has it. It launches on the stream that it is given."""

    MAX_TENSORS: int
    MAX_GROUPS: int
    STEP_CHUNK: int
    NORM_CHUNK: int
    GRAPHS: bool  # whether its launches may be captured

    def step(self, launch: StepLaunch, /) -> None: ...

    def update_norms(self, launch: StepLaunch, /) -> None: ...

    def norm_chunks(self, launch: NormLaunch, /) -> None: ...

    def norm_total(self, launch: TotalLaunch, /) -> None: ...


def pack(hypers: Sequence[Hyperparameters], dtype: torch.dtype, device: torch.device) -> tuple[bytes, list[Tensor]]:
    """The groups' hyperparameters as bytes, and the learning rates whose addresses stand in them."""
    packed, rates = [], []
    for hyper in hypers:
        lr, address = hyper.lr, 0
        if isinstance(lr, Tensor):
            if lr.device == device or lr.device.type != "cpu":
                # Read there, when the kernel runs: nothing waits for it, and a captured graph sees what it is then.
                rates.append(lr.to(device, dtype, non_blocking=True))
                lr, address = 0.0, rates[-1].data_ptr()
            else:
                lr = lr.item()
        packed.append(
            PACKED_GROUP.pack(
                lr,
                address,
                hyper.beta1,
                *hyper.beta2_range,
                hyper.first_beta2,
                hyper.eps,
                hyper.weight_decay,
                hyper.decoupled_weight_decay,
                hyper.maximize,
                hyper.eps_mode == "adam",
                hyper.stochastic_rounding,
            )
        )
    return b"".join(packed), rates
