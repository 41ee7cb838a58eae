"""One step over the tensors of a table: the walk, the loads and the stores around the formula of maxva.py."""

import triton
import triton.language as tl

from .coefficients import COLUMNS, read_coefficients, read_overflow, read_scaling
from .master import join_master, split_master
from .maxva import update
from .rounding import random_bits, round_stochastically, rounding_key
from .stored import load, load_if, store

# Numbers of a chunk's statistics (maxva_kernels/statistics.py, FIELDS).
RECORD = tl.constexpr(6)
# In one of so many steps a chunk without stamp is searched for w that are not 1 (csrc/saturation.h, kSearches).
SEARCHES = tl.constexpr(16)


@triton.jit
def _step_block(
    operands,  # addresses where the chunk begins: parameter, gradient, the four moments, AMSGrad's maximum, master
    first, begin, end,  # the block's first element in the chunk, and which of the chunk are there
    coefficients, modes,  # as `update` takes them
    rounding,  # the key as `random_bits` takes it, for places counted from where the chunk begins; and of a bfloat16
    # parameter, whether it has a master and whether it is rounded stochastically
    saturated,  # whether all w of the chunk are known to be 1, and left alone
    LAPROP: tl.constexpr, T: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    AMSGRAD: tl.constexpr, MASTERS: tl.constexpr, BLOCK: tl.constexpr,
    TELLS: tl.constexpr,  # whether the kernel takes statistics, of this chunk or of others
    WHOLE: tl.constexpr,  # all elements are there and every operand is aligned: no masks, so that accesses are wide
):  # fmt: skip
    """Returns sums for the fields of a record but the count; who does not use them does not pay for them."""
    params, grads, exp_avgs, grad_means, grad_vars, weight_sums, max_denoms, rests = operands
    amsgrad = modes[2]
    low, high, has_master, rounds_param = rounding
    # Conditional loads are asked for with the others, as long as there are registers to hold what they bring.
    w_at_once: tl.constexpr = not (AMSGRAD and TELLS)
    max_at_once: tl.constexpr = AMSGRAD and STATE == T and not TELLS
    rest_at_once: tl.constexpr = MASTERS and not (AMSGRAD or TELLS)

    # 1. Load.
    at = first + tl.arange(0, BLOCK)
    if rest_at_once:
        rest = load_if(has_master, 0, rests, at, begin, end, tl.int16, tl.int16, WHOLE)
    p = load(params, at, begin, end, PARAM, T, WHOLE)
    g = load(grads, at, begin, end, GRAD, T, WHOLE)
    m = load(exp_avgs, at, begin, end, STATE, T, WHOLE)
    u = load(grad_means, at, begin, end, STATE, T, WHOLE)
    s = load(grad_vars, at, begin, end, STATE, T, WHOLE)
    if w_at_once:
        w = load_if(not saturated, 1.0, weight_sums, at, begin, end, STATE, T, WHOLE)
    if MASTERS:  # known when this is compiled, the other is not  # noqa: SIM102
        if has_master:
            if not rest_at_once:
                rest = load(rests, at, begin, end, tl.int16, tl.int16, WHOLE)
            p = join_master(p.to(tl.bfloat16), rest)
    x = s if TELLS else u  # stands for what nobody asks for; these two take the fewest registers
    if max_at_once:
        x = load_if(amsgrad, 0.0, max_denoms, at, begin, end, STATE, T, WHOLE)
    elif AMSGRAD:  # as above  # noqa: SIM102
        if amsgrad:
            x = load(max_denoms, at, begin, end, STATE, T, WHOLE)
    if not w_at_once:
        w = tl.full((BLOCK,), 1.0, T)
        if not saturated:
            w = load(weight_sums, at, begin, end, STATE, T, WHOLE)

    # 2. Update. A kernel that may tell has no registers for the shorter formula.
    if saturated & (not TELLS):
        m, u, s, w, x, change, adaptive, gradient, b = update(
            p, g, m, u, s, w, x, coefficients, modes, LAPROP, AMSGRAD, True
        )
    else:
        m, u, s, w, x, change, adaptive, gradient, b = update(
            p, g, m, u, s, w, x, coefficients, modes, LAPROP, AMSGRAD, False
        )
    p = p - change

    # 3. Store.
    stored = p.to(PARAM)
    if PARAM.is_bf16():  # as above  # noqa: SIM102
        if rounds_param:
            _, _, _, _, for_p = random_bits(low, high, at.to(tl.uint32))
            stored = round_stochastically(p, for_p)
    if MASTERS:  # as above  # noqa: SIM102
        if has_master:
            stored, rest = split_master(p)
            store(rests, at, rest, begin, end, tl.int16, WHOLE)
    store(params, at, stored, begin, end, PARAM, WHOLE)
    if STATE != T:
        for_m, for_u, for_s, for_w, _ = random_bits(low, high, at.to(tl.uint32))
        m = round_stochastically(m, for_m)
        u = round_stochastically(u, for_u)
        s = round_stochastically(s, for_s)
        w = round_stochastically(w, for_w)
    store(exp_avgs, at, m, begin, end, STATE, WHOLE)
    store(grad_means, at, u, begin, end, STATE, WHOLE)
    store(grad_vars, at, s, begin, end, STATE, WHOLE)
    if not saturated:
        store(weight_sums, at, w, begin, end, STATE, WHOLE)
    if AMSGRAD:  # as above  # noqa: SIM102
        if amsgrad:  # to nearest: of rounded maxima the largest would stay, and grow
            store(max_denoms, at, x, begin, end, STATE, WHOLE)

    # 4. Tell.
    there = (at >= begin) & (at < end)
    return (
        tl.sum(tl.where(there, tl.abs(adaptive), 0.0)),
        tl.sum(tl.where(there, b, 0.0)),
        tl.sum(tl.where(there & (b == coefficients[3]), 1.0, 0.0)),
        tl.sum(tl.where(there & (b == coefficients[4]), 1.0, 0.0)),
        tl.sum(tl.where(there, gradient * gradient, 0.0)),
    )


@triton.jit
def _step_chunk(
    operands, begin, end, aligned, coefficients, modes, rounding, saturated,
    LAPROP: tl.constexpr, T: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    AMSGRAD: tl.constexpr, MASTERS: tl.constexpr, BLOCK: tl.constexpr, TELLS: tl.constexpr,
):  # fmt: skip
    for first in range(0, end, BLOCK):
        if aligned & (first >= begin) & (first + BLOCK <= end):
            _step_block(
                *(operands, first, begin, end, coefficients, modes, rounding, saturated),
                *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, BLOCK, TELLS, True),
            )
        else:
            _step_block(
                *(operands, first, begin, end, coefficients, modes, rounding, saturated),
                *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, BLOCK, TELLS, False),
            )


@triton.jit
def _step_and_tell(
    operands, begin, end, aligned, coefficients, modes, rounding, saturated,
    record,  # address: RECORD float32 that csrc/statistics.h describes
    LAPROP: tl.constexpr, T: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    AMSGRAD: tl.constexpr, MASTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps a chunk that is sampled. Its sums are deterministic, but their order is this backend's own."""
    adaptive = tl.zeros((), tl.float32)
    one_minus_beta = tl.zeros((), tl.float32)
    at_upper = tl.zeros((), tl.float32)
    at_lower = tl.zeros((), tl.float32)
    grad_square = tl.zeros((), tl.float32)
    for first in range(0, end, BLOCK):
        if aligned & (first >= begin) & (first + BLOCK <= end):
            a, b, c, d, e = _step_block(
                *(operands, first, begin, end, coefficients, modes, rounding, saturated),
                *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, BLOCK, True, True),
            )
        else:
            a, b, c, d, e = _step_block(
                *(operands, first, begin, end, coefficients, modes, rounding, saturated),
                *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, BLOCK, True, False),
            )
        adaptive += a.to(tl.float32)
        one_minus_beta += b.to(tl.float32)
        at_upper += c.to(tl.float32)
        at_lower += d.to(tl.float32)
        grad_square += e.to(tl.float32)
    record = record.to(tl.pointer_type(tl.float32))
    tl.store(record, (end - begin).to(tl.float32))
    tl.store(record + 1, adaptive)
    tl.store(record + 2, one_minus_beta)
    tl.store(record + 3, at_upper)
    tl.store(record + 4, at_lower)
    tl.store(record + 5, grad_square)


@triton.jit
def _all_ones(weight_sums, begin, end, STATE: tl.constexpr, BLOCK: tl.constexpr):
    """Whether all w of a chunk are 1. Apart from the step, whose blocks have no register to spare for it."""
    others = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        w = tl.load(weight_sums.to(tl.pointer_type(STATE)) + at, mask=(at >= begin) & (at < end), other=1.0)
        others |= (w != 1.0).to(tl.int32)
    return tl.max(others) == 0


@triton.jit
def _saturation_stamp(step, shift):
    """csrc/saturation.h."""
    return step.to(tl.uint32) * 8 + shift.to(tl.uint32)


@triton.jit
def _is_stamped(stamp, step, shift):
    """csrc/saturation.h."""
    return (stamp != 0) & (stamp == _saturation_stamp(step, shift))


@triton.jit
def _is_sampled(index):
    """Whether statistics are taken of that chunk of a tensor (csrc/statistics.h)."""
    return index.to(tl.uint32) * 0x9E3779B9 < 0x10000000


@triton.jit
def _misplaced(address, element_bytes: tl.constexpr, shift):
    """What remains of the address `shift` elements earlier after whole packets of 16 bytes: 0 if it is aligned."""
    return (address - shift * element_bytes) & 15


_ARGUMENTS = [
    "rows",
    "chunk_rows",
    "chunks",
    "ticket",
    "grads",
    "tensors",
    "integers",
    "values",
    "grad_scale",
    "found_inf",
    "grad_norm",
    "max_grad_norm",
    "trust_ratios",
    "statistics",
    "saturation",
]


# No autotuning: it runs a kernel many times, and this one updates in place.
# Values that happen to be 1 or multiples of 16 are no reason to compile it again.
@triton.jit(do_not_specialize=_ARGUMENTS)
def step_kernel(
    rows: tl.int64,  # address of the table: for each tensor COLUMNS int64
    chunk_rows: tl.int64,  # address: for each chunk its row, int32
    chunks: tl.int64,  # how many
    ticket: tl.int64,  # address of an int32 that counts the programs that are done; 0 between launches
    grads: tl.int64,  # address: for each tensor its gradient's address, int64, or 0 where it has none
    tensors: tl.int64,  # how many
    integers: tl.int64,  # address: for each group GROUP_INTEGERS int64
    values: tl.int64,  # address: for each group GROUP_VALUES of the arithmetic's type
    grad_scale: tl.int64,  # address of a scalar of the arithmetic's type, or 0: 1
    found_inf: tl.int64,  # address of one, or 0: 0
    grad_norm: tl.int64,  # address of one, or 0: no clip
    max_grad_norm: tl.int64,  # address of one
    trust_ratios: tl.int64,  # address: for each tensor what its learning rate is multiplied by, or 0: 1
    statistics: tl.int64,  # address: for each chunk RECORD float32
    saturation: tl.int64,  # address: for each chunk its stamp, uint32 (csrc/saturation.h), or 0: none
    LAPROP: tl.constexpr,
    T: tl.constexpr,  # the arithmetic's type
    PARAM: tl.constexpr,  # the parameters' type
    GRAD: tl.constexpr,  # the gradients' type
    STATE: tl.constexpr,  # the state's type: T, or bfloat16
    AMSGRAD: tl.constexpr,  # whether any tensor has AMSGrad's maximum
    MASTERS: tl.constexpr,  # whether any has a master
    CHUNK: tl.constexpr,  # elements of a chunk
    BLOCK: tl.constexpr,  # elements that a program works on at once
    STATISTICS: tl.constexpr,  # whether they are taken
):
    int64: tl.constexpr = tl.pointer_type(tl.int64)
    # Triton's interpreter takes an address that fits for an int32, whatever the annotation says.
    grad_scale = grad_scale.to(tl.int64)
    found_inf = found_inf.to(tl.int64)
    grad_norm = grad_norm.to(tl.int64)
    trust_ratios = trust_ratios.to(tl.int64)
    statistics = statistics.to(tl.int64)
    saturation = saturation.to(tl.int64)
    # A step in float64 has no register left for stamps, and reads every w.
    STAMPS: tl.constexpr = tl.float64 != T
    param_bytes: tl.constexpr = PARAM.primitive_bitwidth // 8
    grad_bytes: tl.constexpr = GRAD.primitive_bitwidth // 8
    state_bytes: tl.constexpr = STATE.primitive_bitwidth // 8
    rows = rows.to(tl.int64).to(int64)
    chunk_rows = chunk_rows.to(tl.int64).to(tl.pointer_type(tl.int32))
    grads = grads.to(tl.int64).to(int64)

    # 1. Gradients that overflowed: neither parameters, nor state, nor step counts move.
    if not read_overflow(found_inf, T):
        scale, norm, max_norm = read_scaling(grad_scale, grad_norm, max_grad_norm, T)

        # 2. The programs share out the chunks.
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            tensor = tl.load(chunk_rows + chunk)
            grad_address = tl.load(grads + tensor)
            if grad_address != 0:
                row = rows + tensor * COLUMNS
                param_address = tl.load(row)
                exp_avg_address = tl.load(row + 1)
                grad_mean_address = tl.load(row + 2)
                grad_var_address = tl.load(row + 3)
                weight_sum_address = tl.load(row + 4)
                max_denom_address = tl.load(row + 5)
                step = tl.load(tl.load(row + 6).to(int64)) + 1
                numel = tl.load(row + 7)
                master_address = tl.load(row + 11)
                group = tl.load(row + 8)
                index = chunk - tl.load(row + 9)
                amsgrad = max_denom_address != 0

                trust_ratio = tl.full((), 1.0, T)
                if trust_ratios != 0:
                    trust_ratio = tl.load(trust_ratios.to(tl.pointer_type(T)) + tensor)
                coefficients, decay_mode, adam_eps, rounds_params = read_coefficients(
                    integers, values, group, step, scale, norm, max_norm, trust_ratio, False, T
                )

                # Chunks are cut where packets of 16 bytes begin: `shift` elements early in a tensor that begins within
                # one. Where the operands begin at different places of a packet, all accesses are narrow.
                if (state_bytes < param_bytes) & (state_bytes < grad_bytes):
                    shift = (exp_avg_address & 15) // state_bytes
                elif grad_bytes < param_bytes:
                    shift = (grad_address & 15) // grad_bytes
                else:
                    shift = (param_address & 15) // param_bytes
                remainder = _misplaced(param_address, param_bytes, shift) | _misplaced(grad_address, grad_bytes, shift)
                remainder |= _misplaced(exp_avg_address, state_bytes, shift)
                remainder |= _misplaced(grad_mean_address, state_bytes, shift)
                remainder |= _misplaced(grad_var_address, state_bytes, shift)
                remainder |= _misplaced(weight_sum_address, state_bytes, shift)
                remainder |= tl.where(amsgrad, _misplaced(max_denom_address, state_bytes, shift), 0)
                remainder |= tl.where(master_address != 0, _misplaced(master_address, 2, shift), 0)
                aligned = remainder == 0
                shift = tl.where(aligned, shift, 0)
                start = index * CHUNK - shift
                begin = tl.where(index == 0, shift, 0).to(tl.int32)
                is_last = (index + 1) * CHUNK >= numel
                end = tl.where(is_last, numel - start, CHUNK).to(tl.int32)

                operands = (
                    param_address + start * param_bytes,
                    grad_address + start * grad_bytes,
                    exp_avg_address + start * state_bytes,
                    grad_mean_address + start * state_bytes,
                    grad_var_address + start * state_bytes,
                    weight_sum_address + start * state_bytes,
                    max_denom_address + start * state_bytes,
                    master_address + start * 2,
                )
                all_modes = (decay_mode, adam_eps, amsgrad)
                low, high = rounding_key(tl.load(row + 10), step)
                rounding = (low + start.to(tl.uint32), high, master_address != 0, rounds_params != 0)
                stamp = (saturation + tl.cast(chunk, tl.int64) * 4).to(tl.pointer_type(tl.uint32))
                saturated = False
                if STAMPS:  # known when this is compiled, the other is not  # noqa: SIM102
                    if saturation != 0:
                        saturated = _is_stamped(tl.load(stamp), step, shift)
                sampled = False
                if STATISTICS:
                    sampled = _is_sampled(index)
                if sampled:
                    record = statistics + tl.cast(chunk, tl.int64) * (4 * RECORD)
                    _step_and_tell(
                        *(operands, begin, end, aligned, coefficients, all_modes, rounding, saturated, record),
                        *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, BLOCK),
                    )
                else:
                    _step_chunk(
                        *(operands, begin, end, aligned, coefficients, all_modes, rounding, saturated),
                        *(LAPROP, T, PARAM, GRAD, STATE, AMSGRAD, MASTERS, BLOCK, STATISTICS),
                    )
                if STAMPS:  # known when this is compiled, the other is not  # noqa: SIM102
                    if saturation != 0:
                        # All threads have read the stamp and written their w.
                        tl.debug_barrier()
                        if (step % SEARCHES == 0) & (saturated == 0):
                            saturated = _all_ones(weight_sum_address + start * state_bytes, begin, end, STATE, BLOCK)
                        tl.store(stamp, tl.where(saturated, _saturation_stamp(step + 1, shift), 0))

        # 3. The last program to get here advances the step counts, when no other will read them any more. The barrier
        # has all threads of this one past their reading.
        tl.debug_barrier()
        done = tl.atomic_add(ticket.to(tl.int64).to(tl.pointer_type(tl.int32)), 1)
        if done == tl.num_programs(0) - 1:
            for first in range(0, tensors, 128):
                at = first + tl.arange(0, 128)
                has_grad = tl.load(grads + at, mask=at < tensors, other=0) != 0
                steps = tl.load(rows + at * COLUMNS + 6, mask=has_grad, other=0).to(int64)
                tl.store(steps, tl.load(steps, mask=has_grad, other=0) + 1, mask=has_grad)
            tl.store(ticket.to(tl.int64).to(tl.pointer_type(tl.int32)), 0)
