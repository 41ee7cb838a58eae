"""The norms of parameters and of their updates, for trust ratios: a step that writes nothing, in two stages. Sums are
added by the rule of csrc/norm.h over chunks of a step, which are csrc/cuda/update_norm.cuh's."""

import triton
import triton.language as tl

from .coefficients import COLUMNS, read_coefficients, read_overflow, read_scaling
from .grad_norm import LANES, add_up
from .master import join_master
from .maxva import add_square, root_of_sum, update

# Numbers that stand for the squares of a chunk: three for the parameter, three for the update.
SQUARES = tl.constexpr(6)

_ARGUMENTS = [
    "rows", "chunk_rows", "chunks", "grads", "integers", "values", "grad_scale", "found_inf", "grad_norm",
    "max_grad_norm", "squares", "norms", "tensors",
]  # fmt: skip


@triton.jit
def _value(address, at, there, STORED: tl.constexpr, T: tl.constexpr):
    return tl.load(address.to(tl.pointer_type(STORED)) + at, mask=there, other=0.0).to(T)


@triton.jit(do_not_specialize=_ARGUMENTS)
def update_chunks_kernel(
    rows: tl.int64,  # as `step_kernel` has them
    chunk_rows: tl.int64,
    chunks: tl.int64,
    grads: tl.int64,
    integers: tl.int64,
    values: tl.int64,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    grad_norm: tl.int64,
    max_grad_norm: tl.int64,
    squares: tl.int64,  # address: for each chunk SQUARES numbers of type T
    LAPROP: tl.constexpr,
    T: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    int64: tl.constexpr = tl.pointer_type(tl.int64)
    rows = rows.to(tl.int64).to(int64)
    chunk_rows = chunk_rows.to(tl.int64).to(tl.pointer_type(tl.int32))
    grads = grads.to(tl.int64).to(int64)
    lane = tl.arange(0, LANES)
    if not read_overflow(found_inf.to(tl.int64), T):
        scale, norm, max_norm = read_scaling(grad_scale.to(tl.int64), grad_norm.to(tl.int64), max_grad_norm, T)
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            tensor = tl.load(chunk_rows + chunk)
            grad_address = tl.load(grads + tensor)
            if grad_address != 0:
                # 1. What the chunk's elements share.
                row = rows + tensor * COLUMNS
                step = tl.load(tl.load(row + 6).to(int64)) + 1
                coefficients, decay_mode, adam_eps, _rounds_params = read_coefficients(
                    integers, values, tl.load(row + 8), step, scale, norm, max_norm, 1.0, True, T
                )
                max_denoms, master = tl.load(row + 5), tl.load(row + 11)
                amsgrad = max_denoms != 0
                start = (chunk - tl.load(row + 9)) * CHUNK
                count = tl.minimum(tl.load(row + 7) - start, CHUNK).to(tl.int32)

                # 2. The lanes, each in the order of its elements.
                large = tl.zeros((LANES,), T)
                medium = tl.zeros((LANES,), T)
                small = tl.zeros((LANES,), T)
                update_large = tl.zeros((LANES,), T)
                update_medium = tl.zeros((LANES,), T)
                update_small = tl.zeros((LANES,), T)
                for first in range(0, count, LANES):
                    there = first + lane < count
                    at = start + first + lane
                    p = _value(tl.load(row), at, there, PARAM, T)
                    if PARAM.is_bf16():  # known when this is compiled, the other is not  # noqa: SIM102
                        if master != 0:
                            rest = _value(master, at, there, tl.int16, tl.int16)
                            p = join_master(p.to(tl.bfloat16), rest)
                    g = _value(grad_address, at, there, GRAD, T)
                    m = _value(tl.load(row + 1), at, there, STATE, T)
                    u = _value(tl.load(row + 2), at, there, STATE, T)
                    s = _value(tl.load(row + 3), at, there, STATE, T)
                    w = _value(tl.load(row + 4), at, there, STATE, T)
                    if amsgrad:
                        x = _value(max_denoms, at, there, STATE, T)
                    else:
                        x = p
                    _, _, _, _, _, change, _, _, _ = update(
                        p, g, m, u, s, w, x, coefficients, (decay_mode, adam_eps, amsgrad), LAPROP, True, False
                    )
                    change = tl.where(there, change, 0.0)
                    large, medium, small = add_square(p, large, medium, small)
                    update_large, update_medium, update_small = add_square(
                        change, update_large, update_medium, update_small
                    )

                # 3. The lanes together.
                to = squares.to(tl.int64).to(tl.pointer_type(T)) + tl.cast(chunk, tl.int64) * SQUARES
                tl.store(to, add_up(large))
                tl.store(to + 1, add_up(medium))
                tl.store(to + 2, add_up(small))
                tl.store(to + 3, add_up(update_large))
                tl.store(to + 4, add_up(update_medium))
                tl.store(to + 5, add_up(update_small))


@triton.jit(do_not_specialize=_ARGUMENTS)
def update_total_kernel(
    rows: tl.int64,  # as above
    grads: tl.int64,
    tensors: tl.int64,  # how many
    found_inf: tl.int64,
    squares: tl.int64,
    norms: tl.int64,  # address: for each tensor its norm and its update's, of type T
    T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    rows = rows.to(tl.int64).to(tl.pointer_type(tl.int64))
    grads = grads.to(tl.int64).to(tl.pointer_type(tl.int64))
    squares = squares.to(tl.int64).to(tl.pointer_type(T))
    norms = norms.to(tl.int64).to(tl.pointer_type(T))
    lane = tl.arange(0, LANES)
    if not read_overflow(found_inf.to(tl.int64), T):
        # The programs share out the tensors.
        for tensor in range(tl.program_id(0), tensors, tl.num_programs(0)):
            if tl.load(grads + tensor) != 0:
                row = rows + tensor * COLUMNS
                chunks = (tl.load(row + 7) + CHUNK - 1) // CHUNK
                first_square = squares + tl.load(row + 9) * SQUARES
                for of in tl.static_range(2):
                    large = tl.zeros((LANES,), T)
                    medium = tl.zeros((LANES,), T)
                    small = tl.zeros((LANES,), T)
                    for first in range(0, chunks, LANES):
                        chunk = first + lane
                        at = first_square + tl.cast(chunk, tl.int64) * SQUARES + 3 * of
                        large += tl.load(at, mask=chunk < chunks, other=0.0)
                        medium += tl.load(at + 1, mask=chunk < chunks, other=0.0)
                        small += tl.load(at + 2, mask=chunk < chunks, other=0.0)
                    norm = root_of_sum(add_up(large), add_up(medium), add_up(small))
                    tl.store(norms + tl.cast(tensor, tl.int64) * 2 + of, norm)
