"""The operators: their schemas, their fakes, and the loading of the compiled modules that implement them.

The schemas stand here and not in C++ so that an installation without compiled code has them too.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import fields
from types import ModuleType

import torch
from torch import Tensor

from . import build_record
from .checks import describe
from .groups import Group, Hyperparameters, Scaling, TensorLists, joined, no_master
from .saturation import Saturation
from .statistics import Recorder, tensors_of

library = torch.library.Library("maxva", "DEF")

STEP_LISTS = tuple(f.name for f in fields(TensorLists))
"""The tensor lists of `step_`, in its order."""

# One step of MAdam (laprop=False) or LaMAdam (laprop=True), in place, over all parameters of one device.
# Lists named in the plural have an entry for each parameter, the others for each group; group_sizes says how many
# consecutive parameters a group has. max_denoms has an entry for each parameter of a group with AMSGrad; masters has
# tensors without elements for parameters without one, or is empty. lr is a float64 CPU tensor, so that a graph does not
# recompile when it changes. grad_norm is the global norm of the gradients as they stand; max_grad_norm < 0 clips
# nothing. found_inf != 0 leaves everything untouched. trust_ratios has for each parameter, float64, what its learning
# rate is multiplied by.
# rounding_keys has for each parameter the key of what is rounded stochastically (rounding.py); it may be empty where
# nothing is.
# statistics, float32 of shape [chunks, fields], takes the records of statistics.py, whose sampled chunks are written.
# update_norms, float64 of shape [params, 2], takes for each parameter its norm and that of its update at learning rate
# 1; where it is given nothing else is changed.
# saturation, int32 of shape [chunks], has the stamps of csrc/saturation.h; without them all of weight_sums is read.
library.define(
    "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] grad_means, "
    "Tensor(d!)[] grad_vars, Tensor(e!)[] weight_sums, Tensor(f!)[] max_denoms, Tensor(j!)[] masters, "
    "Tensor(g!)[] steps, *, bool laprop, int[] group_sizes, Tensor lr, float[] beta1, float[] beta2_lower, "
    "float[] beta2_upper, float[] beta2_init, float[] eps, float[] weight_decay, int[] decoupled_weight_decay, "
    "int[] amsgrad, int[] maximize, int[] adam_eps, int[] stochastic_rounding, Tensor? grad_scale=None, "
    "Tensor? found_inf=None, Tensor? grad_norm=None, float max_grad_norm=-1.0, Tensor? trust_ratios=None, "
    "int[] rounding_keys=[], Tensor(h!)? statistics=None, Tensor(i!)? update_norms=None, "
    "Tensor(k!)? saturation=None) -> ()"
)
# The global L2 norm of all gradients: a scalar, float64 if any gradient is, else float32. Deterministic, and finite
# exactly where all gradients are.
library.define("grad_norm(Tensor[] grads) -> Tensor")
# The instruction set of the CPU kernels: AVX512, AVX2 or DEFAULT.
library.define("cpu_capability() -> str")


def _load(name: str) -> ModuleType | str:
    try:
        module = importlib.import_module(f"maxva_kernels.{name}")
    except ImportError as error:
        return str(error)
    if outdated := build_record.outdated(name):
        warnings.warn(f"maxva: {outdated}", stacklevel=2)
    return module


_MODULES = {name: _load(name) for name in build_record.MODULES.values()}


def load_error(name: str) -> str | None:
    """Why the compiled module ``"_C"`` (CPU) or ``"_C_cuda"`` could not be imported; None where it was."""
    module = _MODULES[name]
    return module if isinstance(module, str) else None


def module(name: str) -> ModuleType:
    """The compiled module of that name, which must be there."""
    module = _MODULES[name]
    assert not isinstance(module, str), module
    return module


@torch.library.register_fake("maxva::step_", lib=library)
def _(*lists: list[Tensor], **kwargs: object) -> None:
    params, grads, *_ = lists
    torch._check(len(params) == len(grads), lambda: f"maxva: {len(grads)} grads for {len(params)} params")
    # One "meta" tensor among others brings a call here that does nothing, so it must not pass.
    for name, tensors in zip(STEP_LISTS, lists, strict=True):
        for i, tensor in enumerate(tensors):
            if tensor.device != params[0].device:
                named, its_param = describe(tensor, name, i), describe(params[0], "params", 0)
                raise RuntimeError(f"maxva: {named} must be on the device of {its_param}; move it there")


@torch.library.register_fake("maxva::grad_norm", lib=library)
def _(grads: list[Tensor]) -> Tensor:
    double = any(grad.dtype == torch.float64 for grad in grads)
    return grads[0].new_empty((), dtype=torch.float64 if double else torch.float32)


step_ = torch.ops.maxva.step_.default
grad_norm = torch.ops.maxva.grad_norm.default
cpu_capability = torch.ops.maxva.cpu_capability.default


def call_step(
    groups: Sequence[Group],
    laprop: bool,
    scaling: Scaling,
    *,
    recorder: Recorder | None = None,
    saturation: Saturation | None = None,
    update_norms: Tensor | None = None,
) -> None:
    """`step_` on groups in which every parameter has a gradient."""
    device = groups[0].tensors.params[0].device
    statistics = None if recorder is None else recorder.table(tensors_of(groups), device)
    hypers = [group.hyper for group in groups]
    step_(
        *(_masters(groups) if name == "masters" else joined(groups, name) for name in STEP_LISTS),
        laprop=laprop,
        group_sizes=[len(group.tensors.params) for group in groups],
        lr=_rates(hypers),
        beta1=[hyper.beta1 for hyper in hypers],
        beta2_lower=[hyper.beta2_range[0] for hyper in hypers],
        beta2_upper=[hyper.beta2_range[1] for hyper in hypers],
        beta2_init=[hyper.first_beta2 for hyper in hypers],
        eps=[hyper.eps for hyper in hypers],
        weight_decay=[hyper.weight_decay for hyper in hypers],
        decoupled_weight_decay=[int(hyper.decoupled_weight_decay) for hyper in hypers],
        amsgrad=[int(hyper.amsgrad) for hyper in hypers],
        maximize=[int(hyper.maximize) for hyper in hypers],
        adam_eps=[int(hyper.eps_mode == "adam") for hyper in hypers],
        stochastic_rounding=[int(hyper.stochastic_rounding) for hyper in hypers],
        grad_scale=scaling.grad_scale,
        found_inf=scaling.found_inf,
        grad_norm=scaling.grad_norm,
        max_grad_norm=-1.0 if scaling.max_grad_norm is None else scaling.max_grad_norm,
        trust_ratios=scaling.trust_ratios,
        rounding_keys=_rounding_keys(groups),
        statistics=statistics,
        update_norms=update_norms,
        saturation=None if saturation is None else saturation.stamps(joined(groups, "weight_sums")),
    )


def _masters(groups: Sequence[Group]) -> list[Tensor]:
    """None, or one for each parameter of all groups."""
    if not any(group.tensors.masters for group in groups):
        return []
    return [master for group in groups for master in group.tensors.masters or map(no_master, group.tensors.params)]


def _rounding_keys(groups: Sequence[Group]) -> list[int]:
    if not any(group.keys for group in groups):
        return []
    return [key for group in groups for key in group.keys or [0] * len(group.tensors.params)]


def call_update_norms(groups: Sequence[Group], laprop: bool, scaling: Scaling) -> Tensor:
    """What `step_` writes to ``update_norms`` for groups in which every parameter has a gradient."""
    params = joined(groups, "params")
    norms = torch.zeros(len(params), 2, dtype=torch.float64, device=params[0].device)
    call_step(groups, laprop, scaling, update_norms=norms)
    return norms


def _rates(hypers: Sequence[Hyperparameters]) -> Tensor:
    """The groups' learning rates as the operator takes them."""
    if torch.compiler.is_compiling():
        # Arithmetic with a tensor is what lets torch.compile take a number as an input: others would be constants of
        # the graph, made anew for each value.
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return torch.stack([zero + (h.lr.cpu().reshape(()) if isinstance(h.lr, Tensor) else h.lr) for h in hypers])
    if any(isinstance(hyper.lr, Tensor) for hyper in hypers):
        return torch.stack(
            [torch.as_tensor(hyper.lr, dtype=torch.float64, device="cpu").reshape(()) for hyper in hypers]
        )
    return torch.tensor([hyper.lr for hyper in hypers], dtype=torch.float64, device="cpu")
