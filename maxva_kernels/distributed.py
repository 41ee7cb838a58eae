"""Parameters spread over ranks: DTensors (FSDP2, tensor parallelism), or engines that give each rank some of them.

Each rank steps on what it holds. The gradient norm is over all ranks: each takes the norm of its own part, the norms
are gathered, and every rank adds them in the same order, so that all clip by the same bits. Which ranks gather follows
from the parameters alone, never from which of them have a gradient: a rank whose shards are empty takes part. Only
trust ratios ask that the same parameters have a gradient on all ranks, as engines see to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import TENSOR_LISTS, Group, TensorLists

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_DEEPSPEED = "deepspeed.runtime.zero"


def dtensor() -> Any:
    """The class, for isinstance; what matches nothing where nobody has imported it, which takes most of a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", ())


def placement(tensor: Any) -> tuple[DeviceMesh, tuple[Any, ...]] | None:
    """Where a DTensor lies; None for what is none."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, dtensor()) else None


def any_dtensor(tensors: Iterable[Any]) -> bool:
    types = set(map(type, tensors))
    return any(issubclass(kind, dtensor()) for kind in types)


def to_local(tensors: Iterable[Any]) -> list[Any]:
    """This rank's parts, which share memory with the whole; what is no DTensor, as None, stays."""
    cls = dtensor()
    # What `to_local` returns where no gradients are recorded; in a compiled step that itself cannot be called.
    return [tensor._local_tensor if isinstance(tensor, cls) else tensor for tensor in tensors]


def local(groups: Sequence[Group]) -> list[Group]:
    """The groups with every DTensor replaced by the shard that this rank holds, which shares its memory.

    Raises:
        RuntimeError: a gradient is not spread as its parameter is and cannot be; the message names it.
    """
    index = 0  # in the list of gradients that are there, which messages count
    moved, cls = [], dtensor()
    for group in groups:
        tensors = group.tensors
        grads = list(tensors.grads)
        for i, (param, grad) in enumerate(zip(tensors.params, grads, strict=True)):
            if grad is not None:
                grads[i] = _as_spread(grad, param, index, cls)
                index += 1
        lists = {name: getattr(tensors, name) for name in TENSOR_LISTS}
        lists["grads"] = grads
        here = TensorLists(**{name: to_local(lists[name]) for name in lists})
        moved.append(Group(group.hyper, here, group.number, group.keys))
    return moved


def _as_spread(grad: Any, param: Any, index: int, cls: Any) -> Any:
    """The gradient with its parts where the parameter's are: tensor parallel layers may leave it to be added up."""
    if isinstance(param, cls) != isinstance(grad, cls):
        kinds = ("a DTensor", "a plain tensor") if isinstance(grad, cls) else ("a plain tensor", "a DTensor")
        raise RuntimeError(
            f"maxva: grads[{index}] is {kinds[0]}, but its parameter is {kinds[1]}; "
            "use DTensor.from_local or .to_local() to make them alike"
        )
    if not isinstance(param, cls) or (grad.device_mesh is param.device_mesh and grad.placements == param.placements):
        return grad
    if grad.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"maxva: grads[{index}] is on another device mesh ({grad.device_mesh}) than its parameter "
            f"({param.device_mesh}); redistribute one of them"
        )
    return grad.redistribute(placements=param.placements)


class Spread(NamedTuple):
    """Where the parts of DTensors lie: along which dimensions of which mesh they are cut."""

    mesh: DeviceMesh
    dims: tuple[int, ...]

    def gather(self, norm: Tensor) -> Tensor:
        """The norm of the whole from each rank's own."""
        norm = norm.to(self.mesh.device_type)  # gradients that are offloaded lie elsewhere
        for dim in self.dims:
            norm = gather(norm, self.mesh.get_group(dim))
        return norm


def _spread_of_each(tensors: Sequence[Any]) -> list[Spread | None]:
    """None for a tensor that is no DTensor."""
    cls = dtensor()
    each: list[Spread | None] = []
    mesh = placements = spread = None
    for tensor in tensors:
        if not isinstance(tensor, cls):
            each.append(None)
            continue
        if tensor.device_mesh is not mesh or tensor.placements != placements:  # mostly as the one before
            mesh, placements = tensor.device_mesh, tensor.placements
            cut = (dim for dim, placement in enumerate(placements) if not placement.is_replicate())
            spread = Spread(mesh, tuple(cut))
        each.append(spread)
    return each


def spreads(tensors: Sequence[Any], name: str = "params") -> list[Spread | None]:
    """Every `Spread` that there is among the tensors, in the order of their first; [None] where there is no DTensor.

    Raises:
        RuntimeError: they have no norm together that all ranks would agree on; the message names a tensor.
    """
    if not any_dtensor(tensors):
        return [None]
    found: dict[Spread | None, int] = {}
    last: object = object()
    for index, spread in enumerate(_spread_of_each(tensors)):
        if spread is not last:  # a hash of a mesh takes its time
            found.setdefault(spread, index)
            last = spread
            placements = () if spread is None else tensors[index].placements
            if any(placement.is_partial() for placement in placements):
                raise RuntimeError(
                    f"maxva: {name}[{index}] is still to be added up over ranks (placements {placements}); "
                    "redistribute it first"
                )
    if None in found and len(found) > 1:
        raise RuntimeError(
            f"maxva: a gradient norm needs to know where the whole of each tensor is, but {name}[{found[None]}] is a "
            "plain tensor beside DTensors, which may be a copy or a part; shard it too, or make it a DTensor by "
            "torch.distributed.tensor.distribute_tensor(tensor, mesh, [Replicate()])"
        )
    meshes = [(spread.mesh, index) for spread, index in found.items() if spread is not None]
    for mesh, index in meshes[1:]:
        first, at = meshes[0]
        if mesh != first and set(mesh.mesh.flatten().tolist()) != set(first.mesh.flatten().tolist()):
            raise RuntimeError(
                f"maxva: a gradient norm needs all tensors on the same ranks, but {name}[{index}] is on {mesh} and "
                f"{name}[{at}] on {first}; clip before the step, by the norm over all that you have of all ranks"
            )
    return list(found)


def by_spread(
    owners: Sequence[Any], grads: Sequence[Tensor | None], spreads: Sequence[Spread | None]
) -> dict[Spread | None, list[Tensor]]:
    """The gradients that are there, under the spread of their owners; an empty list for one that has none."""
    if spreads == [None]:
        return {None: [grad for grad in grads if grad is not None]}
    parts: dict[Spread | None, list[Tensor]] = {spread: [] for spread in spreads}
    last: object = object()
    for spread, grad in zip(_spread_of_each(owners), grads, strict=True):
        if spread is not last:
            members, last = parts[spread], spread
        if grad is not None:
            members.append(grad)
    return parts


def whole_norms(norms: Tensor, owners: Sequence[Any]) -> Tensor:
    """For each owner the norms of the whole tensors from those of the parts that are here, which it may write over: a
    row of them each."""
    if not any_dtensor(owners):
        return norms
    each = _spread_of_each(owners)
    for spread in dict.fromkeys(each):
        if spread is not None:
            rows = torch.tensor([i for i, its in enumerate(each) if its == spread], device=norms.device)
            norms[rows] = spread.gather(norms[rows]).to(norms)
    return norms


def gather(norm: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The norm of all ranks' norms, float64, element by element; added in the ranks' order, and so the same on each."""
    own = norm.to(torch.float64).unsqueeze(0).contiguous()
    norms = own.new_empty(dist.get_world_size(group), *norm.shape)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14
    all_gather(norms, own, group=group)
    return joined_norm(norms)


def joined_norm(norms: Tensor) -> Tensor:
    """The norm of norms over the first dimension, float64: as theirs it is finite exactly where all gradients are."""
    largest = norms.amax(0)
    total = (largest * torch.linalg.vector_norm(norms / largest, dim=0)).clamp(max=torch.finfo(torch.float64).max)
    return torch.where((largest > 0) & largest.isfinite(), total, largest)


def norm_group(params: Iterable[Tensor], inside_zero: bool) -> dist.ProcessGroup | None:
    """The ranks among which an engine has divided the parameters without their telling; None where there is no such.

    Note [Engines that hide what they divide]: `ZeroRedundancyOptimizer` makes on each rank an optimizer of some of the
    parameters, and calls its `step`. Nothing that this optimizer sees says that there is more, and a norm over what it
    sees would clip each rank's parameters by another factor, without a word. So it looks at who is calling.

    Args:
        inside_zero: whether `is_inside_zero` when the optimizer was made. If not, a step that torch.compile traces,
            which cannot look at its callers, need not.

    Raises:
        RuntimeError: the engine divides tensors in a way that leaves the norm to itself.
    """
    if not has_ranks():
        return None
    if is_flattened(params):
        raise _their_own_norm("FSDP1", "use its clip_grad_norm_ before the step, or fully_shard (FSDP2)")
    if torch.compiler.is_compiling() and not inside_zero:
        return None
    for frame, module in _callers():
        if module == _ZERO:
            return frame.f_locals["self"].process_group
        if module.startswith(_DEEPSPEED):
            raise _their_own_norm("DeepSpeed's ZeRO", "use gradient_clipping in DeepSpeed's configuration")
    return None


def is_flattened(params: Iterable[Tensor]) -> bool:
    """Whether FSDP1 has made each rank's parameters parts of the whole, of which they do not tell."""
    return has_ranks() and any(getattr(param, "_fsdp_flattened", False) for param in params)


def check_savable(param: Tensor, state: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError where the engine that has divided a parameter could not save its state.

    For a checkpoint FSDP1 gathers all of an original parameter's state in one buffer, of one dtype, where other engines
    gather each tensor by itself: a master of another dtype than the moments has the first checkpoint fail, after hours.
    """
    master, moment = state["master"].dtype, state["exp_avg"].dtype
    flattened, is_flat = (getattr(param, name, False) for name in ("_fsdp_flattened", "_is_flat_param"))
    if master != moment and flattened and not is_flat:
        raise RuntimeError(
            "maxva: FSDP1 with use_orig_params=True saves only one dtype of a parameter's state, and with "
            f"master_weights=True that of a {param.dtype} parameter is {moment} and {master}; use fully_shard (FSDP2), "
            f"use_orig_params=False, state_dtype={None if master == torch.float32 else master}, or master_weights=False"
        )


def is_inside_zero() -> bool:
    """Whether `ZeroRedundancyOptimizer` is calling."""
    return has_ranks() and any(module == _ZERO for _, module in _callers())


def has_ranks() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _callers() -> Iterator[tuple[FrameType, str]]:
    """Who is calling, the innermost first, with the names of their modules."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        yield frame, frame.f_globals.get("__name__", "")
        frame = frame.f_back


def _their_own_norm(engine: str, remedy: str) -> RuntimeError:
    return RuntimeError(
        f"maxva: {engine} gives each rank a part of the parameters, so that max_grad_norm, skip_nonfinite and "
        f"trust_ratio would be about that part alone; {remedy}"
    )
