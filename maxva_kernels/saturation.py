"""What stays between steps so that w need not be read where it is 1 (csrc/saturation.h, Note [Saturated chunks])."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .statistics import chunks_of

_version_of = attrgetter("_version")


class _Part(NamedTuple):
    """Stamps, and the tensors that they are about."""

    stamps: Tensor
    weight_sums: list[weakref.ref[Tensor]]  # weak: state that is replaced or moved must not be kept here
    versions: list[int]

    def is_about(self, weight_sums: Sequence[Tensor], versions: list[int]) -> bool:
        return self.versions == versions and all(
            ref() is tensor for ref, tensor in zip(self.weight_sums, weight_sums, strict=True)
        )


class Saturation:
    """An optimizer's stamps: for each step's calls of the kernels in their order, one for each chunk.

    Kernels write behind autograd's back, so a counter of versions that has moved says that something else wrote. Not
    for compiled graphs, where there is no looking at counters.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._next = 0

    def begin_step(self) -> None:
        """What is asked for next belongs to the first call of a step."""
        self._next = 0

    def stamps(self, weight_sums: Sequence[Tensor]) -> Tensor | None:
        """The stamps for the chunks of these tensors, int32: as the last step left them, or zeros.

        None for tensors of inference mode, which have no version.
        """
        try:
            versions = list(map(_version_of, weight_sums))
        except RuntimeError:
            return None
        index, self._next = self._next, self._next + 1
        if index == len(self._parts) or not self._parts[index].is_about(weight_sums, versions):
            chunks = sum(chunks_of(tensor.numel()) for tensor in weight_sums)
            stamps = torch.zeros(chunks, dtype=torch.int32, device=weight_sums[0].device)
            self._parts[index : index + 1] = [_Part(stamps, list(map(weakref.ref, weight_sums)), versions)]
        return self._parts[index].stamps
