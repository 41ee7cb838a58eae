"""What one step is given: the parameter groups' hyperparameters and tensors. Every backend takes these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS_MODES = ("paper", "adam")

# The state of a parameter, under the names of `Optimizer.state`; `step` and, with AMSGrad, `max_denom` are beside them.
MOMENTS = ("exp_avg", "grad_mean", "grad_var", "weight_sum")


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's arithmetic, and by default of its state: float64 for float64, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


# Names stand in parameter groups and so in checkpoints: torch.distributed.checkpoint takes no dtypes there.
STATE_DTYPES = {None: None, "bfloat16": torch.bfloat16}


def state_dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """The key of `STATE_DTYPES`.

    Raises:
        ValueError: there is none.
    """
    for name, known in STATE_DTYPES.items():
        if dtype in (name, known):
            return name
    raise ValueError(f"state_dtype must be None or torch.bfloat16, got {dtype!r}")


def state_dtype(setting: torch.dtype | str | None) -> torch.dtype | None:
    """What a group's ``state_dtype`` stands for: a name, or where others than `add_param_group` wrote it the dtype.

    Raises:
        ValueError: it stands for nothing.
    """
    return STATE_DTYPES[state_dtype_name(setting)]


def may_be_state(dtype: torch.dtype, param: Tensor) -> bool:
    """Whether a parameter's state may have that dtype: that of its arithmetic or, if this is float32, bfloat16."""
    return dtype == arithmetic_dtype(param) or (dtype == torch.bfloat16 and param.dtype != torch.float64)


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one group, checked.

    Symbols of the paper (arXiv 2006.11918): ``beta1`` is its alpha, ``beta2_range`` the bounds of beta (line 8 of
    Algorithm 1), ``beta2_init`` beta_1 of Eq. 7 (None: the upper bound, or 0.9 where that is 1).

    Raises:
        ValueError: a value is out of its range; the message names it.
        TypeError: a value is not a number.
    """

    lr: float | Tensor
    beta1: float
    beta2_range: tuple[float, float]
    eps: float
    weight_decay: float
    beta2_init: float | None = None
    decoupled_weight_decay: bool = True
    amsgrad: bool = False
    maximize: bool = False
    eps_mode: str = "paper"
    trust_ratio: bool = False
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.lr, Tensor):
            if self.lr.numel() != 1:
                raise ValueError(f"lr must have one element, got a tensor of shape {list(self.lr.shape)}")
        else:
            _require("lr", self.lr, lambda lr: 0 <= lr < math.inf, "a finite number >= 0")
        _require("beta1", self.beta1, lambda beta1: 0 <= beta1 < 1, "in [0, 1)")
        try:
            _, _ = self.beta2_range
        except (TypeError, ValueError):
            raise ValueError(f"beta2_range must be a pair (lower, upper), got {self.beta2_range!r}") from None
        rule = "a pair with 0 < lower <= upper <= 1"
        _require("beta2_range", self.beta2_range, lambda pair: 0 < pair[0] <= pair[1] <= 1, rule)
        _require("eps", self.eps, lambda eps: 0 <= eps < math.inf, "a finite number >= 0")
        _require("weight_decay", self.weight_decay, lambda decay: 0 <= decay < math.inf, "a finite number >= 0")
        if self.beta2_init is not None:
            rule = "in [0, 1): 1 would give the first gradient no weight; None is a good choice"
            _require("beta2_init", self.beta2_init, lambda init: 0 <= init < 1, rule)
        if self.eps_mode not in EPS_MODES:
            raise ValueError(f"eps_mode must be one of {EPS_MODES}, got {self.eps_mode!r}")

    @property
    def first_beta2(self) -> float:
        """beta at the first step (Eq. 7)."""
        if self.beta2_init is not None:
            return self.beta2_init
        upper = self.beta2_range[1]
        return upper if upper < 1 else 0.9


HYPERPARAMETERS = tuple(Hyperparameters.__dataclass_fields__)
"""The entries of an optimizer's parameter group that make its `Hyperparameters`."""


def _require(name: str, value: Any, holds: Callable[[Any], bool], rule: str) -> None:
    try:
        fits = holds(value)
    except TypeError:
        raise TypeError(f"{name} must be {rule}, got {value!r}") from None
    if not fits:  # NaN fails every comparison and so ends here
        raise ValueError(f"{name} must be {rule}, got {value!r}")


@dataclass
class TensorLists:
    """The tensors of one group's step, aligned by index; ``max_denoms`` is empty without AMSGrad, ``masters`` where no
    parameter has one.

    Parameters and gradients are float32, bfloat16, float16 or float64. A parameter's moments have its shape and one
    dtype, `arithmetic_dtype` or, where that is float32, bfloat16. A bfloat16 parameter may have a master of its dtype
    and shape (master.py); in place of others stand tensors without elements. Steps are int64 scalars counting the steps
    done. Where a gradient is None nothing of that parameter changes: so a GPU's table of pointers can stay as gradients
    come and go.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    grad_means: list[Tensor] = field(default_factory=list)
    grad_vars: list[Tensor] = field(default_factory=list)
    weight_sums: list[Tensor] = field(default_factory=list)
    max_denoms: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)


TENSOR_LISTS = tuple(each.name for each in fields(TensorLists))  # once: a compiled step cannot ask for fields


# Groups and scalings are made by their constructors, not by _replace: where a graph breaks, torch 2.11's compiler makes
# empty tuples of what that gave.
class Group(NamedTuple):
    hyper: Hyperparameters
    tensors: TensorLists
    number: int = 0  # among the optimizer's groups, of which each device has a part
    keys: Sequence[int] = ()  # for each parameter, where something is rounded stochastically (rounding.py)


class Scaling(NamedTuple):
    """What multiplies or stops the gradients and updates of a step; on the gradients' device.

    All but ``trust_ratios`` are scalars. ``grad_norm`` is the global norm of the gradients as they stand, that is
    before division by ``grad_scale``. ``trust_ratios`` has for each parameter what its learning rate is multiplied by,
    float64.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    grad_norm: Tensor | None = None
    max_grad_norm: float | None = None
    trust_ratios: Tensor | None = None


def no_master(param: Tensor) -> Tensor:
    """What stands in `TensorLists.masters` for a parameter that has none."""
    return torch.empty(0, dtype=torch.bfloat16, device=param.device)


def joined(groups: Sequence[Group], name: str) -> list[Any]:
    """One list of all groups' tensors of that name."""
    if len(groups) == 1:
        return getattr(groups[0].tensors, name)
    return [tensor for group in groups for tensor in getattr(group.tensors, name)]


def with_gradients(groups: Sequence[Group]) -> Sequence[Group]:
    """The groups, which each have a gradient, without the parameters that have none."""
    if all(grad is not None for group in groups for grad in group.tensors.grads):
        return groups
    present = []
    for group in groups:
        tensors = group.tensors
        keep = [i for i, grad in enumerate(tensors.grads) if grad is not None]
        lists = {name: getattr(tensors, name) for name in TENSOR_LISTS}
        kept = {name: [values[i] for i in keep] if values else [] for name, values in lists.items()}
        keys = [group.keys[i] for i in keep] if group.keys else ()
        present.append(Group(group.hyper, TensorLists(**kept), group.number, keys))
    return present
