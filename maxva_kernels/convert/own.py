"""Our own state in another dtype."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checkpoint import check_sizes, kept_dtypes
from ..groups import MOMENTS, state_dtype_name
from .formats import OURS, source_of


def to_state_dtype(state_dict: dict[str, Any], dtype: torch.dtype | Optimizer | None) -> dict[str, Any]:
    """A state dict of `MAdam` or `LaMAdam` as an optimizer with that ``state_dtype`` loads it; a copy where it differs.

    Args:
        state_dict: as `state_dict()` returned it.
        dtype: `torch.bfloat16` rounds the state to nearest, once; None makes float32 of it. Or the optimizer that is to
            load it, for what it keeps of each parameter: so float64 becomes another dtype, and groups may differ.

    Raises:
        TypeError: the optimizer is not ours.
        ValueError: the dtype is another, the state is float64, the optimizer's groups have other sizes, or the state is
            not ours.
    """
    source_of(state_dict, OURS)
    groups = state_dict["param_groups"]
    kept: dict[Any, torch.dtype] = {}  # by a parameter's index
    if isinstance(dtype, Optimizer):
        if any("state_dtype" not in own for own in dtype.param_groups):  # not by class: it may be a wrapper of ours
            kind = type(dtype).__name__
            raise TypeError(f"the optimizer must be the MAdam or LaMAdam that is to load it, got {kind}")
        check_sizes(dtype, groups)
        names = [state_dtype_name(own["state_dtype"]) for own in dtype.param_groups]
        indices = chain.from_iterable(group["params"] for group in groups)
        kept = {index: its for index, (_, its) in zip(indices, kept_dtypes(dtype), strict=True)}
        dtype = None  # all state is a parameter's
    else:
        names = [state_dtype_name(dtype)] * len(groups)

    def converted(index: Any, name: str, value: Any) -> Any:
        if name not in (*MOMENTS, "max_denom"):
            return value
        return value.to(kept[index]) if index in kept else _converted(value, dtype, f"{name} of parameter {index}")

    state = {
        index: {name: converted(index, name, value) for name, value in entries.items()}
        for index, entries in state_dict["state"].items()
    }
    new_groups = [{**group, "state_dtype": name} for group, name in zip(groups, names, strict=True)]
    return {**state_dict, "state": state, "param_groups": new_groups}


def _converted(value: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if value.dtype == torch.float64 and dtype is not None:
        raise ValueError(
            f"{name} is float64, the state of a float64 parameter, for which {dtype} is too narrow; pass the optimizer "
            "that is to load it in place of the dtype"
        )
    return value if value.dtype == torch.float64 else value.to(dtype or torch.float32)
