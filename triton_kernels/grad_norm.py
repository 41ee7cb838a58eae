"""The gradient's global norm by the rule of csrc/norm.h, in two stages and one fixed order of additions, no atomics."""

import triton
import triton.language as tl

from .maxva import add_square, root_of_sum

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
    lane = tl.arange(0, LANES)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor = tl.load(chunk_rows + chunk)
        row = rows + tensor * COLUMNS
        index = chunk - tl.load(row + 1)
        count = tl.minimum(tl.load(row) - index * CHUNK, CHUNK).to(tl.int32)
        address = tl.load(grads + tensor) + index * (CHUNK * GRAD.primitive_bitwidth // 8)

        # 1. The lanes, each in the order of its elements.
        large = tl.zeros((LANES,), T)
        medium = tl.zeros((LANES,), T)
        small = tl.zeros((LANES,), T)
        if ((address & 15) == 0) & (count == CHUNK):
            aligned = tl.multiple_of(address.to(tl.pointer_type(GRAD)), 16)
            for first in tl.static_range(0, CHUNK, LANES):
                values = tl.load(aligned + first + lane).to(T)
                large, medium, small = add_square(values, large, medium, small)
        else:
            pointer = address.to(tl.pointer_type(GRAD))
            for first in range(0, count, LANES):
                values = tl.load(pointer + first + lane, mask=first + lane < count, other=0.0).to(T)
                large, medium, small = add_square(values, large, medium, small)

        # 2. The lanes together.
        at = (sums.to(tl.int64) + (tl.load(row + 2) + index) * (3 * T.primitive_bitwidth // 8)).to(tl.pointer_type(T))
        tl.store(at, add_up(large))
        tl.store(at + 1, add_up(medium))
        tl.store(at + 2, add_up(small))


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
