"""The C++ kernels for CPU tensors (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops, build_record, checks
from ..groups import Group, Scaling, joined, with_gradients
from ..saturation import Saturation
from ..statistics import Recorder

NAME = "cpu"


def why_not(device: torch.device) -> str | None:
    error = _ops.load_error("_C")
    if error is not None:
        built = build_record.read().get("cpu", {})
        cause = error if built.get("built") else built.get("reason", error)
        return f"its kernels are not there ({cause}); reinstall with MAXVA_BUILD=cpu and a C++ compiler"
    if device.type != "cpu":
        return f"it drives CPU tensors, and these are on {device}; move them, or let backend='auto' choose"
    _ops.cpu_capability()  # raises where the environment asks for one that is none
    return None


def grad_norm(grads: list[Tensor]) -> Tensor:
    try:
        return _ops.grad_norm(grads)
    except NotImplementedError:  # from the dispatcher: a sparse tensor, or one of another device
        checks.check_grads(grads)
        raise


def update_norms(groups: Sequence[Group], laprop: bool, scaling: Scaling) -> Tensor:
    try:
        return _ops.call_update_norms(groups, laprop, scaling)
    except NotImplementedError:  # as below
        checks.check_groups(groups)
        raise


def step(
    groups: Sequence[Group],
    laprop: bool,
    scaling: Scaling,
    recorder: Recorder | None = None,
    saturation: Saturation | None = None,
) -> None:
    groups = with_gradients(groups)
    try:
        _ops.call_step(groups, laprop, scaling, recorder=recorder, saturation=saturation)
    except NotImplementedError:  # from the dispatcher, whose message names no tensor
        checks.check_groups(groups)
        raise
    # The kernel writes behind autograd's back: a parameter saved for a backward pass must be known to have changed.
    torch.autograd.graph.increment_version(joined(groups, "params"))
