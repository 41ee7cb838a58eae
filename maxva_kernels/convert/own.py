"""Our own state in another dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..groups import MOMENTS, state_dtype_name


def to_state_dtype(state_dict: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A state dict of `MAdam` or `LaMAdam` as an optimizer with that ``state_dtype`` loads it; a copy where it differs.

    Args:
        state_dict: as `state_dict()` returned it.
        dtype: `torch.bfloat16` rounds the state to nearest, once; None makes float32 of it.

    Raises:
        ValueError: the dtype is another, the state is float64, or it is not ours.
    """
    name_of_dtype = state_dtype_name(dtype)
    state = {}
    for index, entries in state_dict["state"].items():
        missing = [name for name in MOMENTS if name not in entries]
        if entries and missing:
            raise ValueError(f"the state of parameter {index} has no {missing[0]!r}; was it written by MaxVA?")
        state[index] = {
            name: _converted(value, dtype, f"{name} of parameter {index}") if name in (*MOMENTS, "max_denom") else value
            for name, value in entries.items()
        }
    groups = [{**group, "state_dtype": name_of_dtype} for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def _converted(value: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if value.dtype == torch.float64 and dtype is not None:
        raise ValueError(f"{name} is float64, the state of a float64 parameter, for which {dtype} is too narrow")
    return value if value.dtype == torch.float64 else value.to(dtype or torch.float32)
