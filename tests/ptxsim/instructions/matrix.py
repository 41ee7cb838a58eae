"""Matrix instructions: ldmatrix alone, by which Triton passes values between the threads of a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..access import load
from ..errors import Unsupported
from ..operands import address, destination
from ..syntax import Instruction, Kind, Vector
from ..types import WARP
from .registry import Execute, instruction

ROW_BYTES = 16  # eight elements of two bytes


@instruction("ldmatrix", modifiers="sync aligned m8n8 x1 x2 x4 shared shared::cta")
def _load_matrix(each: Instruction) -> Execute:
    """Matrix j has eight rows, whose addresses lanes 8 j ... 8 j + 7 give. Of each, lane i receives four bytes of row
    i / 4: those at 4 (i % 4)."""
    count = int(each.first_of("x1", "x2", "x4")[1:])
    to = each.operands[0].items if isinstance(each.operands[0], Vector) else [each.operands[0]]
    if len(to) != count or each.type() != "b16" or not each.has("shared", "shared::cta"):
        raise Unsupported("ldmatrix variant")
    each.kind, each.members = Kind.WARP, lambda wave, lanes: np.uint32(0xFFFFFFFF)
    writes, (addresses, _) = [destination(operand, "b32") for operand in to], address(each.operands[1])

    def execute(wave: Any, compute: Any, active: Any) -> None:
        lanes = wave.lanes(active)
        if (wave.warp_bits(wave.mask(active))[lanes // WARP] != (1 << WARP) - 1).any():
            wave.fail("ldmatrix needs all threads of a warp", lanes[0])
        given = np.zeros(wave.size, np.uint64)
        given[lanes] = addresses(wave, active)
        lane = lanes % WARP
        for j, write in enumerate(writes):
            row = given[lanes - lane + 8 * j + lane // 4]
            if (row % np.uint64(ROW_BYTES)).any():
                wave.fail("ldmatrix: the address of a row is not a multiple of 16", lanes[0])
            (values,) = load(wave, "shared", row + (lane % 4 * 4).astype(np.uint64), 4, 1, active)
            write(wave, active, values)

    return execute
