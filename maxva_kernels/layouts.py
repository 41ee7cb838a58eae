"""The order of a tensor's elements in memory, in which a parameter, its gradient and its state must agree.

csrc/operands.cpp has the same rules for backends with compiled bindings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _memory_order(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, dimension) of the dimensions that have more than one entry, the smallest stride first."""
    sizes, strides = tensor.shape, tensor.stride()
    return sorted(((strides[i], i) for i in reversed(range(len(sizes))) if sizes[i] > 1), key=lambda pair: pair[0])


def same_order(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether the tensor's elements lie as those of a tensor of its shape with ``strides``."""
    return all(size <= 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))


def is_dense(tensor: Tensor) -> bool:
    """No gaps and no overlaps: the elements are exactly `numel` places in memory."""
    return tensor.is_contiguous() or tensor.numel() == 0 or same_order(tensor, dense_strides(tensor))


def dense_strides(tensor: Tensor) -> list[int]:
    """Strides without gaps in the same order of dimensions."""
    strides, stride = [1] * tensor.dim(), 1
    for _, i in _memory_order(tensor):
        strides[i] = stride
        stride *= tensor.shape[i]
    return strides


def may_overlap(tensor: Tensor) -> bool:
    """False only where it is certain that no two elements share memory: each stride exceeds what those below span."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    span = 0
    for stride, i in _memory_order(tensor):
        if stride <= span:
            return True
        span += (tensor.shape[i] - 1) * stride
    return False


def empty_with(strides: Sequence[int], tensor: Tensor) -> Tensor:
    """Uninitialised memory for the tensor's elements in another order."""
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


def dense(tensor: Tensor) -> Tensor:
    """The tensor's elements in some dense order: itself, or a copy where it has gaps."""
    return tensor if is_dense(tensor) else empty_with(dense_strides(tensor), tensor).copy_(tensor)
