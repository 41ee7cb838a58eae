"""MaxVA (arXiv 2006.11918) in Triton, one coordinate at a time: the only place in Triton where beta is computed.

It is csrc/maxva.h operation for operation; the notes there derive it. Only IEEE operations occur and none is contracted
(`div_rn`, `sqrt_rn`, and kernels are compiled with `enable_fp_fusion=False`), so that results are the CUDA and CPU
kernels' bit for bit. Selections are comparisons in which a NaN takes the same side as there.

Values are scalars or blocks of the arithmetic's type: float32, or float64 for float64 parameters.
"""

import triton
import triton.language as tl

# The modes of a group; csrc/maxva.h has the same numbers.
NO_DECAY = tl.constexpr(0)
DECOUPLED_DECAY = tl.constexpr(1)
L2_DECAY = tl.constexpr(2)

# The smallest normal numbers.
SMALLEST = tl.constexpr(2.0**-126)
SMALLEST_DOUBLE = tl.constexpr(2.0**-1022)


@triton.jit
def divide(a, b):
    """a / b, rounded to nearest: Triton's own float32 division is an approximation."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def square_root(x):
    """Rounded to nearest: Triton's own float32 root is an approximation."""
    if x.dtype == tl.float64:
        return tl.math.sqrt(x)
    else:
        return tl.math.sqrt_rn(x)


@triton.jit
def flush_subnormal(x):
    """Below the smallest normal number 0 is stored. NaN stays."""
    smallest: tl.constexpr = SMALLEST_DOUBLE if x.dtype == tl.float64 else SMALLEST
    return tl.where(tl.abs(x) < smallest, 0.0, x)


@triton.jit
def bounded(x, least, most):
    """x between bounds; a NaN is the first. In float32 by an instruction each; float64 has none, and what stands for
    them takes more registers."""
    if x.dtype == tl.float64:
        x = tl.where(x > least, x, least)
        return tl.where(x < most, x, most)
    else:
        return tl.minimum(tl.maximum(x, least), most)


@triton.jit
def bias_correction(alpha_bits, step, T: tl.constexpr):
    """1 - alpha^step, alpha as a 64-bit binary fraction."""
    base = alpha_bits.to(tl.uint64)
    power = base
    empty = True
    while step != 0:
        if step & 1 != 0:
            power = tl.where(empty, base, tl.umulhi(power, base))
            empty = False
        base = tl.umulhi(base, base)
        step = step >> 1
    complement = (-power.to(tl.int64)).to(tl.uint64)
    scaled = complement.to(T) * 5.421010862427522e-20  # 2^-64
    return tl.where(power == 0, 1.0, scaled).to(T)


@triton.jit
def grad_factor(scale, norm, max_norm, maximize):
    """+-min(1, max_norm / norm) / scale; max_norm < 0: no clip. A NaN norm gives a NaN factor."""
    inverse = divide(1.0, scale)
    clip = divide(max_norm, norm * inverse)
    clipped = tl.where(clip >= 1.0, inverse, inverse * clip)
    factor = tl.where(max_norm < 0.0, inverse, clipped)
    return tl.where(maximize != 0, -factor, factor)


@triton.jit
def update_moments(g, u, s, w, one_minus_upper, one_minus_lower, first_weight, saturation, SATURATED: tl.constexpr):
    """The centred moments after gradient g (Eq. 6 and lines 7 to 11 of Algorithm 1), and 1 - beta; w == 0 before the
    first. SATURATED: w is 1 and stays so, which saves a division and changes no bit."""
    d = g - u
    r = d * d
    rise = r - s if SATURATED else (r - s) * w
    b = bounded(divide(rise, (r + s) + rise), one_minus_upper, one_minus_lower)  # 1 - beta; a NaN where r = s = 0
    q = b
    if not SATURATED:
        b = tl.where(w == 0.0, first_weight, b)
        w = w + b * (1.0 - w)
        q = divide(b, w)
        w = tl.where(1.0 - w <= saturation, 1.0, w)
    p = 1.0 - q
    e = q * d
    u = flush_subnormal(u + e)
    variance = p * s + (p * e) * d
    smallest: tl.constexpr = SMALLEST_DOUBLE if s.dtype == tl.float64 else SMALLEST
    s = tl.where(variance < smallest, 0.0, variance)
    return u, s, w, b


@triton.jit
def update(
    p, g, m, u, s, w, x,  # a coordinate: parameter, gradient as stored, momentum, moments, AMSGrad's maximum
    coefficients,  # what a tensor's coordinates share, of their type
    modes,  # decay mode, whether eps stands as in Adam, whether AMSGrad is on
    LAPROP: tl.constexpr,
    AMSGRAD: tl.constexpr,  # whether it may be on
    SATURATED: tl.constexpr,  # whether w is known to be 1
):  # fmt: skip
    """One step. Returns the new m, u, s, w, x; what is to be subtracted from p; and of that the part that is not weight
    decay, the gradient as it was used, without decay, and 1 - beta."""
    factor, alpha, one_minus_alpha, one_minus_upper, one_minus_lower, first_weight, saturation = coefficients[:7]
    eps, step_size, decay = coefficients[7:]
    decay_mode, adam_eps, amsgrad = modes
    gradient = g * factor
    g = tl.where(decay_mode == L2_DECAY, gradient + decay * p, gradient)
    u, s, w, b = update_moments(g, u, s, w, one_minus_upper, one_minus_lower, first_weight, saturation, SATURATED)

    root_v = square_root(s + u * u)
    if AMSGRAD:
        x = tl.where(root_v <= x, x, root_v)  # a NaN is kept
        root_v = tl.where(amsgrad, x, root_v)
    if SATURATED:
        root_w: tl.constexpr = 1.0
    else:
        root_w = tl.where(adam_eps != 0, 1.0, square_root(w))
    if LAPROP:
        m = flush_subnormal(alpha * m + one_minus_alpha * divide(root_w * g, root_w * root_v + eps))
        adaptive = step_size * m
    else:
        m = flush_subnormal(alpha * m + one_minus_alpha * g)
        adaptive = step_size * divide(root_w * m, root_w * root_v + eps)
    change = tl.where(decay_mode == DECOUPLED_DECAY, decay * p + adaptive, adaptive)
    return m, u, s, w, x, change, adaptive, gradient, b


@triton.jit
def add_square(g, large, medium, small):
    """Adds g^2 to one of three sums, large and small values scaled by a power of two (csrc/norm.h)."""
    double: tl.constexpr = g.dtype == tl.float64
    least_large: tl.constexpr = 2.0**400 if double else 2.0**44
    most_small: tl.constexpr = 2.0**-400 if double else 2.0**-44
    down: tl.constexpr = 2.0**-560 if double else 2.0**-84
    up: tl.constexpr = 2.0**560 if double else 2.0**84
    a = tl.where(g < 0.0, -g, g)
    is_large = a >= least_large
    is_small = a < most_small
    scaled_down = tl.where(is_large, a * down, 0.0)
    scaled_up = tl.where(is_small, a * up, 0.0)
    middle = tl.where(is_large | is_small, 0.0, a)
    return large + scaled_down * scaled_down, medium + middle * middle, small + scaled_up * scaled_up


@triton.jit
def twice_the_bits(g):
    """Less 1, of float32: unsigned numbers in the order of |g|, but that of 0 is the largest."""
    return g.to(tl.uint32, bitcast=True) * 2 - 1


@triton.jit
def add_square_assuming(g, large, medium, small, least, MEDIUM: tl.constexpr):
    """`add_square`; or, assuming that all are medium, to that sum alone, with the least of `twice_the_bits`, by which
    `are_medium` tells whether they were."""
    if MEDIUM:
        return large, medium + g * g, small, tl.minimum(least, twice_the_bits(g))
    else:
        large, medium, small = add_square(g, large, medium, small)
        return large, medium, small, least


@triton.jit
def are_medium(sums, least):
    """Whether `add_square` adds to medium sums alone, and the squares as they are: of sums that were made so, and for
    each the least of `twice_the_bits`, which tells of small elements, as the sums do of large ones. Of sums that have
    become large by the number of elements it says no, too."""
    are = (least >= 2 * 0x29800000 - 1) & (sums < 2.0**88)  # the bits of 2^-44
    return tl.min(are.to(tl.int32)) != 0


@triton.jit
def root_of_sum(large, medium, small):
    """The square root of what the three sums stand for."""
    double: tl.constexpr = large.dtype == tl.float64
    down: tl.constexpr = 2.0**-560 if double else 2.0**-84
    up: tl.constexpr = 2.0**560 if double else 2.0**84
    max: tl.constexpr = 1.7976931348623157e308 if double else 3.4028234663852886e38
    of_large = square_root(large + (medium * down) * down) * (1 / down)
    of_large = tl.where((of_large > max) & (large <= max), max, of_large)
    of_small = square_root(small) * (1 / up)
    of_medium = square_root(medium + (small * (1 / up)) * (1 / up))  # also where medium is NaN
    return tl.where(large > 0.0, of_large, tl.where(medium == 0.0, of_small, of_medium))
