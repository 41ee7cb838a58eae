"""The optimizer classes: groups, state, checkpoints. One step is `functional.step_groups`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint, checks, distributed, functional, gpu
from .backends.registry import select
from .groups import (
    HYPERPARAMETERS,
    MOMENTS,
    Group,
    Hyperparameters,
    TensorLists,
    arithmetic_dtype,
    may_be_state,
    no_master,
    state_dtype,
    state_dtype_name,
)
from .master import renew_masters, round_masters, why_unfit
from .rounding import tensor_key
from .saturation import Saturation
from .statistics import Recorder, StepStatistics

__all__ = ["LaMAdam", "MAdam"]

# What a parameter's master weight is at first, and so what its state keeps: beside bfloat16 what makes a float32 of it.
MASTERS: dict[torch.dtype, Callable[[Tensor], Tensor]] = {
    torch.bfloat16: lambda param: _zeros_like(param, torch.bfloat16),
    torch.float16: lambda param: param.detach().to(torch.float32, copy=True),
}

# A parameter: the indices of its group and within it, and the group's names if it has any.
_Owner = tuple[int, int, list[str] | None]

# Options of the whole optimizer, not of a group.
_OWN_OPTIONS = ("max_grad_norm", "skip_nonfinite", "collect_statistics", "capturable", "backend")

_ARGUMENTS = """
    Args:
        params: parameters, or named parameters, or dicts of parameter groups, as for `torch.optim`: float32, bfloat16,
            float16 or float64. Arithmetic is in float32 (float64 for float64 parameters).
        lr: learning rate >= 0, a float or a tensor with one element, which is checked at construction alone.
        beta1: momentum in [0, 1), the paper's alpha.
        beta2_range: bounds 0 < lower <= upper <= 1 of the second moment's coefficient beta, which is chosen between
            them for each coordinate and step (Eq. 6). Equal bounds turn the choice off.
        eps: added to the denominator, >= 0.
        weight_decay: coefficient >= 0.
        beta2_init: beta of the first step in [0, 1), the paper's beta_1 (Eq. 7). None: the upper bound of
            ``beta2_range``, or 0.9 where that is 1.
        decoupled_weight_decay: shrink the parameter by ``lr * weight_decay`` (AdamW); False adds
            ``weight_decay * parameter`` to the gradient (L2).
        amsgrad: divide by the running maximum of the bias-corrected sqrt(v).
        maximize: ascend.
        eps_mode: "paper" adds eps beside sqrt(v~) (Algorithm 1, line 12), "adam" beside the bias-corrected sqrt(v), as
            `torch.optim.Adam` and the authors' code do.
        max_grad_norm: clip the gradients of all groups together to this L2 norm, inside the step; the gradients are
            not written. Under FSDP2 and `ZeroRedundancyOptimizer` it is the norm of the whole gradient, and all
            ranks must step together. None: no clipping.
        skip_nonfinite: leave everything as it is in a step whose gradients, of all groups, devices and ranks, have a
            NaN or an infinity, and count it in `skipped_steps` (a gradient scaler's overflows too). It costs the norm's
            read of the gradients, which ``max_grad_norm`` shares. False: they spread, as in `torch.optim`.
        trust_ratio: multiply each parameter's learning rate by its norm over that of its update, weight decay included
            (LAMB); by 1 where one of them is 0. It costs one more read of parameters, gradients and state.
        collect_statistics: have `step` note what `statistics` tells.
        state_dtype: `torch.bfloat16` keeps the state in half the memory, rounded stochastically; not that of float64
            parameters. None: float32, or float64 for float64 parameters.
        rounding_seed: of the random numbers for these. With a parameter's place among all and its count of steps it
            determines them, so they survive a checkpoint; ranks of data parallel training need the same.
        master_weights: keep a float32 weight for each bfloat16 parameter, by 16 bits of state beside it (``master``;
            `maxva_kernels.join_master` puts them together), and for each float16 parameter, whole. The parameter is
            its rounding to nearest, and where something else writes the parameter its master follows. Parameters of 32
            and 64 bits are their own masters. FSDP1 with ``use_orig_params=True`` cannot save bfloat16 masters beside
            float32 state, so that there `step` refuses them.
        stochastic_rounding: round bfloat16 parameters up or down at random, right on average, where the default, to
            nearest, loses updates of less than half a unit in the last place. For those without master; not float16.
        differentiable: False is the only choice: the kernels record no graph to differentiate a step by.
        capturable: keep the learning rate in a tensor on the parameters' device, which schedulers update in place, so
            that `step` can be captured in a CUDA graph whose replays follow it. Run some steps before the capture.
        backend: "auto" (the fastest that can run on each parameter's device), "cuda", "triton", "cpu" or "reference".
            ``python -m maxva_kernels`` says which can run. All share one state: a run may change it at any step.

    All but ``max_grad_norm``, ``skip_nonfinite``, ``collect_statistics``, ``capturable`` and ``backend`` may be set per
    group.

    State of a parameter: ``step`` (int64 scalar), ``exp_avg`` (m~), ``grad_mean`` (u), ``grad_var`` (v - u^2),
    ``weight_sum`` (w), with AMSGrad ``max_denom``, with master weights ``master``. It may be replaced or written
    between steps; but where w is 1 a step does not read it unless ``step`` or a version counter says that it was
    written. So after writing ``weight_sum`` alone through ``.data``, NumPy, DLPack or a collective, which count
    nothing, call ``torch.autograd.graph.increment_version(state["weight_sum"])``. Replays of a CUDA graph look at no
    counter: after any write to ``weight_sum`` alone, call it and capture the graph again.

    Raises:
        ValueError: an argument is out of range.
        TypeError: one that must be a number is none.
        RuntimeError: a parameter cannot be optimised, or the backend cannot run on its device.
"""


@dataclass
class _Told:
    """What steps leave to be asked for; apart, since torch.compile drops what a step assigns to an optimizer."""

    recorder: Recorder | None = None  # of the last step
    skipped_steps: Tensor | None = None  # where the first parameter is, from the first step on


class _MaxVA(Optimizer):
    """What MAdam and LaMAdam share."""

    _laprop: bool

    def __init__(
        self,
        params: Any,
        *,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        collect_statistics: bool,
        capturable: bool,
        backend: str,
        **defaults: Any,
    ) -> None:
        functional.check_max_grad_norm(max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.collect_statistics = collect_statistics
        self._told = _Told()
        self._saturation = Saturation()
        self.capturable = capturable
        self.backend = backend
        self._inside_zero = distributed.is_inside_zero()
        # The algorithm is saved with each group: the two give `exp_avg` different meanings.
        super().__init__(params, {**defaults, "algorithm": "LaMAdam" if self._laprop else "MAdam"})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group`; if anything in it is wrong, none of it is added.

        Raises:
            ValueError, TypeError, RuntimeError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["state_dtype"] = state_dtype_name(group["state_dtype"])
            group["rounding_seed"] = _seed(group["rounding_seed"])
            for option in _OWN_OPTIONS:
                # ZeroRedundancyOptimizer writes all of its arguments into the groups.
                if group.pop(option, getattr(self, option)) != getattr(self, option):
                    raise ValueError(f"{option} is the whole optimizer's and cannot be set in a parameter group")
            own = self.defaults["algorithm"]
            if group["algorithm"] != own:
                raise ValueError(
                    f"algorithm is that of the class, {own!r}, and cannot be set in a parameter group, got "
                    f"{group['algorithm']!r}; leave it out, or use the other class"
                )
            _hyperparameters(group)
            if isinstance(group["lr"], Tensor):  # read now, and not in each step: a GPU would be waited for
                _hyperparameters({**group, "lr": group["lr"].item()})
            self._place_lr(group)
            if group["differentiable"]:
                raise ValueError(
                    "differentiable=True is not supported: the kernels write parameters in place and record no graph; "
                    "to differentiate through a step, write it out with maxva_kernels.reference.step"
                )
            try:
                for index, param in enumerate(group["params"]):
                    checks.check_param(param, index)
                    select(self.backend, param.device)
            except RuntimeError as error:
                g, names = len(self.param_groups) - 1, group.get("param_names")
                listed = [(g, i, names) for i in range(len(group["params"]))]
                raise RuntimeError(_name_parameter(str(error), lambda _: listed)) from error
            _check_state_dtype(group)
            _check_rounding(group)
        except BaseException:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient are left alone.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient or a state does not fit its parameter, a norm over all ranks cannot be had, or a
                CUDA graph is captured that would not follow the learning rate.
            ValueError, TypeError: an option has been set to what the constructor refuses.

        Where it raises, nothing has been stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if _is_capturing(self.param_groups):
            self._check_capture()
        norm_options = self._norm_options()
        recorder = Recorder() if self.collect_statistics else None
        fresh: list[tuple[Tensor, str | None]] = []
        try:
            groups = self._gather(fresh)
            whole_masters = self._whole_masters()
            renew_masters(*whole_masters)  # also before a step that is refused: what others wrote is the weight now
            functional.step_groups(
                groups,
                laprop=self._laprop,
                max_grad_norm=self.max_grad_norm,
                **norm_options,
                recorder=recorder,
                saturation=None if torch.compiler.is_compiling() else self._saturation,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                backend=self.backend,
            )
        except BaseException as error:
            for param, name in reversed(fresh):
                if name is None:
                    del self.state[param]
                else:
                    del self.state[param][name]
            if type(error) is RuntimeError:  # not its subclasses, as NotImplementedError
                raise RuntimeError(_name_parameter(str(error), self._listed)) from error
            raise
        round_masters(*whole_masters)
        self._told.recorder = recorder
        return loss

    def _check_capture(self) -> None:
        """Raises RuntimeError where a CUDA graph would keep a learning rate for ever."""
        if not self.capturable:
            raise RuntimeError("a CUDA graph is being captured; pass capturable=True to have step() captured")
        for index, group in enumerate(self.param_groups):
            if not isinstance(group["lr"], Tensor):
                raise RuntimeError(
                    f"param_groups[{index}]['lr'] was set to a number, which a CUDA graph would keep for ever; put a "
                    "tensor on the parameters' device there, and from then on write to that: group['lr'].fill_(1e-3)"
                )

    def _norm_options(self) -> dict[str, Any]:
        """Which ranks a norm is over, told by all parameters, with or without gradients, and what is done by it."""
        if self.max_grad_norm is None and not self.skip_nonfinite:
            if any(group["trust_ratio"] for group in self.param_groups):  # refused where parts of parameters are hidden
                distributed.norm_group(self._params(), self._inside_zero)
            return {}
        params = self._params()
        if self.skip_nonfinite and self._told.skipped_steps is None:
            device = params[0].device if params else None
            self._told.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        try:
            spreads = distributed.spreads(params)
        except RuntimeError as error:
            listed = [
                (g, i, settings.get("param_names"))
                for g, settings in enumerate(self.param_groups)
                for i in range(len(settings["params"]))
            ]
            raise RuntimeError(_name_parameter(str(error), lambda _: listed)) from error
        return {
            "norm_group": distributed.norm_group(params, self._inside_zero),
            "spreads": spreads,
            "skipped_steps": self._told.skipped_steps if self.skip_nonfinite else None,
        }

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and what an overflow does to `step`, by ``grad_scale`` and ``found_inf``.
        Not so under FSDP1, whose scaler hears of other ranks' overflows only where it unscales."""
        return not distributed.is_flattened(self._params())

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def statistics(self) -> StepStatistics:
        """What the last step did, of each parameter group and of all (`maxva_kernels.StepStatistics`).

        Waits for the device. After a replay of a CUDA graph it is about the step that was replayed.

        Raises:
            RuntimeError: there was no step yet with ``collect_statistics``.
        """
        if self._told.recorder is None:
            raise RuntimeError("no step has been recorded; pass collect_statistics=True and call step() first")
        return self._told.recorder.read(len(self.param_groups))

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` has skipped since this optimizer was made. Reading waits for the device."""
        return 0 if self._told.skipped_steps is None else int(self._told.skipped_steps)

    def _gather(self, fresh: list[tuple[Tensor, str | None]]) -> list[Group]:
        """The groups with the tensors of all parameters that have or had a gradient, divided by device where need be.

        Makes the state that is missing and appends to ``fresh`` what it made: the parameter, and the name of the entry
        or None for the whole state.
        """
        checkpoint.place_steps(self.state)
        has_ranks = distributed.has_ranks()
        groups = []
        number = -1  # of a parameter among all
        for index, settings in enumerate(self.param_groups):
            hyper, dtype = _hyperparameters(settings), state_dtype(settings["state_dtype"])
            by_device: dict[torch.device, TensorLists] = {}
            keys: dict[torch.device, list[int]] = {}
            for param in settings["params"]:
                number += 1
                grad = param.grad
                if grad is None and not self._has_state(param, settings):
                    continue
                state = self.state[param]
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

    def _has_state(self, param: Tensor, settings: dict[str, Any]) -> bool:
        state = self.state.get(param, {})
        has_master = not settings["master_weights"] or param.dtype not in MASTERS or "master" in state
        return bool(state) and has_master and (not settings["amsgrad"] or "max_denom" in state)

    def _whole_masters(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters to be stepped by whole master weights, and these; of DTensors this rank's parts.

        Raises:
            RuntimeError: a parameter cannot be written, or a master is not its.
        """
        owners = [
            (param, g, i)
            for g, settings in enumerate(self.param_groups)
            if settings["master_weights"]
            for i, param in enumerate(settings["params"])
            if param.grad is not None and _has_whole_master(param, settings)
        ]
        params = distributed.to_local(param for param, _, _ in owners)
        masters = distributed.to_local(self.state[param]["master"] for param, _, _ in owners)
        for (_, g, i), param, master in zip(owners, params, masters, strict=True):
            reason = why_unfit(param, master)
            if reason is not None:
                raise RuntimeError(f"maxva: {_place(g, i, self.param_groups[g].get('param_names'))} {reason}")
        return params, masters

    def _listed(self, name: str) -> list[_Owner]:
        """Whose tensors the list ``name`` of a step has, in the order of `_gather`: it skips parameters without
        gradient, and for maxima groups without AMSGrad."""
        listed: list[_Owner] = []
        for g, settings in enumerate(self.param_groups):
            by_device: dict[torch.device, list[_Owner]] = {}
            for i, param in enumerate(settings["params"]):
                if param.grad is None and not self._has_state(param, settings):
                    continue
                its = by_device.setdefault(param.device, [])
                if param.grad is not None and (name != "max_denoms" or settings["amsgrad"]):
                    its.append((g, i, settings.get("param_names")))
            listed += chain.from_iterable(by_device.values())
        return listed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of what `state_dict` returned; the state keeps its dtype, whatever the parameter's.

        Raises:
            ValueError: it is of another optimizer class, or does not fit the parameters; nothing has been changed.
        """
        # Registered only now, it runs after the user's pre-hooks, which may replace the dict.
        hook = self.register_load_state_dict_pre_hook(checkpoint.wrap)
        rates = [group["lr"] for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, rate in zip(self.param_groups, rates, strict=True):
            if self.capturable and isinstance(rate, Tensor):  # in place, where schedulers and graphs know it
                group["lr"] = rate.copy_(torch.as_tensor(group["lr"], device=rate.device).reshape(rate.shape))
            else:
                self._place_lr(group)

    def _place_lr(self, group: dict[str, Any]) -> None:
        """Has a group's learning rate where its parameters' kernels can read it."""
        lr, params = group["lr"], group["params"]
        if self.capturable:
            double = any(param.dtype == torch.float64 for param in params)
            device = params[0].device if params else None
            group["lr"] = torch.as_tensor(lr, dtype=torch.float64 if double else torch.float32, device=device)
        elif isinstance(lr, Tensor) and not any(param.device == lr.device for param in params):
            group["lr"] = lr.cpu()  # of a checkpoint from another device

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in (*_OWN_OPTIONS, "_inside_zero")}
        return {**super().__getstate__(), **own, "_told": _Told(skipped_steps=self._told.skipped_steps)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._saturation = Saturation()
        for group in self.param_groups:
            for option, value in checkpoint.ADDED_SINCE.items():
                group.setdefault(option, value)
        checkpoint.unwrap(self.state)


class MAdam(_MaxVA):
    __doc__ = (
        """MAdam: Adam with the second moment's coefficient chosen by MaxVA (Algorithm 1 of arXiv 2006.11918).

    For each coordinate and step beta is the value within ``beta2_range`` that maximises the variance of the gradient as
    the running averages estimate it. All of it is one pass over memory for all parameters.
"""
        + _ARGUMENTS
    )

    _laprop = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        beta1: float = 0.9,
        beta2_range: tuple[float, float] = (0.5, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta2_init: float | None = None,
        decoupled_weight_decay: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        eps_mode: str = "paper",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        trust_ratio: bool = False,
        collect_statistics: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding_seed: int = 0,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(**_arguments(locals()))


class LaMAdam(_MaxVA):
    __doc__ = (
        """LaMAdam: LaProp with the second moment's coefficient chosen by MaxVA (Algorithm 2 of arXiv 2006.11918).

    As `MAdam`, but the gradient is normalised before the momentum averages it.
"""
        + _ARGUMENTS
    )

    _laprop = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        beta1: float = 0.9,
        beta2_range: tuple[float, float] = (0.5, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        beta2_init: float | None = None,
        decoupled_weight_decay: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        eps_mode: str = "paper",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        trust_ratio: bool = False,
        collect_statistics: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding_seed: int = 0,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(**_arguments(locals()))


def _is_capturing(param_groups: list[dict[str, Any]]) -> bool:
    return any(group["params"] and group["params"][0].is_cuda for group in param_groups) and gpu.is_capturing()


def _arguments(names: dict[str, Any]) -> dict[str, Any]:
    """A constructor's locals() less what the interpreter adds."""
    return {name: value for name, value in names.items() if name not in ("self", "__class__")}


def _hyperparameters(settings: dict[str, Any]) -> Hyperparameters:
    values = {name: settings[name] for name in HYPERPARAMETERS}
    # Schedules that multiply their way down to 0, as torch's LinearLR, end beside it.
    if isinstance(values["lr"], float) and -1e-12 < values["lr"] < 0:
        values["lr"] = 0.0
    return Hyperparameters(**values)


def _check_state_dtype(group: dict[str, Any]) -> None:
    dtype = state_dtype(group["state_dtype"])
    if dtype is None:
        return
    for index, param in enumerate(group["params"]):
        if not may_be_state(dtype, param):
            named = checks.describe(param, "params", index)
            raise ValueError(f"state_dtype={dtype} is too narrow for {named}; use None in a group of such parameters")


def _seed(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"rounding_seed must be a whole number, got {value!r}") from None


def _check_rounding(group: dict[str, Any]) -> None:
    if not group["stochastic_rounding"]:
        return
    if group["master_weights"]:
        raise ValueError(
            "master_weights and stochastic_rounding exclude each other: with a master no update is lost; choose one"
        )
    for index, param in enumerate(group["params"]):
        if param.dtype == torch.float16:
            raise ValueError(
                f"stochastic_rounding is for bfloat16, which {checks.describe(param, 'params', index)} is not; "
                "use master_weights=True, or False in a group of such parameters"
            )


def _has_whole_master(param: Tensor, settings: dict[str, Any]) -> bool:
    """Whether the kernel steps a float32 master in place of the parameter."""
    return settings["master_weights"] and param.dtype == torch.float16


def _init_state(param: Tensor, state: dict[str, Any], dtype: torch.dtype | None) -> None:
    state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
    for name in MOMENTS:
        state[name] = _zeros_like(param, dtype)


def _zeros_like(param: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.zeros_like(param, dtype=dtype or arithmetic_dtype(param), memory_format=torch.preserve_format)


def _name_parameter(message: str, listed: Callable[[str], list[_Owner]]) -> str:
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
