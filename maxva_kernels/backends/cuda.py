"""The CUDA kernels (csrc/cuda): not written yet. The module keeps their place and says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import build_record
from ..groups import Group, Scaling

NAME = "cuda"


def why_not(device: torch.device) -> str | None:
    reason = build_record.read().get("cuda", {}).get("reason", "there is no record of the build")
    return f"its kernels are not built ({reason}); use backend='auto'"


def grad_norm(grads: list[Tensor]) -> Tensor:
    raise NotImplementedError(why_not(grads[0].device))


def step(groups: Sequence[Group], laprop: bool, scaling: Scaling) -> None:
    raise NotImplementedError(why_not(groups[0].tensors.params[0].device))
