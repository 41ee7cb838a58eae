"""The optimizer classes: groups, state, checkpoints. One step is `functional.step_groups`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint, checks, distributed, functional, gpu
from .backends.registry import select
from .gathering import forget, gather, hyperparameters, name_parameter, owners_of, whole_masters
from .groups import may_be_state, state_dtype, state_dtype_name
from .master import renew_masters, round_masters
from .saturation import Saturation
from .statistics import Recorder, StepStatistics

__all__ = ["LaMAdam", "MAdam"]

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
        TypeError: an argument that must be a number is not one.
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
            hyperparameters(group)
            if isinstance(group["lr"], Tensor):  # read now, and not in each step: a GPU would be waited for
                hyperparameters({**group, "lr": group["lr"].item()})
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
                raise RuntimeError(name_parameter(str(error), lambda _: listed)) from error
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
            groups = gather(self.param_groups, self.state, fresh)
            masters = whole_masters(self.param_groups, self.state)
            renew_masters(*masters)  # also before a step that is refused: what others wrote is the weight now
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
            forget(self.state, fresh)
            if type(error) is RuntimeError:  # not its subclasses, as NotImplementedError
                listed = partial(owners_of, self.param_groups, self.state)
                raise RuntimeError(name_parameter(str(error), listed)) from error
            raise
        round_masters(*masters)
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
            raise RuntimeError(name_parameter(str(error), lambda _: listed)) from error
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
