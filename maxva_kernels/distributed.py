"""DTensors, as FSDP2 makes of parameters: each rank steps on its own shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .groups import Group, TensorLists

_PLAIN = (torch.nn.Parameter, Tensor)


def is_sharded(groups: Sequence[Group]) -> bool:
    """Whether any parameter is a DTensor."""
    # The type's identity settles nearly all tensors at a few nanoseconds each.
    return any(
        type(param) not in _PLAIN and hasattr(param, "to_local") for group in groups for param in group.tensors.params
    )


def local(groups: Sequence[Group]) -> list[Group]:
    """The groups with every DTensor replaced by the shard that this rank holds, which shares its memory."""
    return [
        Group(
            group.hyper,
            TensorLists(*([_local(t) for t in getattr(group.tensors, f.name)] for f in fields(TensorLists))),
        )
        for group in groups
    ]


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a missing gradient stays None
