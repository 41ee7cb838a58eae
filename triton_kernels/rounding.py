"""Stochastic rounding to 16 bits: csrc/rounding.h operation for operation; the notes are there."""

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def rounding_key(tensor_key, step):
    """What the elements of a tensor share in a step: two numbers of 32 bits."""
    key = _mix((tensor_key + step).to(tl.uint64))
    high = (key >> 32).to(tl.uint32)
    return key.to(tl.uint32), high ^ (high >> 15)


@triton.jit
def random_bits(low, high, element):
    """For m, u, s, w and the parameter of elements at places given as uint32: 16 random bits each, as uint32."""
    x = element + low
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ high) * 0x846CA68B
    x = x ^ (x >> 16)
    y = x * 0x9E3779B1
    return x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16, (x * 0x85EBCA77) >> 16


@triton.jit
def round_stochastically(x, random):
    """float32 to bfloat16. Infinity stays, and a NaN."""
    rounded = (x.to(tl.uint32, bitcast=True) + random) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
