"""Optimizer kernels as nvcc and Triton compile them: tables of pointers, vectors, tails, 16-bit types."""

import ctypes
import math

import numpy as np
import pytest

from ptxsim import Device, PTXError
from ptxsim.mutate import mutants, survivors
from ptxsim.numbers import bf16_to_f32, f32_to_bf16
from ptxsim.testing import assert_same_bits, f32, fma

EXACT = "-fmad=false"
ARCHS = ("sm_75", "sm_80", "sm_100")
MAX_TENSORS, MAX_BLOCKS, CHUNK = 24, 128, 2048  # as in kernels/adam.cu


class Table(ctypes.Structure):
    """The struct Table of kernels/adam.cu."""

    _fields_ = [
        *((name, ctypes.c_uint64 * MAX_TENSORS) for name in "pgmv"),
        ("n", ctypes.c_int64 * MAX_TENSORS),
        ("tensor", ctypes.c_uint8 * MAX_BLOCKS),
        ("chunk", ctypes.c_int32 * MAX_BLOCKS),
    ]


class Hyper(ctypes.Structure):
    """The struct Hyper of kernels/adam.cu."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("lr", "beta1", "beta2", "eps", "decay", "bias1", "bias2_root")),
        ("step", ctypes.c_int),
    ]


HYPER = Hyper(1e-3, 0.9, 0.999, 1e-8, 0.01, 1 - 0.9, math.sqrt(1 - 0.999), 1)
RATES = {name: f32(getattr(HYPER, name)) for name, _ in Hyper._fields_[:7]}


class Case:
    """Some tensors on a device, in 32 bits or as bf16 parameters with f16 gradients."""

    def __init__(self, sizes, half=False, offsets=None, seed=0):
        rng = np.random.default_rng(seed)
        self.device, self.table, self.blocks = Device(), Table(), 0
        self.before, self.buffers = [], []
        for i, n in enumerate(sizes):
            p, g, m = (rng.standard_normal(n).astype(f32) for _ in range(3))
            v = rng.random(n).astype(f32)
            stored = [f32_to_bf16(p) if half else p, g.astype(np.float16) if half else g, m, v]
            elements_off = offsets[i] if offsets else 0
            buffers = [
                self.device.buffer(array, f"{name}{i}", elements_off * array.itemsize)
                for name, array in zip("pgmv", stored, strict=True)
            ]
            for name, buffer in zip("pgmv", buffers, strict=True):
                getattr(self.table, name)[i] = buffer.ptr
            self.table.n[i] = n
            # The values in float32 that the kernel starts from.
            self.before.append((bf16_to_f32(stored[0]) if half else p, stored[1].astype(f32), m, v))
            self.buffers.append(buffers)
            for chunk in range(-(-n // CHUNK)):
                self.table.tensor[self.blocks], self.table.chunk[self.blocks] = i, chunk
                self.blocks += 1
        self.inverse_scale = self.device.buffer(np.ones(1, f32), "inverse_scale")

    def launch_f32(self, module, **options):
        """Run adam_f32."""
        arguments = [self.table, HYPER, self.inverse_scale]
        return module.launch("adam_f32", self.blocks, 256, arguments, self.device, **options)


def adam_exactly(p, g, m, v):
    """Adam with the rounding steps of the kernels."""
    m = fma(RATES["beta1"], m, (f32(1) - RATES["beta1"]) * g)
    v = fma(RATES["beta2"], v, ((f32(1) - RATES["beta2"]) * g) * g)
    denominator = np.sqrt(v) / RATES["bias2_root"] + RATES["eps"]
    decayed = p - (RATES["lr"] * RATES["decay"]) * p
    return decayed - (RATES["lr"] / RATES["bias1"]) * (m / denominator), m, v


def adam_in_f64(p, g, m, v):
    """Adam as the formula says it."""
    p, g, m, v = (x.astype(np.float64) for x in (p, g, m, v))
    rate = {name: float(value) for name, value in RATES.items()}
    m = rate["beta1"] * m + (1 - rate["beta1"]) * g
    v = rate["beta2"] * v + (1 - rate["beta2"]) * g * g
    update = m / (np.sqrt(v) / rate["bias2_root"] + rate["eps"])
    return p - rate["lr"] * rate["decay"] * p - rate["lr"] / rate["bias1"] * update, m, v


def assert_close(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("arch", ARCHS)
def test_f32_kernel_takes_every_path_and_touches_every_byte_once(nvcc, arch):
    """Aligned tensors go by vectors of 16 bytes, others one by one; no element is left out or done twice."""
    case = Case([4096, 1, 5000, 2048, 4099], offsets=[0, 0, 0, 1, 0])
    case.inverse_scale.array[0] = 0.5
    stats = case.launch_f32(nvcc("adam", arch), track=True)
    for (p, g, m, v), buffers in zip(case.before, case.buffers, strict=True):
        for buffer, want in zip((buffers[0], *buffers[2:]), adam_in_f64(p, g * f32(0.5), m, v), strict=True):
            assert_close(buffer.array, want, 1e-5)
            assert (buffer.writes == 1).all()
            assert (buffer.reads == 1).all()
        assert (buffers[1].reads == 1).all()
        assert not buffers[1].writes.any()
    elements = sum(len(p) for p, *_ in case.before)
    assert stats.bytes("st") == 12 * elements
    assert stats.bytes("ld") == 16 * elements + 4 * 256 * case.blocks
    assert set(stats.widths("st")) == {4, 16}
    assert stats.buffer_bytes["g0", "ld"] == 4 * 4096


@pytest.mark.parametrize("arch", ARCHS)
def test_f32_kernel_bit_for_bit(nvcc, arch):
    """What a register holds is what the hardware would hold, to the last bit."""
    case = Case([4096])
    case.launch_f32(nvcc("adam", arch, EXACT))
    p, _, m, v = case.buffers[0]
    for buffer, want in zip((p, m, v), adam_exactly(*case.before[0]), strict=True):
        assert_same_bits(buffer.array, want)


@pytest.mark.parametrize("arch", ARCHS)
def test_16_bit_kernel_bit_for_bit(nvcc, arch):
    """A tolerance of bf16 would hide a wrong sign of the weight decay: the bits must be the same."""
    case = Case([4096, 2047, 3, 2052], half=True)
    arguments = [case.table, HYPER]
    stats = nvcc("adam", arch, EXACT).launch("adam_bf16", case.blocks, 128, arguments, case.device, track=True)
    for before, (p, _, m, v) in zip(case.before, case.buffers, strict=True):
        want = adam_exactly(*before)
        assert (p.array == f32_to_bf16(want[0])).all()
        assert (p.writes == 1).all()
        assert_same_bits(m.array, want[1])
        assert_same_bits(v.array, want[2])
    assert set(stats.widths("ld")) == {2, 4, 8, 16}


def test_fast_math_is_another_kernel_with_nearly_the_same_result(nvcc):
    """The approximate instructions, perturbed as the hardware may."""
    results = []
    for options in ((), ("--use_fast_math",)):
        case = Case([4096])
        case.launch_f32(nvcc("adam", "sm_80", *options), approx_ulp=2)
        results.append(case.buffers[0][0].array)
    assert_close(*results, 1e-5)
    assert (results[0] != results[1]).any()


def test_perturbation_needs_approximate_instructions(nvcc):
    """approx_ulp must change approximate results, and exact ones never."""
    for options, changes in (((), False), (("--use_fast_math",), True)):
        results = []
        for ulp in (0, 2):
            case = Case([4096])
            case.launch_f32(nvcc("adam", "sm_80", *options), approx_ulp=ulp)
            results.append(case.buffers[0][0].array)
        assert (results[0] != results[1]).any() == changes


def test_mistakes_of_the_host_are_found(nvcc):
    """A wrong size, a null or misaligned pointer, a chunk done twice, arguments of the wrong size."""
    module = nvcc("adam", "sm_80")
    sizes = [4096, 3000]

    case = Case(sizes)
    case.table.n[1] = 3001
    with pytest.raises(
        PTXError, match=r"out-of-bounds ld of 4 bytes.*nearest buffer .1: offset 12000 of 12000"
    ) as error:
        case.launch_f32(module)
    assert "PTX line" in str(error.value)

    case = Case(sizes)
    case.table.g[0] = 0
    with pytest.raises(PTXError, match=r"out-of-bounds ld.*a null pointer\?"):
        case.launch_f32(module)

    case = Case(sizes)
    case.table.m[0] += 2
    with pytest.raises(PTXError, match="misaligned"):
        case.launch_f32(module)

    case = Case(sizes)
    case.table.chunk[1] = 0
    case.launch_f32(module, track=True)
    assert case.buffers[0][0].writes[0] == 2
    assert case.buffers[0][0].writes[-1] == 0

    with pytest.raises(PTXError, match="bytes, the argument has 3"):
        module.launch("adam_f32", 1, 256, [bytes(3), HYPER, case.inverse_scale], case.device)


@pytest.mark.parametrize("arch", ARCHS)
def test_triton_kernel_with_a_table_of_pointers(triton, arch):
    """Triton loads the pointers from memory, and passes vectors through shared memory."""
    module, shared_bytes = triton("adam", arch)
    sizes = [3000, 1, 1024]
    case = Case(sizes, half=True)
    pointers = case.device.buffer(np.array([[b.ptr for b in buffers] for buffers in case.buffers], np.int64))
    arguments = [pointers, case.device.buffer(np.array(sizes, np.int64)), *RATES.values()]
    grid = (3, len(sizes))
    checks = {"track": True, "racecheck": True}
    module.launch("adam", grid, 128, arguments, case.device, shared_bytes, pad_args=True, **checks)
    for before, (p, _, m, v) in zip(case.before, case.buffers, strict=True):
        want = adam_in_f64(*before)
        assert_close(bf16_to_f32(p.array), want[0], 2.0**-8)
        assert_close(m.array, want[1], 1e-5)
        assert_close(v.array, want[2], 1e-5)
        assert (p.writes == 1).all()
        assert (m.writes == 1).all()


def test_almost_every_mutant_of_the_kernel_is_noticed(ptx_of):
    """What this is all for: a kernel that is wrong in one instruction gives a wrong result or an error."""

    def check(module):
        case = Case([4096, 5, 2049], offsets=[0, 0, 1])
        case.launch_f32(module, track=True, max_steps=2000)
        for before, (p, g, m, v) in zip(case.before, case.buffers, strict=True):
            for buffer, want in zip((p, m, v), adam_exactly(*before), strict=True):
                assert_same_bits(buffer.array, want)
                assert (buffer.writes == 1).all()
            assert (g.reads == 1).all()

    text = ptx_of("adam", "sm_80", EXACT)
    missed = survivors(text, "adam_f32", check)
    # What is left chooses between ways to the same result: whether to go by vectors or one by one.
    assert len(missed) <= 0.1 * len(list(mutants(text, "adam_f32"))), missed
