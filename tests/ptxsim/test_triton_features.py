"""What else Triton emits: vectors under masks, exact math, Philox, scans, pipelined loops."""

import numpy as np
import pytest

from ptxsim import Device, PTXError
from ptxsim.numbers import bf16_to_f32, f32_to_bf16
from ptxsim.testing import assert_same_bits, f32, fma

ARCHS = ("sm_75", "sm_80", "sm_100")
SIZE = 3008  # a multiple of 16 that is not one of the block size


@pytest.fixture
def floats():
    return np.random.default_rng(1).standard_normal(SIZE).astype(f32)


def philox(counters, key):
    """The first word of Philox 4x32-10 of the counters (c, 0, 0, 0), which tl.randint returns."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    zero = np.zeros(counters.size, np.uint64)
    counter, keys = [counters.astype(np.uint64), zero, zero, zero], [np.uint64(key), np.uint64(0)]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [(b >> half) ^ counter[1] ^ keys[0], b & low, (a >> half) ^ counter[3] ^ keys[1], a & low]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return counter[0].astype(np.uint32)


@pytest.mark.parametrize("arch", ARCHS)
def test_masked_vectors(triton, arch):
    """a * x + b * y with one fma, in 32 bits and in two different 16-bit types."""
    rng, n = np.random.default_rng(3), 3000
    x, y = rng.standard_normal(n).astype(f32), rng.standard_normal(n).astype(f32)
    device = Device()
    out = device.zeros(n, f32, "out")
    arguments = [device.buffer(x), device.buffer(y), out, n, 2.0, 3.0]
    triton("axpby", arch)[0].launch("axpby", 3, 128, arguments, device, pad_args=True, track=True)
    assert_same_bits(out.array, fma(2, x, f32(3) * y))
    assert (out.writes == 1).all()

    x16, y16 = f32_to_bf16(x), y.astype(np.float16)
    out16 = device.zeros(n, np.uint16)
    arguments = [device.buffer(x16), device.buffer(y16), out16, n, 2.0, 3.0]
    triton("axpby_16_bit", arch)[0].launch("axpby", 3, 128, arguments, device, pad_args=True)
    assert (out16.array == f32_to_bf16(fma(2, bf16_to_f32(x16), f32(3) * y16.astype(f32)))).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_exact_division_and_root(triton, floats, arch):
    """div_rn and sqrt_rn are IEEE, unlike the operators; stores are vectors, as n is known to be divisible."""
    module, shared_bytes = triton("exact_division", arch)
    device, y16 = Device(), f32_to_bf16(floats[::-1])
    y, out = bf16_to_f32(y16), device.zeros(SIZE, f32)
    arguments = [device.buffer(floats), device.buffer(y16), out, SIZE]
    options = {"pad_args": True, "racecheck": True, "track": True}
    stats = module.launch("exact_division", 3, 128, arguments, device, shared_bytes, **options)
    assert_same_bits(out.array, floats / np.sqrt(fma(y, y, f32(1))))
    assert stats.widths("st") == {16: SIZE // 4}
    assert (out.writes == 1).all()
    if shared_bytes:
        with pytest.raises(PTXError, match="shared offset 0 of 0"):
            module.launch("exact_division", 3, 128, arguments, device, pad_args=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_random_numbers_and_scans(triton, floats, arch):
    """Philox to the bit, exponential and logarithm, a scan over the block, an atomic maximum of floats."""
    module, shared_bytes = triton("random_scan", arch)
    device = Device()
    out, maximum = device.zeros(SIZE, f32), device.zeros(1, f32)
    arguments = [device.buffer(floats), out, maximum, SIZE, 7]
    module.launch("random_scan", 3, 128, arguments, device, shared_bytes, pad_args=True, racecheck=True)
    integers, x = philox(np.arange(SIZE), 7).view(np.int32), floats.astype(np.float64)
    uniform = np.where(integers < 0, -integers - 1, integers).astype(f32) * f32(4.6566127342e-10)
    scans = np.concatenate([np.cumsum(x[start : start + 1024]) for start in range(0, SIZE, 1024)])
    curve = np.where(x > 0, np.exp(x), np.log(1 - np.minimum(x, 0)))
    np.testing.assert_allclose(out.array, curve + np.abs(x) * np.floor(uniform * 4) + scans, rtol=0, atol=1e-4)
    assert maximum.array[0] == np.abs(floats).max()


@pytest.mark.parametrize("arch", ARCHS)
def test_pipelined_loop(triton, floats, arch):
    """Copies to shared memory that run ahead of the loop."""
    module, shared_bytes = triton("pipelined_loop", arch)
    device, x16 = Device(), f32_to_bf16(floats)
    out = device.zeros(2, f32)
    arguments = [device.buffer(x16), out, SIZE]
    module.launch("pipelined_loop", 2, 128, arguments, device, shared_bytes, pad_args=True, racecheck=True)
    assert out.array.sum() == pytest.approx(np.sum(bf16_to_f32(x16).astype(np.float64) ** 2), rel=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_stochastic_rounding(triton, floats, arch):
    """Integer arithmetic on the bits of floats, to the bit."""
    device = Device()
    out = device.zeros(SIZE, np.uint16)
    arguments = [device.buffer(floats), out, SIZE, 7]
    module, shared_bytes = triton("stochastic_rounding", arch)
    module.launch("stochastic_rounding", 3, 128, arguments, device, shared_bytes, pad_args=True)
    noise = philox(np.arange(SIZE), 7) & np.uint32(0xFFFF)
    assert (out.array == (floats.view(np.uint32) + noise) >> np.uint32(16)).all()
