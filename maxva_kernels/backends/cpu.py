"""The C++ kernels for CPU tensors (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops, build_record, checks
from ..groups import Group, Hyperparameters, Scaling, joined

NAME = "cpu"


def why_not(device: torch.device) -> str | None:
    error = _ops.load_error("_C")
    if error is not None:
        built = build_record.read().get("cpu", {})
        cause = error if built.get("built") else built.get("reason", error)
        return f"its kernels are not there ({cause}); reinstall with MAXVA_BUILD=cpu and a C++ compiler"
    if device.type != "cpu":
        return f"it drives CPU tensors, and these are on {device}; move them, or let backend='auto' choose"
    return None


def grad_norm(grads: list[Tensor]) -> Tensor:
    try:
        return _ops.grad_norm(grads)
    except NotImplementedError:  # from the dispatcher: a sparse tensor, or one of another device
        checks.check_grads(grads)
        raise


def step(groups: Sequence[Group], laprop: bool, scaling: Scaling) -> None:
    hypers = [group.hyper for group in groups]
    params = joined(groups, "params")
    try:
        _ops.step_(
            params,
            joined(groups, "grads"),
            joined(groups, "exp_avgs"),
            joined(groups, "grad_means"),
            joined(groups, "grad_vars"),
            joined(groups, "weight_sums"),
            joined(groups, "max_denoms"),
            joined(groups, "steps"),
            laprop=laprop,
            group_sizes=[len(group.tensors.params) for group in groups],
            lr=_rates(hypers),
            beta1=[hyper.beta1 for hyper in hypers],
            beta2_lower=[hyper.beta2_range[0] for hyper in hypers],
            beta2_upper=[hyper.beta2_range[1] for hyper in hypers],
            beta2_init=[hyper.first_beta2 for hyper in hypers],
            eps=[hyper.eps for hyper in hypers],
            weight_decay=[hyper.weight_decay for hyper in hypers],
            decoupled_weight_decay=[int(hyper.decoupled_weight_decay) for hyper in hypers],
            amsgrad=[int(hyper.amsgrad) for hyper in hypers],
            maximize=[int(hyper.maximize) for hyper in hypers],
            adam_eps=[int(hyper.eps_mode == "adam") for hyper in hypers],
            grad_scale=scaling.grad_scale,
            found_inf=scaling.found_inf,
            grad_norm=scaling.grad_norm,
            max_grad_norm=-1.0 if scaling.max_grad_norm is None else scaling.max_grad_norm,
        )
    except NotImplementedError:  # from the dispatcher, whose message names no tensor
        checks.check_groups(groups)
        raise
    # The kernel writes behind autograd's back: a parameter saved for a backward pass must be known to have changed.
    torch.autograd.graph.increment_version(params)


def _rates(hypers: Sequence[Hyperparameters]) -> Tensor:
    """The groups' learning rates as the operator takes them."""
    if any(isinstance(hyper.lr, Tensor) for hyper in hypers):
        return torch.stack([torch.as_tensor(hyper.lr, dtype=torch.float64).reshape(()) for hyper in hypers])
    return torch.tensor([hyper.lr for hyper in hypers], dtype=torch.float64)
