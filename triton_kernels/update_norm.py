"""The norms of parameters and of their updates, for trust ratios: a step that writes nothing, in two stages. Sums are
added by the rule of csrc/norm.h over chunks of a step, which are csrc/cuda/update_norm.cuh's."""

import triton
import triton.language as tl

from .coefficients import COLUMNS, read_coefficients, read_overflow, read_scaling
from .grad_norm import LANES, add_up
from .master import join_master
from .maxva import add_square_assuming, are_medium, root_of_sum, update
from .stored import load, load_if

# Numbers that stand for the squares of a chunk: three for the parameter, three for the update.
SQUARES = tl.constexpr(6)

_ARGUMENTS = [
    "rows", "chunk_rows", "chunks", "grads", "integers", "values", "grad_scale", "found_inf", "grad_norm",
    "max_grad_norm", "squares", "norms", "tensors",
]  # fmt: skip


@triton.jit
def _sums(
    operands,  # addresses where the chunk begins: parameter, gradient, the four moments, AMSGrad's maximum, master
    count,  # of the chunk's elements
    coefficients, modes,
    has_master,
    LAPROP: tl.constexpr, T: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    AMSGRAD: tl.constexpr, MASTERS: tl.constexpr,
    WHOLE: tl.constexpr,  # all elements are there and every operand is aligned: no masks, so that accesses are wide
    MEDIUM: tl.constexpr,  # all elements are hoped to be medium: only these sums are made, and what tells
):  # fmt: skip
    """The lanes' large, medium and small sums, of the parameter and of the update, each in the order of its elements,
    and the least of `twice_the_bits` of both."""
    params, grads, exp_avgs, grad_means, grad_vars, weight_sums, max_denoms, rests = operands
    amsgrad = modes[2]
    lane = tl.arange(0, LANES)
    large = tl.zeros((LANES,), T)
    medium = tl.zeros((LANES,), T)
    small = tl.zeros((LANES,), T)
    update_large = tl.zeros((LANES,), T)
    update_medium = tl.zeros((LANES,), T)
    update_small = tl.zeros((LANES,), T)
    least = tl.full((LANES,), 0xFFFFFFFF, tl.uint32)
    for first in range(0, count, LANES):
        at = first + lane
        stored = load(params, at, 0, count, PARAM, PARAM, WHOLE)
        if MASTERS:
            rest = load_if(has_master, 0, rests, at, 0, count, tl.int16, tl.int16, WHOLE)
        g = load(grads, at, 0, count, GRAD, T, WHOLE)
        m = load(exp_avgs, at, 0, count, STATE, T, WHOLE)
        u = load(grad_means, at, 0, count, STATE, T, WHOLE)
        s = load(grad_vars, at, 0, count, STATE, T, WHOLE)
        w = load(weight_sums, at, 0, count, STATE, T, WHOLE)
        x = u  # stands for what nobody asks for
        if AMSGRAD:
            x = load_if(amsgrad, 0.0, max_denoms, at, 0, count, STATE, T, WHOLE)
        # Of a rest of 0 the parameter is the master.
        p = join_master(stored, rest) if MASTERS else stored.to(T)
        large, medium, small, least = add_square_assuming(p, large, medium, small, least, MEDIUM)
        _, _, _, _, _, change, _, _, _ = update(p, g, m, u, s, w, x, coefficients, modes, LAPROP, AMSGRAD, False)
        change = tl.where(at < count, change, 0.0)
        update_large, update_medium, update_small, least = add_square_assuming(
            change, update_large, update_medium, update_small, least, MEDIUM
        )
    return (large, medium, small), (update_large, update_medium, update_small), least


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
    AMSGRAD: tl.constexpr,
    MASTERS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    int64: tl.constexpr = tl.pointer_type(tl.int64)
    rows = rows.to(tl.int64).to(int64)
    chunk_rows = chunk_rows.to(tl.int64).to(tl.pointer_type(tl.int32))
    grads = grads.to(tl.int64).to(int64)
    param_bytes: tl.constexpr = PARAM.primitive_bitwidth // 8
    grad_bytes: tl.constexpr = GRAD.primitive_bitwidth // 8
    state_bytes: tl.constexpr = STATE.primitive_bitwidth // 8
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
                param, exp_avg, grad_mean = tl.load(row), tl.load(row + 1), tl.load(row + 2)
                grad_var, weight_sum = tl.load(row + 3), tl.load(row + 4)
                max_denom, master = tl.load(row + 5), tl.load(row + 11)
                modes = (decay_mode, adam_eps, max_denom != 0)
                start = (chunk - tl.load(row + 9)) * CHUNK
                count = tl.minimum(tl.load(row + 7) - start, CHUNK).to(tl.int32)
                operands = (
                    param + start * param_bytes,
                    grad_address + start * grad_bytes,
                    exp_avg + start * state_bytes,
                    grad_mean + start * state_bytes,
                    grad_var + start * state_bytes,
                    weight_sum + start * state_bytes,
                    max_denom + start * state_bytes,
                    master + start * 2,
                )
                misplaced = param | grad_address | exp_avg | grad_mean | grad_var | weight_sum | max_denom | master
                whole = ((misplaced & 15) == 0) & (count == CHUNK)

                # 2. The lanes. Nearly always all elements are medium, and less is enough.
                hopes: tl.constexpr = tl.float32 == T
                if whole:
                    of_param, of_update, least = _sums(
                        *(operands, count, coefficients, modes, master != 0),
                        *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, True, hopes),
                    )
                else:
                    of_param, of_update, least = _sums(
                        *(operands, count, coefficients, modes, master != 0),
                        *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, False, hopes),
                    )
                if hopes:  # known when this is compiled, the other is not  # noqa: SIM102
                    if not are_medium(of_param[1] + of_update[1], least):
                        # One after the other, for want of registers for six sums.
                        of_param, _, _ = _sums(
                            *(operands, count, coefficients, modes, master != 0),
                            *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, False, False),
                        )
                        _, of_update, _ = _sums(
                            *(operands, count, coefficients, modes, master != 0),
                            *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, False, False),
                        )

                # 3. The lanes together.
                to = squares.to(tl.int64).to(tl.pointer_type(T)) + tl.cast(chunk, tl.int64) * SQUARES
                for k in tl.static_range(3):
                    tl.store(to + k, add_up(of_param[k]))
                    tl.store(to + 3 + k, add_up(of_update[k]))


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
