"""The Triton kernels (triton_kernels): not written yet. The module keeps their place and says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..groups import Group, Scaling

NAME = "triton"


def why_not(device: torch.device) -> str | None:
    return "its kernels are not built: this version has none; use backend='auto'"


def grad_norm(grads: list[Tensor]) -> Tensor:
    raise NotImplementedError(why_not(grads[0].device))


def step(groups: Sequence[Group], laprop: bool, scaling: Scaling) -> None:
    raise NotImplementedError(why_not(groups[0].tensors.params[0].device))
