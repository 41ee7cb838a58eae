"""The operators: their schemas, their fakes, and the loading of the compiled modules that implement them.

The schemas stand here and not in C++ so that an installation without compiled code has them too.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .checks import describe

_library = torch.library.Library("maxva", "DEF")

# One step of MAdam (laprop=False) or LaMAdam (laprop=True), in place, over all parameters of one device.
# Lists named in the plural have an entry for each parameter (max_denoms: for each of a group with AMSGrad), the others
# for each group; group_sizes says how many consecutive parameters a group has. lr is a float64 CPU tensor, so that a
# graph does not recompile when it changes. grad_norm is the global norm of the gradients as they stand;
# max_grad_norm < 0 clips nothing. found_inf != 0 leaves everything untouched.
_library.define(
    "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] grad_means, "
    "Tensor(d!)[] grad_vars, Tensor(e!)[] weight_sums, Tensor(f!)[] max_denoms, Tensor(g!)[] steps, *, "
    "bool laprop, int[] group_sizes, Tensor lr, float[] beta1, float[] beta2_lower, float[] beta2_upper, "
    "float[] beta2_init, float[] eps, float[] weight_decay, int[] decoupled_weight_decay, int[] amsgrad, "
    "int[] maximize, int[] adam_eps, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? grad_norm=None, "
    "float max_grad_norm=-1.0) -> ()"
)
# The global L2 norm of all gradients: a scalar, float64 if any gradient is, else float32. Deterministic, and finite
# wherever the norm itself is representable.
_library.define("grad_norm(Tensor[] grads) -> Tensor")
# The instruction set of the CPU kernels: AVX512, AVX2 or DEFAULT.
_library.define("cpu_capability() -> str")


def _load(module: str) -> str | None:
    try:
        importlib.import_module(f"maxva_kernels.{module}")
    except ImportError as error:
        return str(error)
    return None


_LOAD_ERRORS = {module: _load(module) for module in ("_C", "_C_cuda")}


def load_error(module: str) -> str | None:
    """Why the compiled module ``"_C"`` (CPU) or ``"_C_cuda"`` could not be imported; None where it was."""
    return _LOAD_ERRORS[module]


@torch.library.register_fake("maxva::step_", lib=_library)
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    grad_means: list[Tensor],
    grad_vars: list[Tensor],
    weight_sums: list[Tensor],
    max_denoms: list[Tensor],
    steps: list[Tensor],
    **kwargs: object,
) -> None:
    torch._check(len(params) == len(grads), lambda: f"maxva: {len(grads)} grads for {len(params)} params")
    # One "meta" tensor among others brings a call here that does nothing, so it must not pass.
    lists = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "grad_means": grad_means,
        "grad_vars": grad_vars,
        "weight_sums": weight_sums,
        "max_denoms": max_denoms,
        "steps": steps,
    }
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.device != params[0].device:
                named, its_param = describe(tensor, name, i), describe(params[0], "params", 0)
                raise RuntimeError(f"maxva: {named} must be on the device of {its_param}; move it there")


@torch.library.register_fake("maxva::grad_norm", lib=_library)
def _(grads: list[Tensor]) -> Tensor:
    double = any(grad.dtype == torch.float64 for grad in grads)
    return grads[0].new_empty((), dtype=torch.float64 if double else torch.float32)


step_ = torch.ops.maxva.step_.default
grad_norm = torch.ops.maxva.grad_norm.default
cpu_capability = torch.ops.maxva.cpu_capability.default
