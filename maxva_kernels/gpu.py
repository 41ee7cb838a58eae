"""The host's part of a step on a GPU, for every backend that has one: tables looked up, launches composed.

Nothing here waits for the device. What a launch is given besides the table goes with it, as its arguments: the
gradients' addresses, the groups' hyperparameters, and addresses of the scalars that the device reads.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, layouts
from .groups import TENSOR_LISTS, Group, Scaling, arithmetic_dtype, joined, with_gradients
from .launch import DTYPE_CODES, Launcher, NormLaunch, StepLaunch, TotalLaunch, pack
from .saturation import Saturation
from .statistics import Recorder, tensors_of
from .tensor_table import (
    NormTable,
    StepTable,
    TableCache,
    dtype_of,
    layout_of,
    make_norm_table,
    make_step_table,
    shape_of,
    step_key,
)

# What stands for the address of a gradient without elements, which has none: not 0, which would mean no gradient.
_NO_ELEMENTS = 1


_captured: list[Tensor] = []  # what captured graphs use besides tables: learning rates, stamps
step_tables: TableCache[StepTable] = TableCache()
norm_tables: TableCache[NormTable] = TableCache()


def current_stream(device: torch.device) -> int:
    """The stream that PyTorch launches on, as a number."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def record_event(device: torch.device) -> torch.cuda.Event:
    """An event that has happened when all is done that the current stream was given so far."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def wait_event(event: torch.cuda.Event, device: torch.device) -> None:
    """Has the current stream go on after that event; the host does not wait."""
    torch.cuda.current_stream(device).wait_event(event)


def record_use(memory: Tensor) -> None:
    """Has PyTorch give that memory, once it is freed, to nobody before the current stream has come to this place."""
    memory.record_stream(torch.cuda.current_stream(memory.device))


def is_capturing() -> bool:
    """Whether launches go into a CUDA graph at present."""
    return torch.cuda.is_current_stream_capturing()


def _is_captured(launcher: Launcher) -> bool:
    """Whether launches go into a CUDA graph at present.

    Raises:
        RuntimeError: the launcher's may not.
    """
    if not is_capturing():
        return False
    if not launcher.GRAPHS:
        raise RuntimeError(
            "maxva: a driver older than CUDA 13 takes at most 4 KB of a kernel's arguments into a CUDA graph, and the "
            "CUDA kernels have more; update the driver (R580 or newer), or use backend='triton'"
        )
    return True


def step(
    launcher: Launcher,
    groups: Sequence[Group],
    laprop: bool,
    scaling: Scaling,
    recorder: Recorder | None = None,
    saturation: Saturation | None = None,
) -> None:
    """One step in place, by one launch for each combination of dtypes; where a gradient is None nothing changes.

    Raises:
        RuntimeError: a tensor does not fit; nothing has been changed.
    """
    _launch(launcher, groups, laprop, scaling, recorder, saturation, None)


def update_norms(launcher: Launcher, groups: Sequence[Group], laprop: bool, scaling: Scaling) -> Tensor:
    """Of each parameter its norm and that of its update at learning rate 1: float64 [params, 2]; 0 without gradient.

    Raises:
        RuntimeError: a tensor does not fit.
    """
    params = joined(groups, "params")
    norms = torch.zeros(len(params), 2, dtype=torch.float64, device=params[0].device)
    _launch(launcher, groups, laprop, scaling, None, None, norms)
    return norms


def _launch(
    launcher: Launcher,
    groups: Sequence[Group],
    laprop: bool,
    scaling: Scaling,
    recorder: Recorder | None,
    saturation: Saturation | None,
    norms: Tensor | None,
) -> None:
    """Launches a step or, if ``norms`` are to be filled, them alone."""
    params = joined(groups, "params")
    checks.check_scaling(scaling)
    device = params[0].device

    def check() -> None:
        given = with_gradients(groups)
        checks.check_groups(given)
        for name in TENSOR_LISTS:
            checks.check_memory(joined(given, name), name)

    def make() -> StepTable:
        check()
        table = make_step_table(groups, launcher.STEP_CHUNK, launcher.MAX_TENSORS, launcher.MAX_GROUPS)
        table.stream = stream
        return table

    try:
        key = step_key(groups)
    except RuntimeError:
        check()  # which names the tensor
        raise
    capturing = _is_captured(launcher)
    stream = current_stream(device)
    table = step_tables.find(key, make, capturing)
    _record_use(table, stream, capturing)
    grads = _fitting(joined(groups, "grads"), params, table, check)
    _copy_stand_ins(groups, table, back=False)
    weight_sums = joined(groups, "weight_sums")
    for param_dtype, state_dtype, segment, members in table.segments:
        dtype = torch.float64 if param_dtype == torch.float64 else torch.float32
        its_grads = [grads[i] for i in segment.tensors]
        # Kept until the launch: what is converted has no other owner.
        scalars = [None if scalar is None else scalar.to(dtype) for scalar in scaling[:3]]
        ratios = None if scaling.trust_ratios is None else segment.rows_of(scaling.trust_ratios).to(dtype)
        records = None
        if recorder is not None:
            of_all = tensors_of(groups)
            records = recorder.table([of_all[i] for i in segment.tensors], device)
        stamps = None
        if saturation is not None and not table.stand_ins:  # whose chunks need not be those of the original
            stamps = saturation.stamps([weight_sums[i] for i in segment.tensors])
        squares = its_norms = None
        if norms is not None:
            squares = torch.empty(segment.chunks, 6, dtype=dtype, device=device)
            its_norms = torch.zeros(len(segment.tensors), 2, dtype=dtype, device=device)
        addresses = map(_address, (*scalars, ratios, records, stamps, squares, its_norms))
        grad_scale, found_inf, grad_norm, trust_ratios, statistics, of_stamps, of_squares, of_norms = addresses
        packed, rates = pack([groups[g].hyper for g in members], dtype, device)
        for grad_dtype in dict.fromkeys(grad.dtype for grad in its_grads if grad is not None):
            launch = StepLaunch(
                device.index or 0,
                stream,
                DTYPE_CODES[param_dtype],
                DTYPE_CODES[grad_dtype],
                DTYPE_CODES[state_dtype],
                laprop,
                segment.amsgrad,
                segment.masters,
                segment.rows,
                segment.chunk_rows,
                segment.chunks,
                segment.ticket,
                packed,
                _addresses(its_grads, grad_dtype, check),
                grad_scale,
                found_inf,
                grad_norm,
                trust_ratios,
                statistics,
                of_stamps,
                of_squares,
                of_norms,
                -1.0 if scaling.max_grad_norm is None else scaling.max_grad_norm,
            )
            if norms is None:
                launcher.step(launch)
            else:
                launcher.update_norms(launch)
        if norms is not None and its_norms is not None:
            segment.put_rows(its_norms, norms)
        if capturing:
            _captured.extend(rates if stamps is None else [*rates, stamps])
    if norms is not None:
        return
    _copy_stand_ins(groups, table, back=True)
    # The kernel writes behind autograd's back: a parameter saved for a backward pass must be known to have changed.
    torch.autograd.graph.increment_version(
        [param for param, grad in zip(params, grads, strict=True) if grad is not None]
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def grad_norm(launcher: Launcher, grads: list[Tensor]) -> Tensor:
    """The global norm, a scalar on the gradients' device: float64 if any gradient is, else float32."""
    dtypes = set(map(dtype_of, grads))
    if (
        set(map(layout_of, grads)) != {torch.strided}
        or not dtypes <= DTYPE_CODES.keys()
        or len(set(map(Tensor.get_device, grads))) > 1
    ):
        checks.check_grads(grads)
        i = next(i for i, grad in enumerate(grads) if grad.device != grads[0].device)
        raise RuntimeError(f"maxva: {checks.describe(grads[i], 'grads', i)} is on another device than grads[0]")
    if not all(map(Tensor.is_contiguous, grads)):
        grads = [layouts.dense(grad) for grad in grads]
    device, double = grads[0].device, torch.float64 in dtypes
    stream = current_stream(device)

    def check() -> None:
        checks.check_memory(grads, "grads")

    def make() -> NormTable:
        table = make_norm_table(grads, launcher.NORM_CHUNK, launcher.MAX_TENSORS)
        table.stream, table.sent = stream, record_event(device)
        return table

    key = (device, *map(Tensor.numel, grads), *map(dtype_of, grads))
    capturing = _is_captured(launcher)
    table = norm_tables.find(key, make, capturing)
    # Gradients of these sizes on another stream share the table, whose copy to the device that stream knows nothing of.
    # A capture has a stream of its own, and may not wait for what lies outside; its graph's replays come after the
    # steps before the capture, which waited.
    if table.sent is not None and table.stream != stream and not capturing:
        wait_event(table.sent, device)
    _record_use(table, stream, capturing)
    sums = torch.empty((table.chunks, 3), dtype=torch.float64 if double else torch.float32, device=device)
    norm = torch.empty((), dtype=sums.dtype, device=device)
    where = (device.index or 0, stream)
    for dtype, segment in table.segments:
        addresses = _addresses([grads[i] for i in segment.tensors], dtype, check)
        cut = (segment.rows, segment.chunk_rows, segment.chunks)
        launcher.norm_chunks(NormLaunch(*where, DTYPE_CODES[dtype], double, *cut, addresses, sums.data_ptr()))
    launcher.norm_total(TotalLaunch(*where, double, sums.data_ptr(), table.chunks, norm.data_ptr()))
    return norm


def _record_use(table: StepTable | NormTable, stream: int, capturing: bool) -> None:
    """Before launches on that stream: the table may be dropped while they wait. Where it was made on their stream,
    memory that is freed goes to what comes after them; what a graph reads is not dropped."""
    if table.stream != stream and not capturing:
        for memory in table.memory():
            record_use(memory)


def _fitting(
    grads: list[Tensor | None], params: list[Tensor], table: StepTable, check: Callable[[], None]
) -> list[Tensor | None]:
    """The gradients as the kernels take them: copied where they lie in another order than their parameter, or where one
    is float64 and the other not. Raises by `check` if any cannot be taken."""
    present = [i for i, grad in enumerate(grads) if grad is not None]
    given: list[Any] = grads
    shapes, strides = table.shapes, table.strides
    if len(present) != len(grads):
        given = [grads[i] for i in present]
        shapes, strides = [shapes[i] for i in present], [strides[i] for i in present]
    dtypes = set(map(dtype_of, given))
    if (
        set(map(layout_of, given)) != {torch.strided}
        or not all(map(operator.eq, map(shape_of, given), shapes))
        or not dtypes <= DTYPE_CODES.keys()
        or set(map(Tensor.get_device, given)) != {params[0].get_device()}
    ):
        check()
    if table.contiguous:
        same_order = all(map(Tensor.is_contiguous, given))
    else:
        same_order = all(map(operator.eq, map(Tensor.stride, given), strides))
    if same_order and torch.float64 not in dtypes and not table.has_double and not any(map(Tensor.is_neg, given)):
        return grads
    fitting = list(grads)
    for i, grad, wanted in zip(present, given, strides, strict=True):
        if (grad.dtype == torch.float64) != (params[i].dtype == torch.float64):
            grad = grad.to(arithmetic_dtype(params[i]))
        if not layouts.same_order(grad, wanted):
            grad = layouts.empty_with(wanted, grad).copy_(grad)
        fitting[i] = grad.resolve_neg()  # a view that is yet to be negated cannot be read as it is
    return fitting


def _addresses(grads: Sequence[Tensor | None], dtype: torch.dtype, check: Callable[[], None]) -> bytes:
    """The addresses of the gradients of that dtype; 0 for the others, which the launch leaves alone. Raises by `check`
    if one that has elements has no address."""
    return array(
        "Q",
        [grad.data_ptr() or _none(grad, check) if grad is not None and grad.dtype == dtype else 0 for grad in grads],
    ).tobytes()


def _none(grad: Tensor, check: Callable[[], None]) -> int:
    if grad.numel() > 0:
        check()
    return _NO_ELEMENTS


def _copy_stand_ins(groups: Sequence[Group], table: StepTable, *, back: bool) -> None:
    for name, index, stand_in in table.stand_ins:
        original = joined(groups, name)[index]
        if back:
            original.copy_(stand_in)
        else:
            stand_in.copy_(original)
