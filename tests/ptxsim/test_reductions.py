"""Reductions as nvcc, CUB and Triton compile them: shared memory, barriers, shuffles, atomics."""

import math

import numpy as np
import pytest

from ptxsim import Device, PTXError
from ptxsim.mutate import mutants, survivors
from ptxsim.testing import f32

ARCHS = ("sm_75", "sm_80", "sm_100")


def sum_of_squares(x):
    return np.sum(x.astype(np.float64) ** 2)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("n", "grid", "block"), [(1, 1, 32), (1000, 2, 128), (100_000, 7, 256), (5, 3, 1024)])
def test_sum_through_shuffles_and_shared_memory(nvcc, arch, n, grid, block):
    """Each warp, then the block, then an atomic; every element is read once."""
    device, x = Device(), np.random.default_rng(n).standard_normal(n).astype(f32)
    out, flag = device.zeros(1, f32, "out"), device.zeros(1, np.int32, "flag")
    stats = nvcc("reduce", arch).launch(
        "sumsq", grid, block, [device.buffer(x, "x"), n, out, flag], device, racecheck=True
    )
    assert out.array[0] == pytest.approx(sum_of_squares(x), rel=1e-5)
    assert flag.array[0] == 0
    assert stats.buffer_bytes["x", "ld"] == 4 * n
    assert stats.widths("atom") == {4: grid}


def test_infinity_is_seen(nvcc):
    """The kernel tells of values that are not finite."""
    device, x = Device(), np.array([1, 2, np.inf, 3, 4], f32)
    out, flag = device.zeros(1, f32), device.zeros(1, np.int32)
    nvcc("reduce", "sm_80").launch("sumsq", 3, 1024, [device.buffer(x), 5, out, flag], device)
    assert flag.array[0] == 1
    assert np.isinf(out.array[0])


def test_shuffle_of_threads_that_do_not_exist_is_found(nvcc):
    """A block that is not a whole number of warps, in a kernel that was made for whole ones."""
    with pytest.raises(PTXError, match="do not exist"):
        nvcc("reduce", "sm_80").launch("sumsq", 1, 48, [np.zeros(5, f32), 5, np.zeros(1, f32), np.zeros(1, np.int32)])


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_last_block_adds_up(nvcc, seed):
    """The order of blocks and atomics, which is not defined, must not matter; dynamic shared memory, float64."""
    x, device = np.random.default_rng(2).random(1000).astype(f32), Device()
    norm, ticket, scratch = device.zeros(1, f32), device.zeros(1, np.uint32), device.zeros(5, np.float64)
    arguments = [device.buffer(x), x.size, norm, ticket, scratch]
    module = nvcc("reduce", "sm_80")
    module.launch("norm_final", 5, 64, arguments, device, 64 * 8, racecheck=True, seed=seed, max_lanes=128)
    assert norm.array[0] == f32(math.sqrt(x.astype(np.float64).sum()))
    assert ticket.array[0] == 0


def test_too_little_dynamic_shared_memory_is_found(nvcc):
    """The host has to ask for what the kernel indexes."""
    arguments = [np.zeros(8, f32), 8, np.zeros(1, f32), np.zeros(1, np.uint32), np.zeros(5)]
    with pytest.raises(PTXError, match="out-of-bounds st of 8 bytes at shared"):
        nvcc("reduce", "sm_80").launch("norm_final", 5, 64, arguments, shared_bytes=63 * 8)


def test_cub(nvcc):
    """Library code, deeply inlined."""
    x, out = np.random.default_rng(12).standard_normal(5000).astype(f32), np.zeros(5, f32)
    nvcc("cub_sum", "sm_80").launch("sum_of_squares", 5, 256, [x, out, 5000], racecheck=True)
    assert out.sum() == pytest.approx(sum_of_squares(x), rel=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_triton_sum(triton, arch):
    """Triton reduces by shuffles of its own, and keeps the scratch memory of a block in dynamic shared memory."""
    module, shared_bytes = triton("sum_of_squares", arch)
    x, device = np.random.default_rng(4).standard_normal(5000).astype(f32), Device()
    out = device.zeros(1, f32)
    arguments = [device.buffer(x), out, x.size]
    module.launch("sum_of_squares", 5, 128, arguments, device, shared_bytes, pad_args=True, racecheck=True)
    assert out.array[0] == pytest.approx(sum_of_squares(x), rel=1e-5)


def test_almost_every_mutant_is_noticed(ptx_of):
    """Lost barriers and shuffles over the wrong distance as well as wrong arithmetic."""

    def check(module):
        for n, grid, block in ((5000, 2, 128), (777, 1, 1024)):
            x = np.random.default_rng(1).standard_normal(n).astype(f32)
            for infinite_at in (None, 3, 300, 500, 700, n - 1):
                if infinite_at is not None:
                    x = np.ones(n, f32)
                    x[infinite_at] = -np.inf
                device = Device()
                buffer, out, flag = device.buffer(x), device.zeros(1, f32), device.zeros(1, np.int32)
                options = {"track": True, "racecheck": True, "max_steps": 3000}
                module.launch("sumsq", grid, block, [buffer, n, out, flag], device, **options)
                assert out.array[0] == pytest.approx(sum_of_squares(x), rel=1e-5)
                assert flag.array[0] == (infinite_at is not None)
                assert (buffer.reads == 1).all()

    text = ptx_of("reduce", "sm_80")
    missed = survivors(text, "sumsq", check)
    # What is left chooses between ways to the same result, as between division in 64 and in 32 bits.
    assert len(missed) <= 0.15 * len(list(mutants(text, "sumsq"))), missed
