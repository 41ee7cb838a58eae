"""The Triton kernels (triton_kernels)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops, build_record, gpu
from ..groups import Group, Scaling, with_gradients
from ..launch import Launcher
from ..saturation import Saturation
from ..statistics import Recorder

NAME = "triton"


@functools.cache
def _import_error() -> ImportError | None:
    try:
        from ..triton_kernels import launcher  # noqa: F401
    except ImportError as error:
        return error
    return None


def why_not(device: torch.device) -> str | None:
    error = _import_error()
    if error is not None and (error.name or "").startswith("maxva_kernels"):
        return (
            f"its kernels are not in {build_record.PACKAGE}, a source tree, which has them beside the package; run "
            "from another folder, or install it (pip install .)"
        )
    if error is not None:
        return f"Triton cannot be imported ({error}); install it with: pip install triton"
    if device.type != "cuda":
        return f"it drives GPU tensors, and these are on {device}; move them, or let backend='auto' choose"
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if torch.version.hip is not None:
        return "its kernels were never tested on AMD GPUs; use backend='reference'"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton does not support {torch.cuda.get_device_name(device)}; use backend='cuda'"
    return None


@functools.cache
def _launcher() -> Launcher:
    from ..triton_kernels.launcher import TritonLauncher

    return TritonLauncher()


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
