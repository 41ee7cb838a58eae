"""The functional form of MAdam and LaMAdam: no state but what is passed in, everything updated in place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from . import checks, distributed
from .backends.registry import select
from .groups import Group, Hyperparameters, Scaling, TensorLists, joined, with_gradients
from .rounding import tensor_key
from .saturation import Saturation
from .statistics import Recorder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MaybeTensor = TypeVar("MaybeTensor", bound=Tensor | None)
Result = TypeVar("Result")

__all__ = ["grad_norm", "lamadam_", "madam_", "step_groups"]


def madam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    grad_means: list[Tensor],
    grad_vars: list[Tensor],
    weight_sums: list[Tensor],
    steps: list[Tensor],
    max_denoms: list[Tensor] | None = None,
    masters: list[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2_range: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    beta2_init: float | None = None,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    eps_mode: str = "paper",
    trust_ratio: bool = False,
    stochastic_rounding: bool = False,
    rounding_seed: int = 0,
    max_grad_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of MAdam (Algorithm 1 of arXiv 2006.11918) on lists of tensors, in place.

    The lists are aligned by index and their tensors share a device. For `lamadam_` (Algorithm 2) the same holds.

    Args:
        params: float32, bfloat16, float16 or float64, of any shape without overlapping memory.
        grads: of the parameters' shapes; dtypes as above, which may differ from the parameter's. Only read.
        exp_avgs: the momentum m~. State is float32, or float64 for float64 parameters, or bfloat16 for others, which is
            rounded stochastically; of the parameters' shapes, and zero before the first step. So are the next three.
        grad_means: the bias-corrected mean u of the gradient.
        grad_vars: its central second moment s = v - u^2.
        weight_sums: the zeroth moment w (Eq. 2).
        steps: int64 scalars, the number of steps done; advanced by one.
        max_denoms: the running maximum of sqrt(v); passing it turns AMSGrad on.
        masters: bfloat16 of the parameters' shapes, zero before the first step: what makes float32 weights of bfloat16
            parameters (`maxva_kernels.join_master`). Of others, tensors without elements.
        stochastic_rounding: of bfloat16 parameters without master; others are rounded to nearest.
        rounding_seed: of the random numbers that state and parameters are rounded by, with a parameter's place in the
            lists and its step.
        max_grad_norm: clip by the global norm of these gradients, after unscaling.
        grad_scale: a scalar that the gradients are to be divided by.
        found_inf: a scalar; where it is not 0 nothing is changed.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    For the hyperparameters see `maxva_kernels.MAdam`.

    Raises:
        ValueError: a hyperparameter is out of range, or there is no such backend.
        TypeError: a hyperparameter that must be a number is not one.
        RuntimeError: a tensor does not fit, or the backend cannot run on its device. Nothing has been changed.
    """
    _single_group(False, **locals())


def lamadam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    grad_means: list[Tensor],
    grad_vars: list[Tensor],
    weight_sums: list[Tensor],
    steps: list[Tensor],
    max_denoms: list[Tensor] | None = None,
    masters: list[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2_range: tuple[float, float] = (0.5, 0.999),
    eps: float = 1e-15,
    weight_decay: float = 0.0,
    beta2_init: float | None = None,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    eps_mode: str = "paper",
    trust_ratio: bool = False,
    stochastic_rounding: bool = False,
    rounding_seed: int = 0,
    max_grad_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of LaMAdam (Algorithm 2 of arXiv 2006.11918) on lists of tensors, in place; see `madam_`.

    ``exp_avgs`` is here the average of normalised gradients.
    """
    _single_group(True, **locals())


def step_groups(
    groups: Sequence[Group],
    *,
    laprop: bool,
    max_grad_norm: float | None = None,
    norm_group: ProcessGroup | None = None,
    spreads: Sequence[distributed.Spread | None] | None = None,
    skipped_steps: Tensor | None = None,
    recorder: Recorder | None = None,
    saturation: Saturation | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step over several groups, each with its hyperparameters; the clip is by the norm over all of them.

    Each group's tensors share a device; the groups may be on several. Parameters may be DTensors, all ranks calling.

    Args:
        norm_group: ranks whose gradients belong to the norm too, though no DTensor tells.
        spreads: of all parameters that the norm is ever about; None: of the groups' parameters.
        skipped_steps: a count, advanced by one where the norm is not finite, in which case nothing else is changed.
            None: such gradients are stepped on like others.
        recorder: is told what the step did.
        saturation: what the last step has left for this one, that it need not read w.

    Other args and errors as for `madam_`. An index in an error's message counts the parameters of all groups, in their
    order, that have a gradient.
    """
    check_max_grad_norm(max_grad_norm)
    params = joined(groups, "params")
    whole = groups
    if distributed.any_dtensor(params):
        groups = distributed.local(groups)
    norm = None
    # Whatever gradients are here: ranks that have others wait for this one's norm.
    if max_grad_norm is not None or skipped_steps is not None:
        spreads = distributed.spreads(params) if spreads is None else spreads
        norm = _grad_norm(params, joined(groups, "grads"), spreads, norm_group, backend)
    if recorder is not None:
        recorder.clip(norm, grad_scale, max_grad_norm)
    skip = None
    if norm is not None and skipped_steps is not None:
        skip = norm.isfinite().logical_not().float()
        found_inf = skip if found_inf is None else skip + _on(skip.device, found_inf)
    # Parameters without trust ratios first: when they are stepped, those with one have been checked.
    parts: dict[tuple[bool, torch.device], list[int]] = {}
    for i, group in enumerate(groups):
        if any(grad is not None for grad in group.tensors.grads):
            parts.setdefault((group.hyper.trust_ratio, group.tensors.params[0].device), []).append(i)
    steps = []
    for (trust_ratio, device), members in sorted(parts.items(), key=lambda part: part[0][0]):
        its_groups: Sequence[Group] = [groups[i] for i in members]
        scaling = Scaling(_on(device, grad_scale), _on(device, found_inf))
        if max_grad_norm is not None and max_grad_norm < math.inf:
            scaling = Scaling(*scaling[:2], _on(device, norm), max_grad_norm)
        runs = select(backend, device)
        if trust_ratio:
            its_groups = with_gradients(its_groups)
            owners = joined(with_gradients([whole[i] for i in members]), "params")
            norms = _call(runs.update_norms, groups, members, its_groups, laprop, scaling)
            norms = distributed.whole_norms(norms, owners)
            scaling = Scaling(*scaling[:4], _trust_ratios(norms))
        steps.append((runs, members, its_groups, scaling))
    # A part is checked by its own step, before which others' have already changed their tensors.
    for _, members, its_groups, _ in steps[1:]:
        if not groups[members[0]].hyper.trust_ratio and not torch.compiler.is_compiling():
            _call(checks.check_groups, groups, members, with_gradients(its_groups))
    if saturation is not None:
        saturation.begin_step([] if whole is groups else joined(whole, "weight_sums"))
    for runs, members, its_groups, scaling in steps:
        _call(runs.step, groups, members, its_groups, laprop, scaling, recorder, saturation)
    if skip is not None and skipped_steps is not None:  # only now that nothing was refused
        skipped_steps += _on(skipped_steps.device, skip).to(skipped_steps.dtype)


def _call(
    backend: Callable[..., Result], groups: Sequence[Group], members: Sequence[int], *arguments: object
) -> Result:
    """Calls a backend about some of the groups; its errors then count in the lists of all of them."""
    try:
        return backend(*arguments)
    except RuntimeError as error:
        message = checks.ENTRY.sub(lambda entry: _counted_in_all(entry, groups, members), str(error))
        if type(error) is not RuntimeError or message == str(error):  # not its subclasses, as NotImplementedError
            raise
        raise RuntimeError(message) from error


def _counted_in_all(entry: re.Match[str], groups: Sequence[Group], members: Sequence[int]) -> str:
    """An entry of the lists of the members, as that of the lists of all groups which it is."""
    name, index = entry[1], int(entry[2])
    sizes = [
        0 if name == "max_denoms" and not group.hyper.amsgrad else sum(grad is not None for grad in group.tensors.grads)
        for group in groups
    ]
    places = [sum(sizes[:g]) + i for g in members for i in range(sizes[g])]
    return f"{name}[{places[index]}]" if index < len(places) else entry[0]


def _trust_ratios(norms: Tensor) -> Tensor:
    """LAMB's ratio (You et al., 2020, arXiv 1904.00962) of each parameter's norm to its update's; 1 where one is 0."""
    of_param, of_update = norms.unbind(1)
    # Bounded, so that a rate times it is finite in float32: momentum that decays without gradients ends as hardly
    # anything, and where it is 0 an infinite rate would make a NaN of it.
    return torch.where((of_param > 0) & (of_update > 0), of_param / of_update, 1.0).clamp(max=2.0**100)


@torch.no_grad()
def grad_norm(grads: list[Tensor], *, backend: str = "auto") -> Tensor:
    """The L2 norm over all gradients together, as a scalar tensor on the first one's device; of none 0, on the CPU.

    float32, or float64 if any gradient is, or where norms of several devices or ranks are joined. Deterministic: it
    depends neither on threads nor on the backend's geometry. Squares neither overflow nor vanish on the way, and a norm
    beyond the largest number is that number: it is finite exactly where all gradients are (see csrc/norm.h).

    Of DTensors it is the norm of the whole tensors, and every rank of their meshes must call it.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: a tensor has no norm (it is sparse, say), the ranks would not agree on it, or the backend cannot
            run on its device.
    """
    spreads = distributed.spreads(grads, "grads")
    return _grad_norm(grads, distributed.to_local(grads), spreads, None, backend)


def _grad_norm(
    owners: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    spreads: Sequence[distributed.Spread | None],
    norm_group: ProcessGroup | None,
    backend: str,
) -> Tensor:
    """The norm of local gradients, each a part of a tensor that is spread as its owner."""
    norms = []
    for spread, parts in distributed.by_spread(owners, grads, spreads).items():
        try:
            norm = _norm_here(parts, backend)
        except RuntimeError:
            checks.check_grads([grad for grad in grads if grad is not None])  # whose indices count in all
            raise
        norms.append(norm if spread is None else spread.gather(norm))
    norm = _joined_norm(norms)
    return norm if norm_group is None else distributed.gather(norm, norm_group)


def _norm_here(grads: Sequence[Tensor], backend: str) -> Tensor:
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    if not by_device:
        return torch.zeros((), device="cpu")  # whatever the default is
    return _joined_norm([select(backend, device).grad_norm(members) for device, members in by_device.items()])


def _joined_norm(norms: Sequence[Tensor]) -> Tensor:
    if len(norms) == 1:
        return norms[0]
    return distributed.joined_norm(torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]))


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Raises ValueError unless it is None or a positive number (inf measures and clips nothing)."""
    try:
        fits = max_grad_norm is None or max_grad_norm > 0
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"max_grad_norm must be None or a number > 0, got {max_grad_norm!r}")


def _on(device: torch.device, scalar: MaybeTensor) -> MaybeTensor:
    if scalar is None:
        return scalar
    # Not to the CPU, which would read before it is there.
    return scalar.to(device, non_blocking=device.type != "cpu")  # type: ignore[return-value]


@torch.no_grad()
def _single_group(
    laprop: bool,
    *,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    grad_means: list[Tensor],
    grad_vars: list[Tensor],
    weight_sums: list[Tensor],
    steps: list[Tensor],
    max_denoms: list[Tensor] | None,
    masters: list[Tensor] | None,
    max_grad_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rounding_seed: int,
    backend: str,
    **hyper: object,
) -> None:
    group = Group(
        Hyperparameters(**hyper, amsgrad=max_denoms is not None),  # type: ignore[arg-type]
        TensorLists(
            params, list(grads), exp_avgs, grad_means, grad_vars, weight_sums, max_denoms or [], masters or [], steps
        ),
        keys=[tensor_key(rounding_seed, i) for i in range(len(params))],
    )
    step_groups(
        [group],
        laprop=laprop,
        max_grad_norm=max_grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        backend=backend,
    )
