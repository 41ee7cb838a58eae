"""Loading a state dict without what `torch.optim.Optimizer` does to it.

Torch casts every floating-point state to its parameter's dtype, which would round the float32 state of a bfloat16
parameter to bfloat16, and lets optimizer and state dict share memory. So each parameter's state passes through torch's
`load_state_dict` in an opaque wrapper and is copied afterwards. Before that the whole dict is checked.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import distributed
from .groups import HYPERPARAMETERS, MOMENTS, arithmetic_dtype, state_dtype, state_dtype_name

# Options of a group on which no state depends and which a checkpoint may lack, if it is of a first version or was made
# of another optimizer's: whoever loads it keeps its own. With what they were when there was no choice.
UNSAID = {"trust_ratio": False, "rounding_seed": 0, "stochastic_rounding": False}
# All options that checkpoints of the first versions lack.
ADDED_SINCE = {**UNSAID, "state_dtype": None, "master_weights": False}

# The optimizer says what it keeps of each parameter, which one dtype cannot where they or their groups differ.
_CONVERT = "load maxva_kernels.convert.to_state_dtype(state_dict, optimizer)"


class _Opaque:
    """One parameter's saved state, which torch hands on as it is."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries


def wrap(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every parameter's state made opaque; changes nothing.

    Raises:
        ValueError: it does not belong to an optimizer of this class over parameters of these shapes.
    """
    missing = [key for key in ("param_groups", "state") if key not in state_dict]
    if missing:
        raise ValueError(
            f"this is not what an optimizer's state_dict() returns: it has no {missing[0]!r} (it has "
            f"{sorted(map(str, state_dict))}); pass the optimizer's entry of the checkpoint"
        )
    groups = state_dict["param_groups"]
    for i, group in enumerate(groups):
        _check_group(optimizer, i, group)
    check_sizes(optimizer, groups)
    for i, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        saved, wanted = group.get("master_weights", False), own["master_weights"]
        if saved != wanted:
            raise ValueError(
                f"param_groups[{i}] of this checkpoint has master_weights={saved}, but this optimizer has {wanted}; "
                f"make the optimizer with that, and once loaded set param_groups[{i}]['master_weights'] = {wanted}"
            )
        saved, wanted = (state_dtype_name(each.get("state_dtype")) for each in (group, own))
        if saved != wanted:
            too_narrow = any(param.dtype == torch.float64 for param in own["params"])  # bfloat16, then saved
            raise ValueError(
                f"param_groups[{i}] of this checkpoint has state_dtype={saved!r}, but this optimizer has {wanted!r}; "
                f"{'' if too_narrow else 'make the group with that, or '}{_CONVERT}"
            )
    saved_ids = list(chain.from_iterable(group["params"] for group in groups))
    # {} is what looking at the state of a parameter that was never stepped leaves.
    state = {key: entries for key, entries in state_dict["state"].items() if entries != {}}
    for index, (saved_id, (param, dtype)) in enumerate(zip(saved_ids, kept_dtypes(optimizer), strict=True)):
        if saved_id in state:
            _check_state(index, param, dtype, state[saved_id])
            state[saved_id] = _Opaque(state[saved_id])
    own_groups = [{name: own[name] for name in UNSAID} for own in optimizer.param_groups]
    filled = [{**own, **group} for own, group in zip(own_groups, groups, strict=True)]
    return {**state_dict, "state": state, "param_groups": filled}


def check_sizes(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Raises ValueError unless a checkpoint's groups have as many parameters as the optimizer's.

    torch checks that afterwards, and does not say where.
    """
    saved, own = ([len(group["params"]) for group in each] for each in (groups, optimizer.param_groups))
    remedy = (
        "make the optimizer with the same groups of parameters, frozen ones too, as in the run that wrote it, and pass "
        "new ones to add_param_group once it is loaded"
    )
    if len(saved) != len(own):
        raise ValueError(
            f"the number of parameter groups is {len(saved)} in this checkpoint (of {saved} parameters), but "
            f"{len(own)} in this optimizer (of {own}); {remedy}"
        )
    for i, (its, wanted) in enumerate(zip(saved, own, strict=True)):
        if its != wanted:
            raise ValueError(
                f"the number of parameters in param_groups[{i}] is {its} in this checkpoint, but {wanted} in this "
                f"optimizer; {remedy}"
            )


def kept_dtypes(optimizer: Optimizer) -> list[tuple[Tensor, torch.dtype]]:
    """Every parameter with the dtype in which the optimizer keeps its state."""
    return [
        (param, state_dtype(group["state_dtype"]) or arithmetic_dtype(param))
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def unwrap(state: MutableMapping[Any, Any]) -> None:
    """Replaces what `wrap` made opaque by copies on the parameters' devices."""
    for param, entries in state.items():
        if isinstance(entries, _Opaque):
            state[param] = {
                name: _copy(name, value, param) if isinstance(value, Tensor) or name == "step" else value
                for name, value in entries.entries.items()
            }


def place_steps(state: MutableMapping[Any, Any]) -> None:
    """Brings the counts of steps back that `ZeroRedundancyOptimizer` puts on the CPU when it loads a checkpoint.

    It puts them there all together, so that a look at the first says whether it did.
    """
    for param, entries in state.items():
        if "step" not in entries or entries["step"].device == param.device:
            return
        entries["step"] = entries["step"].to(param.device)


def _placed(tensor: Tensor) -> str:
    placement = distributed.placement(tensor)
    return "a plain tensor" if placement is None else f"a DTensor {placement[1]} on {placement[0]}"


def _copy(name: str, value: Any, param: Tensor) -> Tensor:
    if name == "step":  # an int, or a float tensor, where another tool wrote the checkpoint
        step = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        return step.detach().reshape(()).to(param.device, torch.int64, copy=True)
    if type(value) is Tensor and value.shape == param.shape:
        layout = param.detach()
        return torch.empty_like(layout, dtype=value.dtype, memory_format=torch.preserve_format).copy_(value)
    return value.detach().to(param.device, copy=True)


def _check_group(optimizer: Optimizer, index: int, group: dict[str, Any]) -> None:
    name = type(optimizer).__name__
    missing = [key for key in HYPERPARAMETERS if key not in group and key not in ADDED_SINCE]
    if missing:
        raise ValueError(
            f"this is not a checkpoint of {name}: its param_groups[{index}] has no {missing[0]!r} (it has "
            f"{sorted(map(str, group))}); load it into the optimizer that wrote it, or start {name} without it"
        )
    if group.get("algorithm") != optimizer.param_groups[0]["algorithm"]:
        raise ValueError(
            f"this checkpoint is of {group.get('algorithm')}, whose momentum means something else than "
            f"{optimizer.param_groups[0]['algorithm']}'s; load it into that class"
        )


def _check_state(index: int, param: Tensor, dtype: torch.dtype, entries: Any) -> None:
    where = f"the state of parameter {index}"
    names = ("step", *MOMENTS)
    if not isinstance(entries, dict) or any(name not in entries for name in names):
        found = sorted(map(str, entries)) if isinstance(entries, dict) else type(entries).__name__
        raise ValueError(f"{where} must have {list(names)}, this checkpoint has {found}; was it written by MaxVA?")
    step = entries["step"]
    if not isinstance(step, int | float) and not (isinstance(step, Tensor) and step.numel() == 1):
        found = f"a tensor of shape {list(step.shape)}" if isinstance(step, Tensor) else repr(step)
        raise ValueError(f"{where} must have one number as step, this checkpoint has {found}")
    for name in (*MOMENTS, "max_denom", "master"):
        value = entries.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != param.shape:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{where} has {name} of shape {shape}, but the parameter has {list(param.shape)}; "
                "is this the checkpoint of another model, or are the parameters in another order?"
            )
        if distributed.placement(value) != distributed.placement(param):
            raise ValueError(
                f"{where} has {name} as {_placed(value)}, but the parameter is {_placed(param)}; "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict moves a checkpoint between placements"
            )
        if name == "master":
            wanted = torch.bfloat16 if param.dtype == torch.bfloat16 else torch.float32
            if value.dtype != wanted:
                raise ValueError(
                    f"{where} has {name} in {value.dtype}, but that of a {param.dtype} parameter is {wanted}"
                )
            continue
        if value.dtype != dtype:
            raise ValueError(
                f"{where} has {name} in {value.dtype}, but this optimizer keeps that of a {param.dtype} parameter in "
                f"{dtype}; to convert it, {_CONVERT}"
            )
