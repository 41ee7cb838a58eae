"""The gradient's global norm by the rule of csrc/norm.h, in two stages and one fixed order of additions, no atomics."""

import triton
import triton.language as tl

from .maxva import add_square_assuming, are_medium, root_of_sum

LANES = tl.constexpr(1024)
# Columns of the table (maxva_kernels/tensor_table.py, NORM_COLUMNS).
COLUMNS = tl.constexpr(3)


@triton.jit
def add_up(lanes):
    """Adds lanes pairwise: lane j += lane j + stride, stride = 512 ... 1. A sum of two terms has no order."""
    lanes = tl.sum(tl.reshape(lanes, (2, 512)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 256)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 128)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 64)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 32)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 16)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 8)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 4)), axis=0)
    lanes = tl.sum(tl.reshape(lanes, (2, 2)), axis=0)
    return tl.sum(lanes, axis=0)


@triton.jit
def _sums(
    address,  # of the chunk's first element
    count,  # of its elements
    T: tl.constexpr, GRAD: tl.constexpr, CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,  # it is whole and aligned: no masks, so that accesses are wide
    MEDIUM: tl.constexpr,  # all elements are hoped to be medium: only that sum is made, and what tells
):  # fmt: skip
    """The lanes' large, medium and small sums, each in the order of its elements, and the least of `twice_the_bits`."""
    pointer = address.to(tl.pointer_type(GRAD))
    lane = tl.arange(0, LANES)
    large = tl.zeros((LANES,), T)
    medium = tl.zeros((LANES,), T)
    small = tl.zeros((LANES,), T)
    least = tl.full((LANES,), 0xFFFFFFFF, tl.uint32)
    if WHOLE:
        for first in tl.static_range(0, CHUNK, LANES):
            values = tl.load(tl.multiple_of(pointer, 16) + first + lane).to(T)
            large, medium, small, least = add_square_assuming(values, large, medium, small, least, MEDIUM)
    else:
        for first in range(0, count, LANES):
            values = tl.load(pointer + first + lane, mask=first + lane < count, other=0.0).to(T)
            large, medium, small, least = add_square_assuming(values, large, medium, small, least, MEDIUM)
    return large, medium, small, least


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "grads", "sums"])
def norm_chunks_kernel(
    rows: tl.int64,  # address of the table: for each tensor COLUMNS int64
    chunk_rows: tl.int64,  # address: for each chunk of this launch its row, int32
    chunks: tl.int64,  # how many
    grads: tl.int64,  # address: for each tensor its gradient's address, int64
    sums: tl.int64,  # address: for each chunk of all launches three sums of type T
    T: tl.constexpr,  # the arithmetic's type
    GRAD: tl.constexpr,  # the gradients' type
    CHUNK: tl.constexpr,  # elements of a chunk
):
    # By way of int64: Triton's interpreter takes an address that fits for an int32, whatever the annotation says.
    rows = rows.to(tl.int64).to(tl.pointer_type(tl.int64))
    chunk_rows = chunk_rows.to(tl.int64).to(tl.pointer_type(tl.int32))
    grads = grads.to(tl.int64).to(tl.pointer_type(tl.int64))
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor = tl.load(chunk_rows + chunk)
        row = rows + tensor * COLUMNS
        index = chunk - tl.load(row + 1)
        count = tl.minimum(tl.load(row) - index * CHUNK, CHUNK).to(tl.int32)
        address = tl.load(grads + tensor) + index * (CHUNK * GRAD.primitive_bitwidth // 8)

        # 1. The lanes, and these together. Nearly always all elements are medium, and less is enough.
        whole = ((address & 15) == 0) & (count == CHUNK)
        hopes: tl.constexpr = tl.float32 == T
        if whole:
            large, medium, small, least = _sums(address, count, T, GRAD, CHUNK, True, hopes)
        else:
            large, medium, small, least = _sums(address, count, T, GRAD, CHUNK, False, hopes)
        of_large = tl.zeros((), T)
        of_small = tl.zeros((), T)
        if hopes & are_medium(medium, least):
            of_medium = add_up(medium)
        else:
            if hopes:
                if whole:
                    large, medium, small, least = _sums(address, count, T, GRAD, CHUNK, True, False)
                else:
                    large, medium, small, least = _sums(address, count, T, GRAD, CHUNK, False, False)
            of_large = add_up(large)
            of_medium = add_up(medium)
            of_small = add_up(small)

        # 2. The sums of the chunk.
        at = (sums.to(tl.int64) + (tl.load(row + 2) + index) * (3 * T.primitive_bitwidth // 8)).to(tl.pointer_type(T))
        tl.store(at, of_large)
        tl.store(at + 1, of_medium)
        tl.store(at + 2, of_small)


@triton.jit(do_not_specialize=["sums", "chunks", "norm"])
def norm_total_kernel(
    sums: tl.int64,  # address: for each chunk three sums of type T
    chunks: tl.int64,  # how many
    norm: tl.int64,  # address of the result, of type T
    T: tl.constexpr,
):
    sums = sums.to(tl.int64).to(tl.pointer_type(T))
    lane = tl.arange(0, LANES)
    large = tl.zeros((LANES,), T)
    medium = tl.zeros((LANES,), T)
    small = tl.zeros((LANES,), T)
    for first in range(0, chunks, LANES):
        chunk = first + lane
        at = sums + chunk.to(tl.int64) * 3
        large += tl.load(at, mask=chunk < chunks, other=0.0)
        medium += tl.load(at + 1, mask=chunk < chunks, other=0.0)
        small += tl.load(at + 2, mask=chunk < chunks, other=0.0)
    tl.store(norm.to(tl.int64).to(tl.pointer_type(T)), root_of_sum(add_up(large), add_up(medium), add_up(small)))
