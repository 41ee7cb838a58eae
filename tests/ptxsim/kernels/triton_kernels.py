"""Kernels that make Triton emit what the simulator has to understand, compiled ahead of time: no GPU is needed."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def axpby(x, y, out, n, a, b, BLOCK: tl.constexpr):
    """Masked loads and stores."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, a * tl.load(x + i, mask=inside) + b * tl.load(y + i, mask=inside), mask=inside)


@triton.jit
def sum_of_squares(x, out, n, BLOCK: tl.constexpr):
    """A reduction through shuffles and shared memory, and an atomic."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    tl.atomic_add(out, tl.sum(value * value, axis=0))


@triton.jit
def adam(pointers, sizes, lr, beta1, beta2, eps, decay, bias1, bias2_root, BLOCK: tl.constexpr):
    """Many tensors by a table of pointers [tensor, (p, g, m, v)]: bf16 parameters, f16 gradients, f32 moments."""
    tensor = tl.program_id(1)
    n = tl.load(sizes + tensor)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    p = tl.multiple_of(tl.load(pointers + tensor * 4 + 0).to(tl.pointer_type(tl.bfloat16)), 16)
    g = tl.multiple_of(tl.load(pointers + tensor * 4 + 1).to(tl.pointer_type(tl.float16)), 16)
    m = tl.multiple_of(tl.load(pointers + tensor * 4 + 2).to(tl.pointer_type(tl.float32)), 16)
    v = tl.multiple_of(tl.load(pointers + tensor * 4 + 3).to(tl.pointer_type(tl.float32)), 16)
    parameter = tl.load(p + i, mask=inside).to(tl.float32)
    gradient = tl.load(g + i, mask=inside).to(tl.float32)
    mean = beta1 * tl.load(m + i, mask=inside) + (1 - beta1) * gradient
    square = beta2 * tl.load(v + i, mask=inside) + (1 - beta2) * gradient * gradient
    update = mean / (tl.sqrt(square) / bias2_root + eps)
    parameter = parameter - lr * decay * parameter - (lr / bias1) * update
    tl.store(p + i, parameter.to(tl.bfloat16), mask=inside)
    tl.store(m + i, mean, mask=inside)
    tl.store(v + i, square, mask=inside)


@triton.jit
def exact_division(x, y, out, n, BLOCK: tl.constexpr):
    """Vectors under a mask (n is divisible), and division and root with IEEE rounding."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    a = tl.load(x + i, mask=inside, eviction_policy="evict_first")
    b = tl.load(y + i, mask=inside).to(tl.float32)
    tl.store(out + i, tl.math.div_rn(a, tl.math.sqrt_rn(b * b + 1.0)), mask=inside)


@triton.jit
def random_scan(x, out, maximum, n, seed, BLOCK: tl.constexpr):
    """Philox, exponentials and logarithms, a scan, an atomic maximum."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    a = tl.load(x + i, mask=inside, other=0.0)
    random = tl.rand(seed, i)
    value = tl.where(a > 0, tl.exp(a), tl.log(1.0 - a)) + tl.abs(a) * tl.floor(random * 4) + tl.cumsum(a, 0)
    tl.store(out + i, value, mask=inside)
    tl.atomic_max(maximum, tl.max(tl.abs(a), axis=0))


@triton.jit
def pipelined_loop(x, out, n, BLOCK: tl.constexpr):
    """A loop that is pipelined with cp.async."""
    total = tl.zeros([BLOCK], tl.float32)
    i = tl.arange(0, BLOCK)
    for start in tl.range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK, num_stages=3):
        value = tl.load(x + start + i, mask=start + i < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def stochastic_rounding(x, out, n, seed, BLOCK: tl.constexpr):
    """Integer arithmetic on the bits of floats."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    bits = tl.load(x + i, mask=inside, other=0.0).to(tl.uint32, bitcast=True)
    noise = tl.randint(seed, i).to(tl.uint32) & 0xFFFF
    tl.store(out + i, ((bits + noise) >> 16).to(tl.uint16), mask=inside)


# Name of a variant -> kernel, types of the arguments, and whether n is known to be a multiple of 16.
VARIANTS = {
    "axpby": (axpby, "*fp32 *fp32 *fp32 i32 fp32 fp32", False),
    "axpby_16_bit": (axpby, "*bf16 *fp16 *bf16 i32 fp32 fp32", False),
    "sum_of_squares": (sum_of_squares, "*fp32 *fp32 i32", False),
    "adam": (adam, "*i64 *i64 fp32 fp32 fp32 fp32 fp32 fp32 fp32", False),
    "exact_division": (exact_division, "*fp32 *bf16 *fp32 i32", True),
    "random_scan": (random_scan, "*fp32 *fp32 *fp32 i32 i32", True),
    "pipelined_loop": (pipelined_loop, "*bf16 *fp32 i32", True),
    "stochastic_rounding": (stochastic_rounding, "*fp32 *u16 i32 i32", True),
}


def compile_to_ptx(variant, capability):
    """The PTX of a variant for a compute capability such as 80, and the bytes of shared memory that it needs."""
    kernel, types, n_divisible = VARIANTS[variant]
    signature = dict(zip(kernel.arg_names, types.split(), strict=False))
    aligned = [
        position
        for position, (name, type_name) in enumerate(signature.items())
        if type_name.startswith("*") or (name == "n" and n_divisible)
    ]
    source = ASTSource(
        fn=kernel,
        signature={**signature, "BLOCK": "constexpr"},
        constexprs={"BLOCK": 1024},
        attrs={(position,): [["tt.divisibility", 16]] for position in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    return compiled.asm["ptx"], compiled.metadata.shared
