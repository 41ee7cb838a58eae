"""From an optimizer's groups and state to the lists of one step, and from an entry of these back to the parameter."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, checks, distributed
from .groups import (
    HYPERPARAMETERS,
    MOMENTS,
    Group,
    Hyperparameters,
    TensorLists,
    arithmetic_dtype,
    no_master,
    state_dtype,
)
from .master import why_unfit
from .rounding import tensor_key

ParamGroups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]

# A parameter: the indices of its group and within it, and the group's names if it has any.
Owner = tuple[int, int, list[str] | None]

# What a parameter's master weight is at first, and so what its state keeps: beside bfloat16 what makes a float32 of it.
MASTERS: dict[torch.dtype, Callable[[Tensor], Tensor]] = {
    torch.bfloat16: lambda param: _zeros_like(param, torch.bfloat16),
    torch.float16: lambda param: param.detach().to(torch.float32, copy=True),
}


def hyperparameters(settings: dict[str, Any]) -> Hyperparameters:
    values = {name: settings[name] for name in HYPERPARAMETERS}
    # Schedules that multiply their way down to 0, as torch's LinearLR, end beside it.
    if isinstance(values["lr"], float) and -1e-12 < values["lr"] < 0:
        values["lr"] = 0.0
    return Hyperparameters(**values)


def gather(param_groups: ParamGroups, states: States, fresh: list[tuple[Tensor, str | None]]) -> list[Group]:
    """The groups with the tensors of all parameters that have or had a gradient, divided by device where need be.

    Makes the state that is missing and appends to ``fresh`` what it made: the parameter, and the name of the entry
    or None for the whole state.
    """
    checkpoint.place_steps(states)
    has_ranks = distributed.has_ranks()
    groups = []
    number = -1  # of a parameter among all
    for index, settings in enumerate(param_groups):
        hyper, dtype = hyperparameters(settings), state_dtype(settings["state_dtype"])
        by_device: dict[torch.device, TensorLists] = {}
        keys: dict[torch.device, list[int]] = {}
        for param in settings["params"]:
            number += 1
            grad = param.grad
            if grad is None and not _has_state(states, param, settings):
                continue
            state = states[param]
            if not state:
                fresh.append((param, None))
                _init_state(param, state, dtype)
            if hyper.amsgrad and "max_denom" not in state:
                state["max_denom"] = _zeros_like(param, dtype)
                fresh.append((param, "max_denom"))
            if settings["master_weights"] and param.dtype in MASTERS:
                if "master" not in state:
                    state["master"] = MASTERS[param.dtype](param)
                    fresh.append((param, "master"))
                if has_ranks:
                    distributed.check_savable(param, state)
            lists = by_device.get(param.device)
            if lists is None:
                lists = by_device[param.device] = TensorLists()
                keys[param.device] = []
                groups.append(Group(hyper, lists, index, keys[param.device]))
            if dtype is not None or hyper.stochastic_rounding:
                keys[param.device].append(tensor_key(settings["rounding_seed"], number))
            lists.params.append(state["master"] if _has_whole_master(param, settings) else param)
            lists.grads.append(grad)
            lists.exp_avgs.append(state["exp_avg"])
            lists.grad_means.append(state["grad_mean"])
            lists.grad_vars.append(state["grad_var"])
            lists.weight_sums.append(state["weight_sum"])
            lists.steps.append(state["step"])
            if hyper.amsgrad:
                lists.max_denoms.append(state["max_denom"])
            if settings["master_weights"]:
                lists.masters.append(state["master"] if param.dtype == torch.bfloat16 else no_master(param))
    return groups


def forget(states: States, fresh: list[tuple[Tensor, str | None]]) -> None:
    """Takes back the state that `gather` made for a step that is refused."""
    for param, name in reversed(fresh):
        if name is None:
            del states[param]
        else:
            del states[param][name]


def _has_state(states: States, param: Tensor, settings: dict[str, Any]) -> bool:
    state = states.get(param, {})
    has_master = not settings["master_weights"] or param.dtype not in MASTERS or "master" in state
    return "step" in state and has_master and (not settings["amsgrad"] or "max_denom" in state)


def whole_masters(param_groups: ParamGroups, states: States) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters to be stepped by whole master weights, and these; of DTensors this rank's parts.

    Raises:
        RuntimeError: a parameter cannot be written, or a master is not its.
    """
    owners = [
        (param, g, i)
        for g, settings in enumerate(param_groups)
        if settings["master_weights"]
        for i, param in enumerate(settings["params"])
        if param.grad is not None and _has_whole_master(param, settings)
    ]
    params = distributed.to_local(param for param, _, _ in owners)
    masters = distributed.to_local(states[param]["master"] for param, _, _ in owners)
    for (_, g, i), param, master in zip(owners, params, masters, strict=True):
        reason = why_unfit(param, master)
        if reason is not None:
            raise RuntimeError(f"maxva: {_place(g, i, param_groups[g].get('param_names'))} {reason}")
    return params, masters


def owners_of(param_groups: ParamGroups, states: States, name: str) -> list[Owner]:
    """Whose tensors the list ``name`` of a step has, in the order of `gather`: it skips parameters without
    gradient, and for maxima groups without AMSGrad."""
    listed: list[Owner] = []
    for g, settings in enumerate(param_groups):
        by_device: dict[torch.device, list[Owner]] = {}
        for i, param in enumerate(settings["params"]):
            if param.grad is None and not _has_state(states, param, settings):
                continue
            its = by_device.setdefault(param.device, [])
            if param.grad is not None and (name != "max_denoms" or settings["amsgrad"]):
                its.append((g, i, settings.get("param_names")))
        listed += chain.from_iterable(by_device.values())
    return listed


def _has_whole_master(param: Tensor, settings: dict[str, Any]) -> bool:
    """Whether the kernel steps a float32 master in place of the parameter."""
    return settings["master_weights"] and param.dtype == torch.float16


def _init_state(param: Tensor, state: dict[str, Any], dtype: torch.dtype | None) -> None:
    state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
    for name in MOMENTS:
        state[name] = _zeros_like(param, dtype)


def _zeros_like(param: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.zeros_like(param, dtype=dtype or arithmetic_dtype(param), memory_format=torch.preserve_format)


def name_parameter(message: str, listed: Callable[[str], list[Owner]]) -> str:
    """Adds to a message about "params[3]" which of the optimizer's parameters that is.

    ``listed`` says for a list's name whose each entry is.
    """
    match = checks.ENTRY.search(message)
    entries = listed(match[1]) if match else []
    if match is None or int(match[2]) >= len(entries):
        return message
    return f"{message} ({match[0]} belongs to {_place(*entries[int(match[2])])})"


def _place(g: int, i: int, names: list[str] | None) -> str:
    called = f", {names[i]!r}" if names else ""
    return f"param_groups[{g}]['params'][{i}]{called}"
