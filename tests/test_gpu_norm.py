"""The GPU kernels of the gradient norm, as nvcc and Triton compiled them, in a simulated memory: the CPU's bits, each
gradient read once."""

from __future__ import annotations

import itertools
from array import array

import pytest
import torch
from cases import DTYPES, bits, make_params, needs_cpu_kernels
from simulated import Simulation
from twins import at_offset

from maxva_kernels import functional
from maxva_kernels.launch import DTYPE_CODES, NormLaunch, TotalLaunch

pytestmark = needs_cpu_kernels

LANES, CHUNK = 1024, 16 * 1024
EDGES = (0, 1, 7, LANES - 1, LANES, LANES + 1, 4 * LANES - 1, 4 * LANES + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


def values(sizes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [param.detach() for param in make_params(sizes, dtype)]


def assert_cpus_bits(launcher: Simulation, grads: list[torch.Tensor]) -> torch.Tensor:
    """The norm, which is that of the CPU kernel bit for bit."""
    norm, expected = (functional.grad_norm(grads, backend=backend) for backend in (launcher.backend, "cpu"))
    assert norm.dtype == expected.dtype
    assert torch.equal(bits(norm), bits(expected)), (norm, expected)
    return norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_has_the_cpus_bits(dtype, simulated):
    """Guards the order of additions at the edges of lanes, turns and chunks."""
    simulated.blocks = 16
    assert simulated.NORM_CHUNK == CHUNK
    assert_cpus_bits(simulated, values(EDGES, dtype))
    for size in (*EDGES[:6], CHUNK + 1):
        assert_cpus_bits(simulated, values((size,), dtype))


def test_mixed_dtypes(simulated):
    """Guards the places of the chunks' sums, which stand in the order of the tensors whatever their dtypes."""
    simulated.blocks = 16
    three = [grad for dtype in DTYPES[:3] for grad in values((5, CHUNK + 3, 0, 2000), dtype)]
    shuffled = [three[i] for i in torch.randperm(len(three), generator=torch.Generator().manual_seed(0))]
    for grads in (three, shuffled):
        assert assert_cpus_bits(simulated, grads).dtype == torch.float32
    assert len(simulated.launches) == 2 * (3 + 1)
    doubles = [values((700,), torch.float64)[0], *shuffled, values((CHUNK + 1,), torch.float64)[0]]
    assert assert_cpus_bits(simulated, doubles).dtype == torch.float64
    if simulated.backend == "cuda":
        assert {launch.kernel.split("<")[1][:6] for launch in simulated.launches[8:]} == {"double"}


def test_same_sizes_of_other_dtypes(simulated):
    """Guards against a table of gradients that had these sizes and other dtypes."""
    for dtypes in itertools.product(DTYPES, repeat=2):
        assert_cpus_bits(simulated, [values((700,), dtype)[0] for dtype in dtypes])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_double", [False, True])
def test_misaligned(with_double, dtype, simulated):
    """Guards the path without packets (4, 8, 12 bytes behind one; 2 and 6 for 16 bits), whose lanes lie otherwise."""
    simulated.blocks = 32
    sizes = (1, 7, LANES + 1, 4 * LANES + 3, CHUNK - 1, CHUNK + 1)
    grads = [at_offset(grad, offset) for offset in (1, 2, 3) for grad in values(sizes, dtype)]
    grads += values((5,), torch.float64) if with_double else []
    assert_cpus_bits(simulated, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares_neither_overflow_nor_vanish(dtype, simulated):
    """Guards the three sums and their borders: powers of two around them, and all magnitudes in one gradient."""
    unit = values((3000,), torch.float64)[0]
    exponents = range(-1060, 1020, 90) if dtype == torch.float64 else range(-148, 127, 20)
    borders = [401, 400, 399, -399, -400, -401] if dtype == torch.float64 else [45, 44, 43, -43, -44, -45]
    scaled = [(unit * 2.0**exponent).to(dtype) for exponent in exponents]
    at_borders = [torch.tensor([1.0, -1.0, 1 + 2**-23, 1 - 2**-24]).double() * 2.0**exponent for exponent in borders]
    for grads in ([scaled[0]], [scaled[-1]], [scaled[1], scaled[2]], [torch.cat(scaled)], scaled):
        assert_cpus_bits(simulated, grads)
    for border in at_borders:
        assert_cpus_bits(simulated, [border.to(dtype)])
    assert_cpus_bits(simulated, [torch.cat(at_borders).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, simulated):
    """Guards the sum that a NaN and an infinity go to, in the first and the second stage."""
    for special in (torch.nan, torch.inf, -torch.inf):
        for other in (0.0, 2.0**-20, 1.0):
            grads = [torch.full((size,), other, dtype=dtype) for size in (3, 2000)]
            grads[1][1500] = special
            norm = assert_cpus_bits(simulated, grads)
            assert norm.isnan() if special != special else norm == torch.inf
    both = torch.tensor([torch.inf, torch.nan], dtype=dtype)
    assert_cpus_bits(simulated, [both])
    assert_cpus_bits(simulated, [both[:1], both[1:]])
    assert assert_cpus_bits(simulated, [torch.zeros(3, dtype=dtype)]) == 0


def test_nothing_to_add(simulated):
    """Guards launches without a chunk."""
    for grads in ([torch.zeros(0)], [torch.zeros(0), torch.zeros(0, dtype=torch.float64)]):
        assert assert_cpus_bits(simulated, grads) == 0


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_any_number_and_order_of_blocks(blocks, seed, simulate):
    """Guards against sums whose order or place depends on which block makes them, and lanes that are used anew too
    early."""
    launcher = simulate(blocks=blocks, seed=seed)
    assert_cpus_bits(launcher, values((CHUNK + 1, 0, 5, 2 * CHUNK, 700), torch.float32) + values((9,), torch.bfloat16))


@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_100"])
def test_other_architectures(arch, simulate_cuda):
    """Guards code that depends on the architecture: nvcc makes other PTX for each."""
    launcher = simulate_cuda(arch=arch)
    for dtypes in (DTYPES[:3], DTYPES):
        assert_cpus_bits(launcher, [grad for dtype in dtypes for grad in values((5, 2000), dtype)])


def test_more_tensors_than_a_launch_takes(simulated):
    """Guards the cut into launches, and the place of each one's first sum."""
    simulated.MAX_TENSORS = 3
    assert_cpus_bits(
        simulated, [grad for dtype in DTYPES[:2] for grad in values((0, 5, CHUNK + 1, 9, 700, 0, 2 * CHUNK), dtype)]
    )
    assert [launch.kernel.split("<")[0] for launch in simulated.launches] == [
        *["norm_chunks_kernel"] * 4,
        "norm_total_kernel",
    ]


def test_more_chunks_than_lanes(simulated):
    """Guards the second stage, whose lanes add up several chunks then; and the arguments of a launch at real size."""
    simulated.blocks = 128
    grads = values((1,) * 3000, torch.float32)
    assert_cpus_bits(simulated, grads)
    assert len(simulated.launches) == (3 if simulated.backend == "cuda" else 2)


WIDTHS = [(dtype, with_double) for dtype in DTYPES for with_double in (False, True) if dtype != torch.float64]


@pytest.mark.parametrize(("dtype", "with_double"), [*WIDTHS, (torch.float64, False)], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_traffic(offset, dtype, with_double, simulate):
    """Guards against an element that counts twice or not at all but for luck, anything written besides the sums, and
    narrow loads of what lies in packets."""
    launcher = simulate(track=True, blocks=12)
    sizes = (1, 7, 8, LANES + 1, 4 * LANES + 3, CHUNK, CHUNK + 16, 2 * CHUNK + 5)
    grads = [at_offset(grad, offset) for grad in values(sizes, dtype)]
    functional.grad_norm(grads + [torch.ones(1, dtype=torch.float64)] * with_double, backend=launcher.backend)
    launch, total = launcher.launches[0], launcher.launches[-1]
    assert len(launch.buffers_of("grad")) == len(launch.buffers_of("sums")) == len(sizes)
    for buffer in launch.buffers_of("grad"):
        assert (buffer.reads == 1).all(), buffer
    for buffer in [*launch.buffers_of("sums"), total.buffers["norm"]]:
        assert (buffer.writes == 1).all(), buffer
        assert not buffer.reads.any(), buffer
    assert {name.rstrip("0123456789") for name, kind in launch.stats.buffer_bytes if kind != "ld"} == {"sums"}
    assert {name for name, kind in total.stats.buffer_bytes if kind != "ld"} == {"norm"}
    assert (total.buffers["sums"].reads == 1).all()

    if launcher.backend == "triton":  # whole chunks move in packets
        whole = 0 if offset else sum(size // CHUNK for size in sizes) * CHUNK
        assert launch.stats.widths("ld").get(16, 0) == whole * dtype.itemsize // 16
        return
    # A chunk begins with a packet, or none does.
    width = 16 // dtype.itemsize
    packets = 0 if offset else sum(size // width for size in sizes)
    loads = launch.stats.widths("ld")
    loads[8] -= launch.bytes_of("ld", "rows") // 8
    loads[4] -= launch.bytes_of("ld", "chunk_rows") // 4
    assert loads.get(16, 0) == packets
    assert loads[dtype.itemsize] == sum(sizes) - packets * width
    assert sum(loads.values()) == packets + sum(sizes) - packets * width


@pytest.mark.parametrize("numel", [2**31 + 100, 2**32 - 1, 2**33 + 5000])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indices_beyond_32_bits(dtype, offset, chunks, numel, simulated):
    """Guards the arithmetic of indices and addresses: the last chunks of a gradient that is larger than memory, of
    which no more than them is there. Its row says that its chunks and their sums began long before."""
    before = -(-numel // CHUNK) - chunks
    start = before * CHUNK
    far = at_offset(values((numel - start,), dtype)[0], offset)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums, norm = torch.full((chunks, 3), torch.nan, dtype=wide), torch.empty((), dtype=wide)
    simulated.only = {
        "grad0": (far.data_ptr(), far.nbytes),
        "sums0": (sums.data_ptr(), sums.nbytes),
    }
    row, chunk_rows = torch.tensor([numel, -before, -before]), torch.zeros(chunks, dtype=torch.int32)
    address = array("Q", [(far.data_ptr() - start * far.element_size()) % 2**64]).tobytes()
    double = wide == torch.float64
    cut = (row.data_ptr(), chunk_rows.data_ptr(), chunks)
    simulated.norm_chunks(NormLaunch(0, 0, DTYPE_CODES[dtype], double, *cut, address, sums.data_ptr()))
    simulated.norm_total(TotalLaunch(0, 0, double, sums.data_ptr(), chunks, norm.data_ptr()))
    assert torch.equal(norm, functional.grad_norm([far], backend="cpu"))
