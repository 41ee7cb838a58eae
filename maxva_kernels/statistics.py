"""What a step tells of itself: records that the kernels write as they step, read when somebody asks.

A tensor is cut in chunks of `CHUNK` elements in their order in memory, and a sample of these is looked at: the first of
each tensor and one in sixteen of the others, always the same (csrc/statistics.h says why). Means are over all
coordinates, each tensor's estimated from its sample; of a tensor of up to `CHUNK` elements they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import Group

CHUNK = 8192

# The columns of a record, as csrc/statistics.h (StatisticsSums) has them: how many coordinates of the chunk were
# stepped, and sums over them.
FIELDS = ("count", "adaptive", "one_minus_beta", "at_upper", "at_lower", "grad_square")


def is_sampled(chunk: int) -> bool:
    """Whether the chunk of that number of a tensor is one of those that are looked at."""
    return chunk * 0x9E3779B9 % 2**32 < 2**28


def chunks_of(numel: int) -> int:
    """In how many chunks a tensor is cut."""
    return -(-numel // CHUNK)


class Statistics(NamedTuple):
    """What a step did to the coordinates of a parameter group, or of all; NaN where it stepped none.

    Under FSDP2 and tensor parallelism it is about the coordinates that this rank holds, but for an exact
    ``grad_norm``.
    """

    mean_update: float
    """Mean |change of a parameter by the step|, without weight decay: the step size of the paper's Figures 4 and 5."""
    mean_beta: float
    """Mean beta (Eq. 6 and 7, within its bounds)."""
    share_at_upper: float
    """Share of coordinates whose beta is the upper bound of ``beta2_range``, in [0, 1]."""
    share_at_lower: float
    """Share of coordinates whose beta is the lower bound."""
    grad_norm: float
    """L2 norm of the unscaled gradient before it was clipped: exact in `StepStatistics.overall` where the step takes it
    (``max_grad_norm``, which may be inf, or ``skip_nonfinite``), else estimated from the sample, for gradients from
    1e-19 to 1e19, whose squares float32 can hold."""
    coordinates: int
    """How many coordinates were stepped."""


@dataclass(frozen=True)
class StepStatistics:
    """What `MAdam.statistics` returns."""

    overall: Statistics
    groups: list[Statistics]
    """One for each of the optimizer's parameter groups."""
    clip_factor: float
    """What ``max_grad_norm`` multiplied the gradients by: 1 where it did not bite."""


class Recorder:
    """Keeps the records of one step. A backend asks for a table to write to; `read` makes statistics of them."""

    def __init__(self) -> None:
        self._tables: list[tuple[Tensor, list[tuple[int, int]]]] = []
        self._norm: Tensor | None = None
        self._max_grad_norm: float | None = None

    def table(self, tensors: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """Memory for the records of some tensors, zeros where none is written: float32, of shape [chunks, fields].

        Args:
            tensors: of each, in their order in the table, the index of its parameter group and its number of elements.
        """
        chunks = sum(chunks_of(numel) for _, numel in tensors)
        records = torch.zeros(chunks, len(FIELDS), dtype=torch.float32, device=device)
        self._tables.append((records, list(tensors)))
        return records

    def clip(self, grad_norm: Tensor | None, grad_scale: Tensor | None, max_grad_norm: float | None) -> None:
        """Notes the norm of the gradients as they stand, and by what it clips them."""
        if grad_norm is not None:
            # Divided now, for scalers change their scale in place.
            self._norm = grad_norm if grad_scale is None else grad_norm / grad_scale.to(grad_norm.device)
        self._max_grad_norm = max_grad_norm

    def read(self, groups: int) -> StepStatistics:
        """The statistics of that many groups. Waits for the devices."""
        norm = None if self._norm is None else float(self._norm)
        clip_factor = 1.0
        if norm is not None and self._max_grad_norm is not None and not self._max_grad_norm >= norm:
            clip_factor = self._max_grad_norm / norm
        sums = torch.zeros(groups, len(FIELDS), dtype=torch.float64, device="cpu")
        for records, tensors in self._tables:
            per_chunk = records.detach().to("cpu", torch.float64)
            at = 0
            for group, numel in tensors:
                its = per_chunk[at : at + chunks_of(numel)].sum(0)
                at += chunks_of(numel)
                if its[0] > 0:
                    sums[group] += its * (numel / its[0])
        overall = _statistics(sums.sum(0), clip_factor)
        if norm is not None:
            overall = overall._replace(grad_norm=norm)
        return StepStatistics(overall, [_statistics(its, clip_factor) for its in sums], clip_factor)


def _statistics(sums: Tensor, clip_factor: float) -> Statistics:
    count, adaptive, one_minus_beta, at_upper, at_lower, grad_square = sums.tolist()
    if count == 0:
        return Statistics(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    norm = math.sqrt(grad_square) / clip_factor if clip_factor > 0 else math.nan
    return Statistics(
        adaptive / count, 1 - one_minus_beta / count, at_upper / count, at_lower / count, norm, round(count)
    )


def tensors_of(groups: Sequence[Group]) -> list[tuple[int, int]]:
    """The parameters of some groups as `Recorder.table` takes them."""
    return [(group.number, param.numel()) for group in groups for param in group.tensors.params]
