"""What stays between the steps of a GPU, in its memory: where parameters and state lie, and how the work is cut.

A table is made once for a set of tensors and found again by what it holds: the addresses themselves, with shapes,
sizes and dtypes, are the key of a cache. So nothing needs to announce a change: a parameter whose storage was
swapped, a loaded checkpoint, `.to()`, an added group all look up another key and have a table made. Gradients are not
in it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Generic, TypeVar

import torch
from torch import Tensor

from . import layouts
from .groups import Group, joined

shape_of, dtype_of, layout_of = attrgetter("shape"), attrgetter("dtype"), attrgetter("layout")

STATE_LISTS = ("exp_avgs", "grad_means", "grad_vars", "weight_sums")

# The columns of a step's table, as csrc/cuda/launch.h (StepRow) and the Triton kernels read them.
STEP_COLUMNS = (
    *("param", "exp_avg", "grad_mean", "grad_var", "weight_sum", "max_denom", "step"),  # addresses
    *("numel", "group", "first_chunk", "rounding_key"),
    "master",  # address
)
# And of the norm's (NormRow).
NORM_COLUMNS = ("numel", "first_chunk", "first_sum")


class Segment:
    """What one launch walks: some tensors, with their rows and chunks in one piece of device memory."""

    def __init__(self, tensors: list[int], rows: list[list[int]], chunk_counts: list[int], device: torch.device):
        self.tensors = tensors  # their indices in the lists that the table was made of
        self.chunks = sum(chunk_counts)
        with torch.device("cpu"):  # whatever the default is
            indices = torch.arange(len(rows), dtype=torch.int32)
            chunk_rows = torch.repeat_interleave(indices, torch.tensor(chunk_counts))
            chunk_rows = torch.nn.functional.pad(chunk_rows, (0, self.chunks % 2)).view(torch.int64)
            ticket = torch.zeros(1, dtype=torch.int64)
            memory = torch.cat([torch.tensor(rows, dtype=torch.int64).flatten(), ticket, chunk_rows])
        # The copy is ordered before the launches on this stream, and so before all that the user orders after them.
        self.memory = [memory.to(device, non_blocking=True)]
        self.rows = self.memory[0].data_ptr()  # addresses
        self.ticket = self.rows + 8 * len(rows) * len(rows[0])
        self.chunk_rows = self.ticket + 8
        # Of a step, whether any row has them.
        self.amsgrad = self.masters = False
        self._index: Tensor | None = None

    def is_part(self) -> None:
        """There are other segments: the rows of this one are some of all."""
        self._index = torch.tensor(self.tensors, device="cpu").to(self.memory[0].device, non_blocking=True)
        self.memory.append(self._index)

    def rows_of(self, values: Tensor) -> Tensor:
        """What of values for all tensors belongs to the rows."""
        return values if self._index is None else values.index_select(0, self._index)

    def put_rows(self, values: Tensor, into: Tensor) -> None:
        """Copies values of the rows to where those of all tensors are."""
        if self._index is None:
            into.copy_(values)
        else:
            into.index_copy_(0, self._index, values.to(into.dtype))


@dataclass
class StepTable:
    """The tables of one step: for each pair of dtypes, a parameter's and its state's, as many segments as it takes
    launches."""

    # The two dtypes, what the launch walks, and the groups it has.
    segments: list[tuple[torch.dtype, torch.dtype, Segment, range]] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)  # of each parameter
    strides: list[tuple[int, ...]] = field(default_factory=list)  # in which its operands must lie
    contiguous: bool = True  # whether these are the usual ones
    has_double: bool = False  # a parameter is float64
    # Operands that lie otherwise: the list, the index in it, and memory that the kernel works on in their place.
    stand_ins: list[tuple[str, int, Tensor]] = field(default_factory=list)
    stream: int = 0  # on which it was sent to the device

    def memory(self) -> list[Tensor]:
        """What it holds on the device."""
        memory = [tensor for *_, segment, _ in self.segments for tensor in segment.memory]
        return memory + [stand_in for *_, stand_in in self.stand_ins]


def step_key(groups: Sequence[Group]) -> tuple[object, ...]:
    """What a `StepTable` depends on.

    Each step asks for it, so it is a few passes over each list without Python's loops, and nearly all numbers: tuples
    of strides by the thousand would have the garbage collector run in each step.

    Raises:
        RuntimeError: a tensor has no address; it is sparse.
    """
    params = joined(groups, "params")
    operands = [t for name in ("params", *STATE_LISTS, "max_denoms", "masters") for t in joined(groups, name)]
    contiguous = all(map(Tensor.is_contiguous, operands))
    return (
        params[0].device,
        *((len(group.tensors.params), group.hyper.amsgrad, len(group.tensors.masters)) for group in groups),
        *map(Tensor.data_ptr, operands),
        *map(Tensor.data_ptr, joined(groups, "steps")),
        *map(Tensor.numel, operands),
        *map(dtype_of, params),
        *map(dtype_of, joined(groups, "exp_avgs")),
        *chain.from_iterable(group.keys for group in groups),
        *(() if contiguous else map(Tensor.stride, operands)),
    )


def make_step_table(groups: Sequence[Group], chunk: int, max_tensors: int, max_groups: int) -> StepTable:
    """A table for checked groups, cut in chunks of that many elements and segments that fit a launch."""
    table = StepTable()
    params = joined(groups, "params")
    lists = {name: joined(groups, name) for name in ("params", *STATE_LISTS, "max_denoms", "masters", "steps")}
    group_of = [g for g, group in enumerate(groups) for _ in group.tensors.params]
    keys = [key for group in groups for key in group.keys or [0] * len(group.tensors.params)]
    with_max = [i for i, g in enumerate(group_of) if groups[g].hyper.amsgrad]
    max_index = {i: j for j, i in enumerate(with_max)}
    with_masters = [i for i, g in enumerate(group_of) if groups[g].tensors.masters]
    master_index = {i: j for j, i in enumerate(with_masters)}

    def address(name: str, index: int, strides: Sequence[int]) -> int:
        tensor = lists[name][index]
        if tensor.numel() == 0 or layouts.same_order(tensor, strides):
            return tensor.data_ptr()
        stand_in = layouts.empty_with(strides, tensor)
        table.stand_ins.append((name, index, stand_in))
        return stand_in.data_ptr()

    rows = []
    for i, param in enumerate(params):
        strides = param.stride() if layouts.is_dense(param) else tuple(layouts.dense_strides(param))
        table.shapes.append(param.shape)
        table.strides.append(strides)
        table.contiguous = table.contiguous and param.is_contiguous()
        table.has_double = table.has_double or param.dtype == torch.float64
        rows.append(
            [address(name, i, strides) for name in ("params", *STATE_LISTS)]
            + [address("max_denoms", max_index[i], strides) if i in max_index else 0]
            + [lists["steps"][i].data_ptr(), param.numel(), group_of[i], 0, keys[i]]
            + [address("masters", master_index[i], strides) if i in master_index else 0]
        )

    dtypes = list(zip(map(dtype_of, params), map(dtype_of, lists["exp_avgs"]), strict=True))
    for pair in dict.fromkeys(dtypes):
        of_dtype = [i for i, its in enumerate(dtypes) if its == pair]
        while of_dtype:
            first_group = group_of[of_dtype[0]]
            taken = [i for i in of_dtype[:max_tensors] if group_of[i] < first_group + max_groups]
            of_dtype = of_dtype[len(taken) :]
            counts = [-(-params[i].numel() // chunk) for i in taken]
            first = 0
            for i, count in zip(taken, counts, strict=True):
                rows[i][STEP_COLUMNS.index("group")] -= first_group
                rows[i][STEP_COLUMNS.index("first_chunk")] = first
                first += count
            segment = Segment(taken, [rows[i] for i in taken], counts, params[0].device)
            segment.amsgrad, segment.masters = (
                any(rows[i][STEP_COLUMNS.index(column)] for i in taken) for column in ("max_denom", "master")
            )
            table.segments.append((*pair, segment, range(first_group, group_of[taken[-1]] + 1)))
    if len(table.segments) > 1:
        for *_, segment, _ in table.segments:
            segment.is_part()
    return table


@dataclass
class NormTable:
    """The tables of one norm: for each dtype of gradients as many segments as it takes launches."""

    segments: list[tuple[torch.dtype, Segment]] = field(default_factory=list)
    chunks: int = 0
    stream: int = 0  # on which it was sent to the device
    sent: torch.cuda.Event | None = None  # when it is there

    def memory(self) -> list[Tensor]:
        """What it holds on the device."""
        return [tensor for _, segment in self.segments for tensor in segment.memory]


def make_norm_table(grads: Sequence[Tensor], chunk: int, max_tensors: int) -> NormTable:
    """A table for checked gradients. It holds no addresses, only sizes: gradients of the same sizes can share it."""
    table = NormTable()
    counts = [-(-grad.numel() // chunk) for grad in grads]
    first_sums = []
    for count in counts:
        first_sums.append(table.chunks)
        table.chunks += count
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        of_dtype = [i for i, grad in enumerate(grads) if grad.dtype == dtype and counts[i] > 0]
        for start in range(0, len(of_dtype), max_tensors):
            taken, rows, first = of_dtype[start : start + max_tensors], [], 0
            for i in taken:
                rows.append([grads[i].numel(), first, first_sums[i]])
                first += counts[i]
            segment = Segment(taken, rows, [counts[i] for i in taken], grads[0].device)
            table.segments.append((dtype, segment))
    return table


Table = TypeVar("Table", StepTable, NormTable)


class TableCache(Generic[Table]):
    """Tables by key, the least recently used dropped first.

    Room is counted in bytes, and for a key's numbers on the host too: where state is moved to the host and back between
    steps, each step may bring new addresses, and so a table that will never be found again. There is room for a hundred
    tables of 400 tensors, or for tens of thousands of one, as optimizers have that step inside the backward pass. The
    newest is kept whatever its size, and those that a captured graph reads are too, for they must outlive it.
    """

    def __init__(self, room: int = 1 << 26):
        self._room = room
        self._taken = 0
        self._lock = threading.RLock()  # optimizers may step in autograd's threads
        self._tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()
        self._latest: tuple[tuple[object, ...], Table] | None = None
        self._kept: dict[int, Table] = {}
        self.made = 0  # how many tables, ever

    def find(self, key: tuple[object, ...], make: Callable[[], Table], capturing: bool) -> Table:
        """The table of that key.

        Raises:
            RuntimeError: it is not there and cannot be made, because a CUDA graph is being captured.
        """
        with self._lock:
            return self._find(key, make, capturing)

    def _find(self, key: tuple[object, ...], make: Callable[[], Table], capturing: bool) -> Table:
        if self._latest is not None and self._latest[0] == key:  # nearly always, and without a hash
            table = self._latest[1]
        elif key in self._tables:
            table = self._tables[key]
            self._tables.move_to_end(key)
        else:
            if capturing:
                raise RuntimeError(
                    "maxva: the tensors of this step are new, and their table cannot be sent to the device while a "
                    "CUDA graph is captured; run some steps on a side stream before the capture, as PyTorch's notes "
                    "on CUDA graphs show"
                )
            table = self._tables[key] = make()
            self.made += 1
            self._taken += _size(key, table)
            while self._taken > self._room and len(self._tables) > 1:
                self._taken -= _size(*self._tables.popitem(last=False))
        self._latest = (key, table)
        if capturing:
            self._kept[id(table)] = table
        return table


def _size(key: tuple[object, ...], table: Table) -> int:
    """Bytes: of a number of the key some 64, with what else stays on the host."""
    return 64 * len(key) + sum(tensor.nbytes for tensor in table.memory())
