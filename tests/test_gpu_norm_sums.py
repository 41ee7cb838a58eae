"""The sums of squares that the GPU kernels of the norm leave for each chunk, by the rule of csrc/norm.h to the bit.

The norm alone would hide much: it rounds away the smaller sums, and values of one order may often be added in any order
without a difference.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DTYPES
from twins import at_offset, bits

from maxva_kernels import gpu
from maxva_kernels.tensor_table import make_norm_table

LANES, CHUNK = 1024, 16 * 1024
SIZES = (1, 5, 0, LANES + 6, 4 * LANES + 3, CHUNK - 1, CHUNK + 7)
SCALE = {torch.float32: (44, 84), torch.float64: (400, 560)}  # exponents: of what is large or small, and its factor
EXPONENTS = {  # of values in one gradient, and of those around which the sum changes
    torch.float32: (range(-148, 128), (-44, 44)),
    torch.bfloat16: (range(-132, 128), (-44, 44)),
    torch.float16: (range(-24, 16), ()),
    torch.float64: (range(-1070, 1024), (-400, 400)),
}


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


def draw(numel: int, dtype: torch.dtype, few: bool, generator: torch.Generator) -> torch.Tensor:
    """Values of all orders, of which a few are the whole sum; or of ``few`` orders, so that every bit counts."""
    every, borders = EXPONENTS[dtype]
    exponents = torch.randint(-12, 4, (numel,), generator=generator) if few else torch.tensor(every)[
        torch.randint(0, len(every), (numel,), generator=generator)
    ]  # fmt: skip
    drawn = torch.randn(numel, generator=generator, dtype=torch.float64) * 2.0**exponents
    for border in () if few else borders:
        for factor in (1.0, -1.0, 1 + 2.0**-7, 1 - 2.0**-8, 1.5, 0.75):
            drawn[torch.rand(numel, generator=generator) < 0.02] = factor * 2.0**border
    return drawn.to(dtype)


# float64 sums are for calls that have some float64 gradient.
KERNELS = [(dtype, twice) for dtype in DTYPES for twice in (False, True) if twice or dtype != torch.float64]


@pytest.mark.parametrize(("dtype", "twice"), KERNELS, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("few", [False, True])
def test_sums_follow_the_rule(few, offset, twice, dtype, simulated):
    """Guards the choice among the three sums, the order of additions within each, and elements that are not there and
    must add nothing, not even a subnormal number."""
    simulated.blocks = 8
    generator = torch.Generator().manual_seed(0)
    grads = [at_offset(draw(size, dtype, few, generator), offset) for size in SIZES]
    table = make_norm_table(grads, CHUNK, simulated.MAX_TENSORS)
    ((_, segment),) = table.segments
    wide = torch.float64 if twice else torch.float32
    sums = torch.full((table.chunks, 3), torch.nan, dtype=wide)
    addresses = gpu._addresses([grads[i] for i in segment.tensors], dtype)
    where = (segment.rows, segment.chunk_rows, segment.chunks, addresses, sums.data_ptr())
    simulated.norm_chunks(0, 0, gpu.DTYPE_CODES[dtype], twice, *where)
    chunks = [chunk.to(wide) for grad in grads if grad.numel() for chunk in grad.split(CHUNK)]
    with np.errstate(all="ignore"):
        expected = torch.stack([sums_by_the_rule(chunk) for chunk in chunks])
    assert torch.equal(bits(sums), bits(expected))
