"""The sums of squares that the GPU kernels of the norm leave for each chunk, by the rule of csrc/norm.h to the bit.

The norm alone would hide much: it rounds away the smaller sums, and values of one order may often be added in any order
without a difference.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DTYPES, bits
from simulated import Simulation
from twins import at_offset

from maxva_kernels import gpu
from maxva_kernels.launch import DTYPE_CODES, NormLaunch
from maxva_kernels.tensor_table import make_norm_table

LANES, CHUNK = 1024, 16 * 1024
SIZES = (0, 1, 4 * LANES + 3, CHUNK - 1, CHUNK + 7, 2 * CHUNK - 5)
RAGGED = tuple(turn * LANES + 8 + left for turn in range(4) for left in range(8))  # ends at each place of a packet
SCALE = {torch.float32: (44, 84), torch.float64: (400, 560)}  # exponents: of what is large or small, and of its factor
EXPONENTS = {
    torch.float32: {"medium": (-12, 4), "large": (44, 56), "small": (-56, -44), "all": (-148, 128)},
    torch.bfloat16: {"medium": (-12, 4), "large": (44, 56), "small": (-56, -44), "all": (-132, 128)},
    torch.float16: {"medium": (-12, 4), "all": (-24, 16)},
    torch.float64: {"medium": (-12, 4), "large": (400, 412), "small": (-412, -400), "all": (-1070, 1024)},
}
# float64 sums are for calls that have some float64 gradient.
KERNELS = [(dtype, twice) for dtype in DTYPES for twice in (False, True) if twice or dtype != torch.float64]
VARIANTS = [(*kernel, orders) for kernel in KERNELS for orders in EXPONENTS[kernel[0]]]


def sums_by_the_rule(chunk: torch.Tensor) -> torch.Tensor:
    """Large, medium and small: each lane in order, then lanes pairwise."""
    border, factor = SCALE[chunk.dtype]
    size = chunk.abs().numpy()
    large, small = size >= 2.0**border, size < 2.0**-border
    parts = (
        np.where(large, size * 2.0**-factor, 0),
        np.where(large | small, 0, size),
        np.where(small, size * 2.0**factor, 0),
    )
    sums = []
    for part in parts:
        lanes = np.zeros(LANES, size.dtype)
        for start in range(0, len(part), LANES):
            row = part[start : start + LANES].astype(size.dtype)
            lanes[: len(row)] += row * row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        sums.append(lanes[0])
    return torch.tensor(np.array(sums))


def draw(numel: int, dtype: torch.dtype, orders: str, generator: torch.Generator) -> torch.Tensor:
    """Values of so many orders that a few are the whole sum, or of so few that every bit of each counts."""
    first, last = EXPONENTS[dtype][orders]
    exponents = torch.randint(first, last, (numel,), generator=generator)
    drawn = torch.randn(numel, generator=generator, dtype=torch.float64) * 2.0**exponents
    border = 400 if dtype == torch.float64 else 44
    for exponent in (-border, border) if orders == "all" and dtype != torch.float16 else ():
        for factor in (1.0, -1.0, 1 + 2.0**-7, 1 - 2.0**-8, 1.5, 0.75):
            drawn[torch.rand(numel, generator=generator) < 0.02] = factor * 2.0**exponent
    return drawn.to(dtype)


def assert_sums_follow_the_rule(launcher: Simulation, grads: list[torch.Tensor], twice: bool) -> None:
    """Of gradients of one dtype, launched together; twice: in float64."""
    dtype, wide = grads[0].dtype, torch.float64 if twice else torch.float32
    table = make_norm_table(grads, CHUNK, launcher.MAX_TENSORS)
    ((_, segment),) = table.segments
    sums = torch.full((table.chunks, 3), torch.nan, dtype=wide)
    addresses = gpu._addresses([grads[i] for i in segment.tensors], dtype, lambda: None)
    where = (segment.rows, segment.chunk_rows, segment.chunks, addresses, sums.data_ptr())
    launcher.norm_chunks(NormLaunch(0, 0, DTYPE_CODES[dtype], twice, *where))
    chunks = [chunk.to(wide) for grad in grads if grad.numel() for chunk in grad.split(CHUNK)]
    with np.errstate(all="ignore"):
        expected = torch.stack([sums_by_the_rule(chunk) for chunk in chunks])
    assert torch.equal(bits(sums), bits(expected))


@pytest.mark.parametrize(("dtype", "twice", "orders"), VARIANTS, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_sums_follow_the_rule(offset, dtype, twice, orders, simulated):
    """Guards the choice among the three sums, the order of additions within each, and elements that are not there and
    must add nothing, not even a subnormal number."""
    simulated.blocks = 32
    generator = torch.Generator().manual_seed(0)
    grads = [at_offset(draw(size, dtype, orders, generator), offset) for size in SIZES + RAGGED]
    assert_sums_follow_the_rule(simulated, grads, twice)


UNUSUAL = {
    torch.float32: (2.0**-44, (1 - 2.0**-24) * 2.0**-44, 2.0**-149, (1 - 2.0**-24) * 2.0**44, 2.0**44, 1e38, torch.inf),
    torch.bfloat16: (2.0**-44, (1 - 2.0**-8) * 2.0**-44, 2.0**-133, (1 - 2.0**-8) * 2.0**44, 2.0**44, 1e38, torch.inf),
    torch.float16: (2.0**-24, 65504.0, torch.inf),
}


@pytest.mark.parametrize("usual", [0.0, 1.0])
@pytest.mark.parametrize("dtype", UNUSUAL, ids=str)
def test_one_unusual_element(dtype, usual, simulated):
    """Guards the shortcut where all elements go to the medium sum: against one that does not, whichever thread and
    packet has it, on both sides of both borders, and against zeros of either sign that pass for small ones."""
    simulated.blocks = 32
    places = (0, 5, LANES + 3, CHUNK - 1, CHUNK - 1 - LANES)
    for unusual in UNUSUAL[dtype]:
        grads = [torch.full((CHUNK,), usual, dtype=dtype) for _ in places]
        for place, grad in zip(places, grads, strict=True):
            grad[1::2] *= -1
            grad[place] = -unusual
        assert_sums_follow_the_rule(simulated, grads, False)
