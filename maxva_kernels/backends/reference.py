"""The pure-torch backend: `maxva_kernels.reference` in float64, on any device. Oracle of the tests and last fallback.

Slow, and with ``found_inf`` it waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import checks, reference
from ..groups import Group, Scaling, with_gradients

NAME = "reference"


def why_not(device: torch.device) -> str | None:
    if device.type in ("mps", "meta"):
        return f"it computes in float64, which {device.type} devices do not; move the model to the CPU"
    return None


def grad_norm(grads: list[Tensor]) -> Tensor:
    checks.check_grads(grads)
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]))
    finite = torch.stack([grad.isfinite().all() for grad in grads]).all()
    return torch.where(finite, norm.clamp(max=torch.finfo(dtype).max), norm).to(dtype)


def step(groups: Sequence[Group], laprop: bool, scaling: Scaling) -> None:
    groups = with_gradients(groups)
    checks.check_groups(groups)
    checks.check_scaling(scaling)
    if scaling.found_inf is not None and scaling.found_inf.item() != 0:
        return
    factor = _grad_factor(scaling)
    for hyper, tensors in groups:
        if isinstance(hyper.lr, Tensor):  # of any shape with one element, and of any dtype
            hyper = replace(hyper, lr=hyper.lr.double().reshape(()))
        for i, (param, grad) in enumerate(zip(tensors.params, tensors.grads, strict=True)):
            assert grad is not None
            tensors.steps[i] += 1
            moments = (tensors.exp_avgs[i], tensors.grad_means[i], tensors.grad_vars[i], tensors.weight_sums[i])
            max_denom = tensors.max_denoms[i] if hyper.amsgrad else None
            theta, state, new_max = reference.step(
                param.double(),
                grad.double() * factor,
                reference.to_paper(*moments, torch.float64),
                int(tensors.steps[i]),
                hyper,
                laprop=laprop,
                max_denom=None if max_denom is None else max_denom.double(),
            )
            param.copy_(theta)
            for moment, value in zip(moments, reference.from_paper(state), strict=True):
                moment.copy_(_flush_subnormal(value, moment.dtype))
            if max_denom is not None and new_max is not None:
                max_denom.copy_(new_max)


def _grad_factor(scaling: Scaling) -> float | Tensor:
    """min(1, max_grad_norm / norm) / grad_scale."""
    factor: float | Tensor = 1.0
    if scaling.grad_scale is not None:
        factor = 1 / scaling.grad_scale.double().reshape(())
    if scaling.grad_norm is not None and scaling.max_grad_norm is not None:
        factor = factor * (scaling.max_grad_norm / (scaling.grad_norm.double() * factor)).clamp(max=1)
    return factor


def _flush_subnormal(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Below the smallest normal number of the stored dtype, 0 is stored, as by every other backend."""
    return torch.where(value.abs() < torch.finfo(dtype).tiny, 0, value)
