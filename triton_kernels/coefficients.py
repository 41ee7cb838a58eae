"""What the elements of a tensor share, for the kernels that step and those that only take norms."""

import triton
import triton.language as tl

from .maxva import L2_DECAY, bias_correction, divide, grad_factor

# Columns of the table (maxva_kernels/tensor_table.py, STEP_COLUMNS).
COLUMNS = tl.constexpr(12)
# Numbers of a group as launcher.py packs them: of the arithmetic's type, and integers.
GROUP_VALUES = tl.constexpr(10)
GROUP_INTEGERS = tl.constexpr(6)


@triton.jit
def read_overflow(found_inf, T: tl.constexpr):
    """Whether gradients overflowed. Devices add up their flags."""
    overflow = False
    if found_inf != 0:
        overflow = tl.load(found_inf.to(tl.pointer_type(T))) != 0.0
    return overflow


@triton.jit
def read_scaling(grad_scale, grad_norm, max_grad_norm, T: tl.constexpr):
    """The gradients' scale, norm and largest norm, as `grad_factor` takes them."""
    numbers: tl.constexpr = tl.pointer_type(T)
    scale = tl.full((), 1.0, T)
    if grad_scale != 0:
        scale = tl.load(grad_scale.to(numbers))
    norm = tl.full((), 1.0, T)
    max_norm = tl.full((), -1.0, T)
    if grad_norm != 0:
        norm = tl.load(grad_norm.to(numbers))
        max_norm = tl.load(max_grad_norm.to(tl.int64).to(numbers))
    return scale, norm, max_norm


@triton.jit
def read_coefficients(
    integers, values,  # addresses of the groups' numbers
    group, step,
    scale, norm, max_norm,
    trust_ratio,  # multiplies the learning rate
    AT_RATE_1: tl.constexpr,  # whatever that is
    T: tl.constexpr,
):  # fmt: skip
    """What a tensor's coordinates share, as `update` takes it, and the modes: of the decay, of eps, of
    rounding parameters."""
    numbers: tl.constexpr = tl.pointer_type(T)
    modes = integers.to(tl.int64).to(tl.pointer_type(tl.int64)) + group * GROUP_INTEGERS
    decay_mode = tl.load(modes + 2).to(tl.int32)
    adam_eps = tl.load(modes + 3).to(tl.int32)
    hyper = values.to(tl.int64).to(numbers) + group * GROUP_VALUES
    if AT_RATE_1:
        lr = tl.full((), 1.0, T)
    else:
        lr = tl.load(hyper)
        lr_address = tl.load(modes + 1)
        if lr_address != 0:
            lr = tl.load(lr_address.to(numbers))
        lr = lr * trust_ratio
    weight_decay = tl.load(hyper + 2)
    factor = grad_factor(scale, norm, max_norm, tl.load(modes + 4))
    step_size = divide(lr, bias_correction(tl.load(modes), step, T))
    decay = tl.where(decay_mode == L2_DECAY, weight_decay, lr * weight_decay)
    coefficients = (
        factor,
        tl.load(hyper + 3),  # alpha and 1 - alpha
        tl.load(hyper + 4),
        tl.load(hyper + 5),  # 1 - the upper and the lower bound of beta
        tl.load(hyper + 6),
        tl.load(hyper + 7),  # the first gradient's weight
        tl.load(hyper + 8),  # w is set to 1 this near to it
        tl.load(hyper + 1),  # eps
        step_size,
        decay,
    )
    return coefficients, decay_mode, adam_eps, tl.load(modes + 5)
