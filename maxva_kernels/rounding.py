"""Stochastic rounding to bfloat16: the random numbers of csrc/rounding.h, where a note says why.

They are a function of the tensor's key, the step and the element's place in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**64 - 1


def mix(x: int) -> int:
    """A bijection of 64-bit integers that leaves no bit where it was."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def tensor_key(seed: int, number: int) -> int:
    """The key of an optimizer's parameter of that number, a signed integer of 64 bits.

    Steps count on from a key, so keys must be far apart: multiples of these odd numbers are.
    """
    return ((seed * 0xD1342543DE82EF95 + number * 0x9E3779B97F4A7C15 + 2**63) & _MASK) - 2**63


def random_bits(key: int, step: int, elements: Tensor) -> tuple[Tensor, ...]:
    """For momentum, mean, variance, weight sum and parameter 16 random bits each, int64 in the shape of ``elements``.

    Args:
        key: of the tensor.
        step: the count of steps with this one.
        elements: their places in the tensor's memory, int64.
    """
    shared = mix((key + step) & _MASK)
    low, high = shared & 0xFFFFFFFF, shared >> 32
    x = (elements + low) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ high
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    y = (x * 0x9E3779B1) & 0xFFFFFFFF
    return x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16, ((x * 0x85EBCA77) & 0xFFFFFFFF) >> 16


def round_stochastically(values: Tensor, random: Tensor) -> Tensor:
    """float32 values to bfloat16, up with the probability of what is cut off; infinity and NaN stay."""
    rounded = ((values.view(torch.int32).to(torch.int64) + random) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isnan(), torch.nan, rounded)
