"""The same source built by nvcc for the simulator and by the host compiler for this processor."""

import numpy as np
import pytest

from ptxsim import Device
from ptxsim.numbers import bf16_to_f32, f32_to_bf16, f64_to_bf16
from ptxsim.testing import f32, random_bits

OPERATIONS, COUNT = 24, 4096
FLOAT_OPERATIONS = (5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 19, 23)  # their NaN differ between processors
BUILDS = [
    *((arch, ()) for arch in ("sm_75", "sm_80", "sm_100")),
    ("sm_80", ("-G",)),  # every variable in local memory, and functions that are not inlined
    ("sm_80", ("-O0", "-Xcicc", "-O0")),
]


@pytest.fixture(scope="module")
def operands():
    """Random bits, every pair of special values, and pairs of floats of similar size."""
    x, y = random_bits(COUNT, 8), random_bits(COUNT, 9)
    special = [0, 1 << 31, 0x7F800000, 0xFF800000, 1, 0x7FFFFF, 0x3F800000, 0x7F7FFFFF, 0x4F000000, 0xFFFFFFFF]
    x[:100], y[:100] = np.repeat(special, 10), np.tile(special, 10)
    x[100:1600], y[100:1600] = np.random.default_rng(10).standard_normal((2, 1500)).astype(f32).view(np.uint32)
    return x, y


@pytest.fixture(scope="module")
def expected(host_library, operands):
    """What this processor computes, a row for each operation."""
    x, y = operands
    results = np.zeros((OPERATIONS, COUNT), np.uint32)
    host_library.host(x.ctypes, y.ctypes, results.ctypes, COUNT, OPERATIONS)
    return results


def count_differences(got, want, operation):
    both_nan = np.isnan(got.view(f32)) & np.isnan(want.view(f32)) & np.isin(operation, FLOAT_OPERATIONS)
    return np.count_nonzero((got != want) & ~both_nan)


def test_comparison_sees_a_difference(expected):
    """The check of these tests itself: results that are off by one are seen."""
    assert count_differences(expected + np.uint32(1), expected, np.arange(OPERATIONS)[:, None]) > 90_000


@pytest.mark.parametrize(("arch", "options"), BUILDS)
def test_operations_bit_for_bit(nvcc, operands, expected, arch, options):
    """Integer, float, double and local-memory operations, in a loop and with each thread in another switch case."""
    x, y = operands
    device, module = Device(), nvcc("torture", arch, "-fmad=false", *options)
    each, mixed = device.zeros((OPERATIONS, COUNT), np.uint32), device.zeros(COUNT, np.uint32)
    inputs = [device.buffer(x), device.buffer(y)]
    module.launch("torture", 8, 256, [*inputs, each, COUNT, OPERATIONS], device)
    assert count_differences(each.array, expected, np.arange(OPERATIONS)[:, None]) == 0
    module.launch("divergent_ops", 16, 256, [*inputs, mixed, COUNT, OPERATIONS], device)
    operation = x % OPERATIONS
    assert count_differences(mixed.array, expected[operation, np.arange(COUNT)], operation) == 0


@pytest.mark.parametrize(("arch", "options"), BUILDS[1:4])
def test_packed_halves(nvcc, arch, options):
    """fma, add and mul of f16x2 and bf16x2, each rounded once."""
    rng, device = np.random.default_rng(11), Device()
    a, b = rng.standard_normal(2048).astype(np.float16), f32_to_bf16(rng.standard_normal(2048).astype(f32))
    out_a, out_b = device.zeros(2048, np.float16), device.zeros(2048, np.uint16)
    arguments = [device.buffer(a), device.buffer(b), out_a, out_b, 1024]
    nvcc("torture", arch, "-fmad=false", *options).launch("halves", 4, 256, arguments, device)
    # Products and sums of halves of similar size are exact in f64.
    sum_a = (a + np.float16(0.5)).astype(np.float64)
    assert (out_a.array == (a.astype(np.float64) ** 2 + sum_a).astype(np.float16)).all()
    wide_b = bf16_to_f32(b).astype(np.float64)
    half_b = bf16_to_f32(f64_to_bf16(wide_b * 0.5)).astype(np.float64)
    assert (out_b.array == f64_to_bf16(wide_b**2 + half_b)).all()


@pytest.mark.parametrize(("arch", "options"), BUILDS[1:4])
def test_reductions_over_warps_and_blocks(nvcc, arch, options):
    """redux, vote, and a barrier that counts."""
    device, values = Device(), np.random.default_rng(11).standard_normal(1000).astype(f32)
    maximum, counts = device.zeros(1, f32), device.zeros(2, np.int32)
    arguments = [device.buffer(values), maximum, counts, 1000]
    module = nvcc("torture", arch, "-fmad=false", *options)
    module.launch("warps", 4, 256, arguments, device, racecheck=True)
    assert maximum.array[0] == np.abs(values).max()
    assert (counts.array == (np.abs(values) > 1).sum()).all()
