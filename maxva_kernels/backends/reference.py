"""The pure-torch backend: `maxva_kernels.reference` in float64, on any device. Oracle of the tests and last fallback.

Slow, and with ``found_inf`` it waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import checks, layouts, master, reference, rounding
from ..groups import Group, Scaling, with_gradients
from ..saturation import Saturation
from ..statistics import CHUNK, FIELDS, Recorder, is_sampled

NAME = "reference"


def why_not(device: torch.device) -> str | None:
    if device.type == "meta":
        return "on it tensors have no elements; give the model memory first (model.to_empty(device=...))"
    if device.type == "mps":
        return "it computes in float64, which mps devices do not; move the model to the CPU"
    return None


def grad_norm(grads: list[Tensor]) -> Tensor:
    checks.check_grads(grads)
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]))
    finite = torch.stack([grad.isfinite().all() for grad in grads]).all()
    return torch.where(finite, norm.clamp(max=torch.finfo(dtype).max), norm).to(dtype)


def step(
    groups: Sequence[Group],
    laprop: bool,
    scaling: Scaling,
    recorder: Recorder | None = None,
    saturation: Saturation | None = None,
) -> None:
    groups = with_gradients(groups)
    checks.check_groups(groups)
    checks.check_scaling(scaling)
    if scaling.found_inf is not None and scaling.found_inf.item() != 0:
        return
    for count, group in enumerate(groups):
        before = sum(len(other.tensors.params) for other in groups[:count])
        tensors = group.tensors
        for i, param in enumerate(tensors.params):
            ratio = 1.0 if scaling.trust_ratios is None else scaling.trust_ratios[before + i].to(param.device)
            after = _advance(group, i, laprop, scaling, ratio)
            tensors.steps[i] += 1
            if recorder is not None:
                _record(recorder, group, i, after, scaling)
            _store_param(group, i, after.theta)
            _store(group, i, reference.from_paper(after.state))
            if after.max_denom is not None:
                tensors.max_denoms[i].copy_(after.max_denom)


def update_norms(groups: Sequence[Group], laprop: bool, scaling: Scaling) -> Tensor:
    checks.check_groups(groups)
    checks.check_scaling(scaling)
    norms = []
    for group in groups:
        hyper = replace(group.hyper, lr=1.0)
        for i in range(len(group.tensors.params)):
            after = _advance(group._replace(hyper=hyper), i, laprop, scaling)
            theta, change = _value(group, i), after.adaptive
            if hyper.decoupled_weight_decay:
                change = change + hyper.weight_decay * theta
            norms.append(torch.stack([torch.linalg.vector_norm(theta), torch.linalg.vector_norm(change)]))
    return torch.stack(norms)


def _advance(group: Group, i: int, laprop: bool, scaling: Scaling, trust_ratio: float | Tensor = 1.0) -> reference.Step:
    """The next step of parameter ``i`` of a group, in float64."""
    tensors, lr = group.tensors, group.hyper.lr
    if isinstance(lr, Tensor):  # of any shape with one element, and of any dtype
        lr = lr.double().reshape(())
    grad = tensors.grads[i]
    assert grad is not None
    moments = (tensors.exp_avgs[i], tensors.grad_means[i], tensors.grad_vars[i], tensors.weight_sums[i])
    return reference.advance(
        _value(group, i),
        grad.double() * _grad_factor(scaling),
        reference.to_paper(*moments, torch.float64),
        int(tensors.steps[i]) + 1,
        replace(group.hyper, lr=lr * trust_ratio),
        laprop=laprop,
        max_denom=tensors.max_denoms[i].double() if group.hyper.amsgrad else None,
    )


def _master(group: Group, i: int) -> Tensor | None:
    masters = group.tensors.masters
    return masters[i] if masters and masters[i].numel() > 0 else None


def _value(group: Group, i: int) -> Tensor:
    """Parameter ``i`` of a group, or its master weight, in float64."""
    param, rest = group.tensors.params[i], _master(group, i)
    return param.double() if rest is None else master.join_master(param, rest).double()


def _record(recorder: Recorder, group: Group, i: int, after: reference.Step, scaling: Scaling) -> None:
    """Writes the statistics of parameter ``i`` of a group, chunk by chunk."""
    param, grad = group.tensors.params[i], group.tensors.grads[i]
    assert grad is not None
    lower, upper = group.hyper.beta2_range
    of_each = torch.stack(
        [
            torch.ones_like(after.beta),
            after.adaptive.abs(),
            1 - after.beta,
            (after.beta == upper).double(),
            (after.beta == lower).double(),
            (grad.double() * _grad_factor(scaling)).square(),
        ],
        dim=-1,
    )
    strides = layouts.dense_strides(param)
    in_memory = of_each.new_empty_strided((*param.shape, len(FIELDS)), (*(len(FIELDS) * s for s in strides), 1))
    in_memory.copy_(of_each)
    rows = in_memory.as_strided((param.numel(), len(FIELDS)), (len(FIELDS), 1))
    records = recorder.table([(group.number, param.numel())], param.device)
    for chunk, (record, its) in enumerate(zip(records, rows.split(CHUNK), strict=False)):
        if is_sampled(chunk):
            record.copy_(its.sum(0))


def _store(group: Group, i: int, values: Sequence[Tensor]) -> None:
    """Writes the moments of parameter ``i`` of a group after a step that has been counted."""
    tensors = group.tensors
    moments = (tensors.exp_avgs[i], tensors.grad_means[i], tensors.grad_vars[i], tensors.weight_sums[i])
    if moments[0].dtype != torch.bfloat16:
        for moment, value in zip(moments, values, strict=True):
            moment.copy_(_flush_subnormal(value, moment.dtype))
        return
    for moment, value, its in zip(moments, values, _random(group, i), strict=False):
        moment.copy_(rounding.round_stochastically(_flush_subnormal(value, moment.dtype).float(), its))


def _store_param(group: Group, i: int, theta: Tensor) -> None:
    """Writes parameter ``i`` of a group, and its master, after a step that has been counted."""
    param, rest = group.tensors.params[i], _master(group, i)
    if rest is not None:
        value, its_rest = master.split_master(theta.float())
        param.copy_(value)
        rest.copy_(its_rest)
    elif group.hyper.stochastic_rounding and param.dtype == torch.bfloat16:
        param.copy_(rounding.round_stochastically(theta.float(), _random(group, i)[-1]))
    else:
        param.copy_(theta)


def _random(group: Group, i: int) -> list[Tensor]:
    """What parameter ``i`` of a group and its moments are rounded by, in its shape."""
    param = group.tensors.params[i]
    strides = layouts.dense_strides(param)
    elements = torch.arange(param.numel(), device=param.device)
    random = rounding.random_bits(group.keys[i], int(group.tensors.steps[i]), elements)
    return [its.as_strided(param.shape, strides) for its in random]


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
