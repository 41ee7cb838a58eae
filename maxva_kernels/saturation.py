"""What stays between steps so that w need not be read where it is 1 (csrc/saturation.h, Note [Saturated chunks])."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .statistics import chunks_of

_version_of = attrgetter("_version")


def _versions(tensors: Sequence[Tensor]) -> list[int] | None:
    """None for tensors of inference mode, which have none."""
    try:
        return list(map(_version_of, tensors))
    except RuntimeError:
        return None


class _Part:
    """Stamps, and the tensors that they are about.

    These are known by their ids as long as all of them live. They are not kept alive: state may be replaced or moved.
    """

    def __init__(self, weight_sums: Sequence[Tensor], marks: tuple[object, ...]):
        chunks = sum(chunks_of(tensor.numel()) for tensor in weight_sums)
        self.stamps = torch.zeros(chunks, dtype=torch.int32, device=weight_sums[0].device)
        self._marks = marks
        self._dead: list[object] = []
        self._living = [weakref.ref(tensor, self._dead.append) for tensor in weight_sums]

    def has(self, marks: tuple[object, ...]) -> bool:
        return not self._dead and self._marks == marks


class Saturation:
    """An optimizer's stamps: for each step's calls of the kernels in their order, one for each chunk.

    Kernels write behind autograd's back, so a counter of versions that has moved says that something else wrote. Who
    writes and moves none must say so (the optimizers' docstring has how). Not for compiled graphs, where there is no
    looking at counters.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._next = 0
        self._whole_versions: list[int] | None = []

    def begin_step(self, wholes: Sequence[Tensor] = ()) -> None:
        """What is asked for next belongs to the first call of a step.

        ``wholes`` are the DTensors whose parts it will be about: a write to one counts with it and not with the part.
        """
        self._next = 0
        versions = _versions(wholes)
        if versions is None or versions != self._whole_versions:
            self._parts, self._whole_versions = [], versions

    def stamps(self, weight_sums: Sequence[Tensor]) -> Tensor | None:
        """The stamps for the chunks of these tensors, int32: as the last step left them, or zeros.

        None for tensors of inference mode.
        """
        versions = _versions(weight_sums)
        if versions is None:
            return None
        # Size and device, which assignment to `.data` changes, for the sake of the stamps' own memory.
        marks = (weight_sums[0].device, versions, list(map(id, weight_sums)), list(map(Tensor.numel, weight_sums)))
        index, self._next = self._next, self._next + 1
        if index == len(self._parts) or not self._parts[index].has(marks):
            self._parts[index : index + 1] = [_Part(weight_sums, marks)]
        return self._parts[index].stamps
