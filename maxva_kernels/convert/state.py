"""Reading one parameter's state as it was saved, and making ours of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..checkpoint import UNSAID
from ..groups import MOMENTS
from ..optim import LaMAdam, MAdam
from .formats import Format, Group, States


class State:
    """One parameter's state as it was saved: its tensors in float64, and what is made of them in its own dtype."""

    def __init__(self, index: Any, entries: dict[str, Any], first: str) -> None:
        self.where = f"the state of parameter {index}"
        self.entries = entries
        self.shape = getattr(entries[first], "shape", None)
        self.dtype = torch.float64 if getattr(entries[first], "dtype", None) == torch.float64 else torch.float32

    def double(self, name: str) -> Tensor:
        value = self.entries[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{self.where} must have a floating-point tensor as {name}, it has {_described(value)}")
        if value.shape != self.shape:
            shapes = {key: list(each.shape) for key, each in self.entries.items() if isinstance(each, Tensor)}
            raise ValueError(f"{self.where} must have tensors of one shape, it has {shapes}: look at {name}")
        return value.detach().double()

    def weight_sum(self, like: Tensor) -> Tensor:
        """w, which may be saved as one number."""
        w = self.entries["total_w"]
        one = isinstance(w, int | float) or (isinstance(w, Tensor) and w.numel() == 1)
        w = torch.full_like(like, float(w)) if one else self.double("total_w")
        if ((w < 0) | (w > 1.001)).any():
            raise ValueError(f"{self.where} must have total_w between 0 and 1, it reaches {w.min()} to {w.max()}")
        return w.clamp(max=1)

    def rounded(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values, rounded once."""
        return {name: value.to(self.dtype, copy=True) for name, value in values.items()}

    def ours(self, step: int, *moments: Tensor, max_denom: Tensor | None = None) -> dict[str, Tensor]:
        """Our state: what is below the smallest normal number is 0, as the kernels store it."""
        values = dict(zip(MOMENTS, moments, strict=True))
        if max_denom is not None:
            values["max_denom"] = max_denom
        tiny = torch.finfo(self.dtype).tiny
        flushed = {name: torch.where(value.abs() < tiny, 0.0, value) for name, value in self.rounded(values).items()}
        return {"step": torch.tensor(step, dtype=torch.int64, device=moments[0].device), **flushed}


def _described(value: Any) -> str:
    return f"one of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def count(where: str, step: Any) -> int:
    """A number of steps, saved as an int or as one element."""
    number = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if not isinstance(number, int | float) or not 0 <= number < math.inf or number != int(number):
        raise ValueError(f"{where} must have a whole number as step, it has {step!r}")
    return int(number)


def steps_of(where: str, group: Group, states: States) -> dict[Any, int]:
    """Every parameter's step, from its state or from the group (a program that counts in one leaves the other)."""
    own = {i: count(f"the state of parameter {i}", state["step"]) for i, state in states.items() if "step" in state}
    if "step" in group:
        of_group = count(where, group["step"])
        if all(step < of_group for step in own.values()):
            return dict.fromkeys(states, of_group)
    for index in states:
        if index not in own:
            raise ValueError(f"neither the state of parameter {index} nor {where} has a step")
    return own


def our_group(
    where: str, group: Group, source: Format, algorithm: type[MAdam | LaMAdam], **hyper: Any
) -> dict[str, Any]:
    """The group with our hyperparameters in the place of theirs; what the user put there is kept.

    An optimizer of one empty parameter says what a group has and refuses what is out of range. Options of which their
    checkpoint knows nothing are left out, and so are those of the optimizer that loads it.
    """
    hyper = {"lr": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"], "eps_mode": "adam", **hyper}
    try:
        made = algorithm([Parameter(torch.empty(0))], **hyper).state_dict()["param_groups"][0]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be one of {algorithm.__name__}: {error}") from error
    for name in UNSAID.keys() - hyper.keys():
        del made[name]
    kept = {name: value for name, value in group.items() if name not in source.dropped}
    return {**kept, **made, "lr": group["lr"], "params": group["params"]}


def decoupled(where: str, group: Group, said: bool | None, remedy: str) -> bool:
    """Whether the weight decay is AdamW's, which only matters where there is one."""
    if said is None and group["weight_decay"] != 0:
        raise ValueError(
            f"{where} has weight_decay={group['weight_decay']} and does not say whether that is AdamW's or L2; {remedy}"
        )
    return True if said is None else bool(said)
