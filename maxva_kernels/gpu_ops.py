"""The operators on CUDA tensors, for compiled graphs, which call each as one unit. Eager steps go to the backend."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from . import _ops
from .backends.registry import select
from .groups import EPS_MODES, Group, Hyperparameters, Scaling, TensorLists
from .statistics import Recorder, chunks_of


def step_(
    *lists: list[Any],
    laprop: bool,
    group_sizes: list[int],
    lr: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    max_grad_norm: float = -1.0,
    trust_ratios: Tensor | None = None,
    rounding_keys: Sequence[int] = (),
    statistics: Tensor | None = None,
    update_norms: Tensor | None = None,
    saturation: None = None,  # compiled graphs have none
    **of_groups: list[Any],
) -> None:
    given = {name: iter(tensors) for name, tensors in zip(_ops.STEP_LISTS, lists, strict=True)}
    keys = iter(rounding_keys)
    groups = []
    for g, size in enumerate(group_sizes):
        own = {name: values[g] for name, values in of_groups.items()}
        hyper = Hyperparameters(
            lr=lr[g],
            beta2_range=(own.pop("beta2_lower"), own.pop("beta2_upper")),
            eps_mode=EPS_MODES[own.pop("adam_eps")],
            **{name: bool(value) if isinstance(value, int) else value for name, value in own.items()},
        )
        # max_denoms has the tensors of groups with AMSGrad alone, masters those of all or none
        counts = {name: 0 if name == "max_denoms" and not hyper.amsgrad else size for name in given}
        tensors = TensorLists(**{name: list(islice(given[name], counts[name])) for name in given})
        groups.append(Group(hyper, tensors, keys=list(islice(keys, size))))
    scaling = Scaling(grad_scale, found_inf, grad_norm, None if max_grad_norm < 0 else max_grad_norm, trust_ratios)
    backend = select("auto", lists[0][0].device)
    if update_norms is not None:
        update_norms.copy_(backend.update_norms(groups, laprop, scaling))
    else:
        backend.step(groups, laprop, scaling, None if statistics is None else _GivenTable(statistics))


class _GivenTable(Recorder):
    """Has the records of a step written to a table that is there."""

    def __init__(self, records: Tensor):
        super().__init__()
        self._records, self._given = records, 0

    def table(self, tensors: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        first = self._given
        self._given += sum(chunks_of(numel) for _, numel in tensors)
        return self._records[first : self._given]


def grad_norm(grads: list[Tensor]) -> Tensor:
    return select("auto", grads[0].device).grad_norm(grads)


_ops.library.impl("step_", step_, "CUDA")
_ops.library.impl("grad_norm", grad_norm, "CUDA")
