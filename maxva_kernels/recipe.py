"""What large-batch training of BERT needs around the optimizer: who decays, and the learning rate in phases.

    groups = param_groups_weight_decay(model, 0.1)
    optimizer = MAdam(groups, lr=3.4e-3, max_grad_norm=1.0)
    schedule = PhasedLR(
        optimizer,
        [
            Phase(7038, warmup=0.2843, power=0.5, from_peak=False),
            Phase(1563, warmup=0.128, power=0.5, from_peak=False, scale=2 / 3),
        ],
    )

is the recipe of arXiv 2006.11918, Section 5.4, for BERT-Base: batches of 64K sequences of length 128, then 32K of 512.
Steps, weight decay, clipping and the first rate are the paper's. Warm-up, power and the ratio of the two rates, which
the paper keeps "the same as Lamb", are those of the repository that it used (NVIDIA's BERT). Nothing here knows of
MaxVA: any `torch.optim.Optimizer` will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .groups import _require

__all__ = ["Phase", "PhasedLR", "param_groups_weight_decay"]

_NORMS = (nn.LayerNorm, nn.RMSNorm)  # those that may have parameters of several dimensions


def param_groups_weight_decay(
    model: nn.Module | Iterable[tuple[str, Tensor]], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weight decay for matrices, none for biases and norms, as BERT has it.

    A parameter does not decay if any of these holds, and otherwise decays:

    - it has at most one dimension: biases, the gains of norms whoever wrote them, single scalars. Parameters sharded
      by FSDP2 or tensor parallelism count with the dimensions of the whole;
    - the last part of its name contains "bias": biases of several dimensions, as `nn.MultiheadAttention.bias_k`;
    - it belongs to a LayerNorm or RMSNorm, which may be over several dimensions.

    So embeddings decay, as in BERT. Frozen parameters are left out. A parameter that several modules share is listed
    once, under its first name. The order is the model's.

    Args:
        model: a module, or (name, parameter) pairs as from `named_parameters`, whose modules are not known: the third
            rule then does not apply.
        weight_decay: coefficient >= 0 of those that decay.

    Returns:
        The group that decays and the one that does not, less one that would be empty: dicts with "params",
        "param_names", by which torch and the errors of this package's optimizers know them, and "weight_decay".

    Raises:
        TypeError: ``model`` is neither, or ``weight_decay`` no number.
        ValueError: ``weight_decay`` is out of range; no parameter requires a gradient; a parameter has no shape yet
            (lazy modules), or has lost it (inside FSDP1's wrapper).
    """
    _require("weight_decay", weight_decay, lambda decay: 0 <= decay < math.inf, "a finite number >= 0")
    norms: set[Tensor] = set()
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, _NORMS):
                norms.update(module.parameters(recurse=False))
    decay: dict[Tensor, str] = {}
    rest: dict[Tensor, str] = {}
    for name, param in _named(model):
        if not param.requires_grad:
            continue
        if is_lazy(param):
            raise ValueError(f"model: {name!r} has no shape yet; run a forward pass first")
        if "_fsdp_wrapped_module" in name or "_flat_param" in name:
            raise ValueError(
                f"model: FSDP1 has flattened {name!r}, so that matrices look like vectors; make the groups within "
                "FullyShardedDataParallel.summon_full_params(model), with use_orig_params=True, or use fully_shard"
            )
        # Under DeepSpeed's ZeRO-3 the parameter itself is empty.
        shape = getattr(param, "ds_shape", param.shape)
        spared = len(shape) <= 1 or "bias" in name.rpartition(".")[2] or param in norms
        if param not in decay and param not in rest:
            (rest if spared else decay)[param] = name
    groups = [
        {"params": list(names), "param_names": list(names.values()), "weight_decay": value}
        for names, value in ((decay, weight_decay), (rest, 0.0))
        if names
    ]
    if not groups:
        raise ValueError("model has no parameter that requires a gradient")
    return groups


def _named(model: nn.Module | Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    wanted = "model must be a module or (name, parameter) pairs, as from named_parameters()"
    if isinstance(model, Tensor) or not isinstance(model, (nn.Module, Iterable)):
        raise TypeError(f"{wanted}, got {type(model).__name__}")
    for pair in model.named_parameters() if isinstance(model, nn.Module) else model:
        match pair:
            case (str(), Tensor()):
                yield pair
            case _:
                raise TypeError(f"{wanted}, got an iterable of {type(pair).__name__}")


@dataclass(frozen=True)
class Phase:
    """One stretch of training: a linear warm-up, then a polynomial decay that would be 0 one step after the last.

    BERT is trained in two, on short sequences and on long ones.

    Args:
        steps: optimizer steps, >= 1.
        warmup: over how many of them the rate rises, the last of which has the peak: an int for steps, a float in
            [0, 1) for a share of ``steps``, which is rounded to steps.
        power: of the decay, >= 0; 1 is linear, 0.5 what NVIDIA's BERT has, 0 constant.
        scale: the peak in units of each group's own ``lr``, >= 0. An optimizer with ``lr=1`` makes it the peak itself.
        from_peak: the decay begins at the peak. False counts it from the beginning of the phase, as Google's and
            NVIDIA's BERT do, but for a shift by one step: after the warm-up the rate falls at once to
            ``(1 - warmup) ** power`` of the peak.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """

    steps: int
    warmup: float = 0
    power: float = 1.0
    scale: float = 1.0
    from_peak: bool = True

    def __post_init__(self) -> None:
        _require("steps", self.steps, lambda steps: _is_int(steps) and steps >= 1, "an int >= 1")
        if _is_int(self.warmup):
            rule = f"from 0 to steps={self.steps} if an int"
            _require("warmup", self.warmup, lambda warmup: 0 <= warmup <= self.steps, rule)
        else:
            rule = "an int (steps) or a float in [0, 1) (share of the steps)"
            _require("warmup", self.warmup, lambda warmup: isinstance(warmup, float) and 0 <= warmup < 1, rule)
        _require("power", self.power, lambda power: 0 <= power < math.inf, "a finite number >= 0")
        _require("scale", self.scale, lambda scale: 0 <= scale < math.inf, "a finite number >= 0")

    @property
    def warmup_steps(self) -> int:
        """``warmup`` in steps."""
        return int(self.warmup) if _is_int(self.warmup) else round(self.warmup * self.steps)

    def rate(self, step: int, lr: float | Tensor) -> float | Tensor:
        """The learning rate of a step.

        Args:
            step: steps since the beginning of the phase, >= 0; 0 is its first step.
            lr: the group's rate, which ``scale`` multiplies.

        Returns:
            The rate, of the type of ``lr``; 0 after the last step.
        """
        peak, warm = lr * self.scale, self.warmup_steps
        if step >= self.steps:
            return peak * 0.0
        if step < warm:
            return peak * (step + 1) / warm
        return peak * ((self.steps - step) / (self.steps - (warm if self.from_peak else 0))) ** self.power


class PhasedLR(LRScheduler):
    """The learning rate of one `Phase` after another; call `step` after each optimizer step.

    The rate is a function of the number of steps alone, times each group's own ``lr``, so groups keep the ratios of
    their rates. After the last phase it is 0. A rate that is a tensor is written in place and never read by the host.

    `state_dict` holds how many steps were done, in plain types, and not the phases: those are the constructor's. As
    with torch's schedulers, construct it first, then load the optimizer's state and its own.

    Args:
        optimizer: whose groups' rates are set; it keeps each group's own as "initial_lr".
        phases: one `Phase` or more.
        last_epoch: steps done less one, to go on with an optimizer whose groups have "initial_lr"; -1 begins.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or ``phases`` no list of phases.
        ValueError: ``phases`` is empty.
    """

    def __init__(self, optimizer: Optimizer, phases: Sequence[Phase], last_epoch: int = -1) -> None:
        if not isinstance(phases, Sequence):
            raise TypeError(f"phases must be a list of Phase, got {type(phases).__name__}")
        self.phases = tuple(phases)
        for phase in self.phases:
            if not isinstance(phase, Phase):
                raise TypeError(f"phases must be a list of Phase, got {type(phase).__name__} in it")
        if not self.phases:
            raise ValueError("phases must not be empty")
        super().__init__(optimizer, last_epoch)

    @property
    def phase(self) -> int:
        """The index of the phase that the next optimizer step is in; after the end, of the last one."""
        return self._place()[0]

    def get_lr(self) -> list[float | Tensor]:
        """The rates of all groups at this step; torch calls it, users want `get_last_lr`."""
        index, step = self._place()
        return [self.phases[index].rate(step, lr) for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the phases."""
        return {name: value for name, value in super().state_dict().items() if name != "phases"}

    def _place(self) -> tuple[int, int]:
        """The phase and the step within it."""
        step, last = self.last_epoch, len(self.phases) - 1
        for index, phase in enumerate(self.phases):
            if step < phase.steps or index == last:
                break
            step -= phase.steps
        return index, step


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
