"""The tensor checks of backends without compiled bindings; csrc/operands.cpp makes the same ones for those with."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from . import layouts
from .groups import TENSOR_LISTS, Group, Scaling, arithmetic_dtype, joined, may_be_state

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A tensor in a message: the list and the index in it. An index counts the parameters that have a gradient.
ENTRY = re.compile(rf"\b({'|'.join(TENSOR_LISTS)})\[(\d+)\]")


def check_grads(grads: list[Tensor]) -> None:
    """Raises RuntimeError unless `grads` is a non-empty list of dense floating-point tensors."""
    _require(len(grads) > 0, "grads is empty; pass at least one tensor")
    for i, grad in enumerate(grads):
        _check_grad(grad, i)


def check_groups(groups: Sequence[Group]) -> None:
    """Raises RuntimeError, naming the tensor, unless one step can be done on all the groups' tensors."""
    params = joined(groups, "params")
    for hyper, tensors, _, keys in groups:
        for name in ("grads", "exp_avgs", "grad_means", "grad_vars", "weight_sums", "steps"):
            found = len(getattr(tensors, name))
            _require(found == len(tensors.params), f"{name} has {found} entries for {len(tensors.params)} params")
        found, expected = len(tensors.max_denoms), len(tensors.params) if hyper.amsgrad else 0
        _require(found == expected, f"max_denoms has {found} entries for {expected} params of groups with AMSGrad")
        found, expected = len(tensors.masters), len(tensors.params) if tensors.masters else 0
        _require(found == expected, f"masters has {found} entries for {expected} params")
        found, expected = len(keys), len(tensors.params) if keys or hyper.stochastic_rounding else 0
        _require(found == expected, f"rounding_keys has {found} entries for {expected} params")
    for i, param in enumerate(params):
        check_param(param, i)
        named, first = describe(param, "params", i), params[0]
        _require(
            param.device == first.device,
            f"{named} is on another device than {describe(first, 'params', 0)}; "
            "pass the parameters of each device in a call of their own",
        )
        _require(
            not layouts.may_overlap(param),
            f"{named} has elements that share memory (an expanded tensor?); use parameter.clone() or .contiguous()",
        )
    for i, grad in enumerate(joined(groups, "grads")):
        _check_grad(grad, i)
        _check_like(grad, "grads", i, params[i], i)
    # Of 16 bits where it can be rounded.
    exp_avgs = [avg if group.keys else None for group in groups for avg in group.tensors.exp_avgs]
    for name in ("exp_avgs", "grad_means", "grad_vars", "weight_sums"):
        for i, moment in enumerate(joined(groups, name)):
            _check_state(moment, name, i, params[i], i, exp_avgs[i])
    with_max = [hyper.amsgrad for hyper, tensors, *_ in groups for _ in tensors.params]
    param_indices = [i for i, amsgrad in enumerate(with_max) if amsgrad]
    for i, moment in enumerate(joined(groups, "max_denoms")):
        at = param_indices[i]
        _check_state(moment, "max_denoms", i, params[at], at, exp_avgs[at])
    have_masters = [bool(tensors.masters) for _, tensors, *_ in groups for _ in tensors.params]
    param_indices = [i for i, has_master in enumerate(have_masters) if has_master]
    for i, master in zip(param_indices, joined(groups, "masters"), strict=True):
        if master.numel() > 0:
            _check_master(master, i, params[i])  # the operator's list has an entry for each parameter of all groups
    for i, step in enumerate(joined(groups, "steps")):
        _require(
            step.dtype == torch.int64 and step.numel() == 1 and step.device == params[i].device,
            f"{describe(step, 'steps', i)} must be one torch.int64 on the device of {describe(params[i], 'params', i)}",
        )


def check_memory(tensors: Sequence[Tensor], name: str) -> None:
    """Raises RuntimeError unless each has the address of its elements, which is all that a GPU's kernels are given."""
    for i, tensor in enumerate(tensors):
        if tensor.numel() > 0 and tensor.data_ptr() == 0:
            raise RuntimeError(
                f"maxva: {describe(tensor, name, i)} has no memory: a {type(tensor).__name__} that stands for other "
                "tensors, or one whose storage was freed; pass what has the elements, or use backend='reference'"
            )


def check_scaling(scaling: Scaling) -> None:
    """Raises RuntimeError, naming it, unless each of its tensors is a scalar."""
    for name in ("grad_scale", "found_inf", "grad_norm"):
        scalar = getattr(scaling, name)
        _require(
            scalar is None or (scalar.numel() == 1 and scalar.dtype in (torch.float32, torch.float64)),
            f"{name} must be one float32 or float64",
        )


def check_param(param: Tensor, index: int) -> None:
    """Raises RuntimeError unless a parameter of this layout and dtype can be optimised."""
    _require(param.layout == torch.strided, f"params[{index}] is sparse, which is not supported; use a dense parameter")
    if param.dtype not in SUPPORTED:  # of others nothing is asked: lazy modules' have no shape yet
        raise RuntimeError(
            f"maxva: {describe(param, 'params', index)} must be float32, bfloat16, float16 or float64; for a complex "
            "one make a Parameter of torch.view_as_real(...), of which forward takes torch.view_as_complex"
        )


def describe(tensor: Tensor, name: str, index: int) -> str:
    """ "grads[3] (shape [2, 3], torch.float32, strides [3, 1], cpu)" """
    strides = f", strides {list(tensor.stride())}" if tensor.layout == torch.strided else ""
    return f"{name}[{index}] (shape {list(tensor.shape)}, {tensor.dtype}{strides}, {tensor.device})"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"maxva: {message}")


def _check_grad(grad: Tensor, index: int) -> None:
    _require(
        grad.layout == torch.strided,
        f"grads[{index}] is sparse, which is not supported; "
        "use .to_dense(), or sparse=False where the layer that makes it has that option",
    )
    named = describe(grad, "grads", index)
    _require(grad.dtype in SUPPORTED, f"{named} must be float32, bfloat16, float16 or float64")


def _check_state(
    tensor: Tensor, name: str, index: int, param: Tensor, param_index: int, exp_avg: Tensor | None
) -> None:
    _require(tensor.layout == torch.strided, f"{name}[{index}] is sparse, which is not supported; use .to_dense()")
    given = None if exp_avg is None else exp_avg.dtype
    required = given if given is not None and may_be_state(given, param) else arithmetic_dtype(param)
    named, its_param = describe(tensor, name, index), describe(param, "params", param_index)
    _require(
        tensor.dtype == required,
        f"{named} must be {required} as the state of {its_param}; was a checkpoint loaded in another dtype?",
    )
    _check_no_overlap(tensor, name, index)
    _check_like(tensor, name, index, param, param_index)


def _check_master(master: Tensor, index: int, param: Tensor) -> None:
    named, its_param = describe(master, "masters", index), describe(param, "params", index)
    _require(
        param.dtype == torch.bfloat16,
        f"{named} belongs to {its_param}, and only bfloat16 parameters have such masters; "
        "pass a tensor without elements",
    )
    _require(
        master.layout == torch.strided and master.dtype == torch.bfloat16,
        f"{named} must be dense and torch.bfloat16 as the master of {its_param}",
    )
    _check_no_overlap(master, "masters", index)
    _check_like(master, "masters", index, param, index)


def _check_no_overlap(tensor: Tensor, name: str, index: int) -> None:
    _require(
        not layouts.may_overlap(tensor),
        f"{describe(tensor, name, index)} has elements that share memory (an expanded tensor?); use .clone()",
    )


def _check_like(tensor: Tensor, name: str, index: int, param: Tensor, param_index: int) -> None:
    named, its_param = describe(tensor, name, index), describe(param, "params", param_index)
    _require(tensor.shape == param.shape, f"{named} must have the shape of {its_param}")
    _require(tensor.device == param.device, f"{named} must be on the device of {its_param}; move it there")
