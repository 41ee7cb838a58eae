"""Special registers: %tid.x and the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import Unsupported
from .types import WARP

_LANE_MASKS: dict[str, Callable[[Any], Any]] = {
    "lanemask_eq": lambda own: own,
    "lanemask_lt": lambda own: own - np.uint64(1),
    "lanemask_le": lambda own: own | (own - np.uint64(1)),
    "lanemask_gt": lambda own: ~(own | (own - np.uint64(1))),
    "lanemask_ge": lambda own: ~(own - np.uint64(1)),
}

_SCALARS: dict[str, Callable[[Any], int]] = {
    "nwarpid": lambda wave: wave.launch.lanes_per_block // WARP,
    "dynamic_smem_size": lambda wave: wave.launch.dynamic_shared_bytes,
    "total_smem_size": lambda wave: wave.launch.shared_bytes,
    "smid": lambda wave: 0,
    "gridid": lambda wave: 0,
    "nsmid": lambda wave: 1,
    # Time goes on by one with every instruction of a thread.
    "clock": lambda wave: int(wave.stats.counts.sum()),
    "clock_hi": lambda wave: int(wave.stats.counts.sum()) >> 32,
    "clock64": lambda wave: int(wave.stats.counts.sum()),
    "globaltimer": lambda wave: int(wave.stats.counts.sum()),
}


def coordinate(index: Any, extent: tuple[int, int, int], axis: int) -> Any:
    """One coordinate of a linear index."""
    if axis == 0:
        return index % extent[0]
    if axis == 1:
        return index // extent[0] % extent[1]
    return index // (extent[0] * extent[1])


def special_register(name: str) -> Callable[[Any, Any], Any]:
    """A function (wave, lanes) -> values of a special register, as unsigned integers or a scalar."""
    base, _, axis_name = name.partition(".")
    if axis_name in ("x", "y", "z"):
        axis = "xyz".index(axis_name)
        if base == "tid":
            return lambda wave, lanes: coordinate(_thread(wave, lanes), wave.launch.block, axis)
        if base == "ctaid":
            return lambda wave, lanes: coordinate(_block(wave, lanes), wave.launch.grid, axis)
        if base == "ntid":
            return lambda wave, lanes: np.uint32(wave.launch.block[axis])
        if base == "nctaid":
            return lambda wave, lanes: np.uint32(wave.launch.grid[axis])
    elif name == "laneid":
        return lambda wave, lanes: _thread(wave, lanes) % WARP
    elif name == "warpid":
        return lambda wave, lanes: _thread(wave, lanes) // WARP
    elif name in _LANE_MASKS:
        mask = _LANE_MASKS[name]
        return lambda wave, lanes: mask(np.uint64(1) << (_thread(wave, lanes) % WARP).astype(np.uint64))
    elif name in _SCALARS:
        scalar = _SCALARS[name]
        return lambda wave, lanes: np.uint64(scalar(wave))
    raise Unsupported(f"special register %{name}")


def _thread(wave: Any, lanes: Any) -> Any:
    return wave.thread if lanes is None else wave.thread[lanes]


def _block(wave: Any, lanes: Any) -> Any:
    block = wave.block_of_lane if lanes is None else wave.block_of_lane[lanes]
    return wave.blocks[block]
