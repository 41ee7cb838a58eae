"""Whose state dict it is, and the walk over its groups."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..checkpoint import UNSAID
from ..groups import HYPERPARAMETERS, MOMENTS

Group = dict[str, Any]
States = dict[Any, dict[str, Any]]  # of a group's parameters that have one, by their index


class Format(NamedTuple):
    """By which keys a state dict is known, those of every group and of every state of a parameter.

    ``dropped`` are keys of its groups that ours have under another name, or that mean nothing to ours.
    """

    name: str
    group: tuple[str, ...]
    state: tuple[str, ...]
    dropped: tuple[str, ...] = ()


OURS = Format(
    "this package",
    group=("algorithm", *(name for name in HYPERPARAMETERS if name not in UNSAID)),
    state=("step", *MOMENTS),
)
AUTHORS_MADAM = Format(
    "the authors' MAdam",
    group=("lr", "beta1", "beta2_range", "eps", "weight_decay"),
    state=("exp_avg", "exp_avg_sq", "exp_avg_grad", "total_w"),
    dropped=(
        *("step", "adamw", "nesterov", "lamb", "share_beta", "moment_warmup", "use_sgd", "neq_thresh"),
        *("ams_warmup_steps", "ams_reset_freq"),
    ),
)
AUTHORS_LAMADAM = Format(
    "the authors' LaMAdam",
    group=("lr", "momentum", "beta", "beta_min", "eps", "weight_decay"),
    state=("update_est", "g_est", "g_sq_est", "total_w"),
    dropped=("momentum", "beta", "beta_min", "use_adamw", "use_adam", "nesterov", "scale"),
)
ADAM = Format(
    "torch.optim.Adam or AdamW",
    group=("lr", "betas", "eps", "weight_decay", "amsgrad"),
    state=("step", "exp_avg", "exp_avg_sq"),
    dropped=("betas", "foreach", "fused", "capturable", "differentiable"),
)
FORMATS = (OURS, AUTHORS_MADAM, AUTHORS_LAMADAM, ADAM)  # ours first: it has all group keys of the authors' MAdam


def source_of(state_dict: Any, *expected: Format) -> Format:
    """Whose state dict it is: of the formats that are expected, or of any.

    Raises:
        ValueError: it is none of theirs; the message names its keys.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"an optimizer's state dict has 'state' and 'param_groups', this has {_keys(state_dict)}")
    groups, states = state_dict["param_groups"], {i: state for i, state in state_dict["state"].items() if state}
    names = " or ".join(each.name for each in expected or FORMATS)
    source = next(
        (f for f in FORMATS if groups and all({"params", *f.group} <= group.keys() for group in groups)), None
    )
    if source is None or source not in (expected or FORMATS):
        found = [f"param_groups[{i}] has {_keys(group)}" for i, group in enumerate(groups)][:1]
        found += [f"the state of parameter {i} has {_keys(state)}" for i, state in states.items()][:1]
        written = f"; it is of {source.name}" if source else ""
        raise ValueError(f"this is not a state dict of {names}: {', '.join(found) or 'it has no groups'}{written}")
    listed = {index for group in groups for index in group["params"]}
    for index, state in states.items():
        if not isinstance(state, dict) or not set(source.state) <= state.keys():
            raise ValueError(
                f"this is not a state dict of {names}: its groups are as {source.name}'s, but the state of parameter "
                f"{index} has {_keys(state)} and not {list(source.state)}"
            )
        if index not in listed:
            raise ValueError(f"the state of parameter {index} belongs to none of the param_groups; remove it")
    return source


def _keys(value: Any) -> str:
    return str(sorted(map(str, value))) if isinstance(value, dict) else f"type {type(value).__name__}"


@torch.no_grad()
def convert_groups(
    state_dict: dict[str, Any], convert: Callable[[str, Group, States], tuple[Group, States]]
) -> dict[str, Any]:
    """The state dict with each group and its parameters' states converted; what else it has is kept.

    ``convert`` takes the group's name in messages, the group and its parameters' states.
    """
    groups: list[Group] = []
    states: States = {}
    for i, group in enumerate(state_dict["param_groups"]):
        present = {index: state_dict["state"][index] for index in group["params"] if state_dict["state"].get(index)}
        new_group, new_states = convert(f"param_groups[{i}]", group, present)
        groups.append(copy.deepcopy(new_group))  # the learning rate may be a tensor, of an optimizer at work
        states.update(new_states)
    return {**state_dict, "state": states, "param_groups": groups}
