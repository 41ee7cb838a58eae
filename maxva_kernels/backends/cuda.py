"""The C++/CUDA kernels (csrc/cuda)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .. import _ops, build_record, gpu
from ..groups import Group, Scaling, with_gradients
from ..launch import Launcher
from ..saturation import Saturation
from ..statistics import Recorder

NAME = "cuda"


def why_not(device: torch.device) -> str | None:
    error = _ops.load_error("_C_cuda")
    if error is not None:
        built = build_record.read().get("cuda", {})
        cause = error if built.get("built") else built.get("reason", error)
        return f"its kernels are not there ({cause}); reinstall with MAXVA_BUILD=cuda"
    if device.type != "cuda":
        return f"it drives CUDA tensors, and these are on {device}; move them, or let backend='auto' choose"
    if torch.version.hip is not None:
        return "this torch drives AMD GPUs; use backend='reference'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU here"
    return _why_not_device(torch.cuda.current_device() if device.index is None else device.index)


def _why_not_device(index: int) -> str | None:
    try:
        _launcher().probe(index)
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(index)
        return (
            f"its kernels do not run on {torch.cuda.get_device_name(index)} ({error}); if they were built for other "
            f"GPUs, reinstall with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return None


class _Launcher(Launcher):
    def probe(self, device: int, /) -> None:
        """Raises RuntimeError if the kernels cannot run on that device."""


def _launcher() -> _Launcher:
    return cast(_Launcher, _ops.module("_C_cuda"))


def grad_norm(grads: list[Tensor]) -> Tensor:
    if torch.compiler.is_compiling():
        return _ops.grad_norm(grads)
    return gpu.grad_norm(_launcher(), grads)


def update_norms(groups: Sequence[Group], laprop: bool, scaling: Scaling) -> Tensor:
    if torch.compiler.is_compiling():
        return _ops.call_update_norms(groups, laprop, scaling)
    return gpu.update_norms(_launcher(), groups, laprop, scaling)


def step(
    groups: Sequence[Group],
    laprop: bool,
    scaling: Scaling,
    recorder: Recorder | None = None,
    saturation: Saturation | None = None,
) -> None:
    if torch.compiler.is_compiling():
        _ops.call_step(with_gradients(groups), laprop, scaling, recorder=recorder)
    else:
        gpu.step(_launcher(), groups, laprop, scaling, recorder, saturation)
