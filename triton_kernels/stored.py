"""Loads and stores of a block's elements, at places `at` behind an address."""

import triton
import triton.language as tl


@triton.jit
def _pointer(address, STORED: tl.constexpr, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(STORED))
    if WHOLE:  # the hint belongs to the operation that makes the pointer, which must therefore be made here
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(address, at, begin, end, STORED: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr):
    pointer = _pointer(address, STORED, WHOLE)
    if WHOLE:
        return tl.load(pointer + at).to(T)
    else:
        return tl.load(pointer + at, mask=(at >= begin) & (at < end), other=0).to(T)


@triton.jit
def load_if(
    wanted, otherwise: tl.constexpr,
    address, at, begin, end, STORED: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`load`, or a constant. By a mask: a branch would stand between the other loads, or behind the first use of what
    they have loaded, so that a second wait for memory followed the first."""
    pointer = _pointer(address, STORED, WHOLE)
    there = (at >= 0) if WHOLE else (at >= begin) & (at < end)
    return tl.load(pointer + at, mask=there & wanted, other=otherwise).to(T)


@triton.jit
def store(address, at, value, begin, end, STORED: tl.constexpr, WHOLE: tl.constexpr):
    pointer = _pointer(address, STORED, WHOLE)
    if WHOLE:
        tl.store(pointer + at, value.to(STORED))
    else:
        tl.store(pointer + at, value.to(STORED), mask=(at >= begin) & (at < end))
