"""The operators on CUDA tensors, for compiled graphs, which call each as one unit. Eager steps go to the backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _ops
from .backends.registry import select
from .groups import EPS_MODES, Group, Hyperparameters, Scaling, TensorLists


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    grad_means: list[Tensor],
    grad_vars: list[Tensor],
    weight_sums: list[Tensor],
    max_denoms: list[Tensor],
    steps: list[Tensor],
    *,
    laprop: bool,
    group_sizes: list[int],
    lr: Tensor,
    beta1: list[float],
    beta2_lower: list[float],
    beta2_upper: list[float],
    beta2_init: list[float],
    eps: list[float],
    weight_decay: list[float],
    decoupled_weight_decay: list[int],
    amsgrad: list[int],
    maximize: list[int],
    adam_eps: list[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    max_grad_norm: float = -1.0,
) -> None:
    groups, first, first_max = [], 0, 0
    for g, size in enumerate(group_sizes):
        hyper = Hyperparameters(
            lr=lr[g],
            beta1=beta1[g],
            beta2_range=(beta2_lower[g], beta2_upper[g]),
            eps=eps[g],
            weight_decay=weight_decay[g],
            beta2_init=beta2_init[g],
            decoupled_weight_decay=bool(decoupled_weight_decay[g]),
            amsgrad=bool(amsgrad[g]),
            maximize=bool(maximize[g]),
            eps_mode=EPS_MODES[adam_eps[g]],
        )

        def part(tensors: list[Any], first: int = first, size: int = size) -> list[Any]:
            return tensors[first : first + size]

        maxima = part(max_denoms, first_max) if amsgrad[g] else []
        tensors = TensorLists(
            *(part(params), part(grads), part(exp_avgs), part(grad_means), part(grad_vars), part(weight_sums)),
            max_denoms=maxima,
            steps=part(steps),
        )
        groups.append(Group(hyper, tensors))
        first, first_max = first + size, first_max + len(maxima)
    scaling = Scaling(grad_scale, found_inf, grad_norm, None if max_grad_norm < 0 else max_grad_norm)
    select("auto", params[0].device).step(groups, laprop, scaling)


def grad_norm(grads: list[Tensor]) -> Tensor:
    return select("auto", grads[0].device).grad_norm(grads)


_ops.library.impl("step_", step_, "CUDA")
_ops.library.impl("grad_norm", grad_norm, "CUDA")
