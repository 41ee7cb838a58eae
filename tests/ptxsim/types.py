"""The types of PTX: their width, and the numpy type that holds their values."""

from typing import Any

import numpy as np

WARP = 32

# Bits of a value of each type.
BITS: dict[str, int] = {"pred": 1, "bf16": 16, "tf32": 32, "f16x2": 32, "bf16x2": 32, "f32x2": 64}

# numpy has no bfloat16 and no packed pairs: those travel as raw unsigned integers.
NUMPY: dict[str, Any] = {
    "pred": np.bool_,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "tf32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "f32x2": np.uint64,
}

# The unsigned integer of a number of bits: what registers and memory are made of.
UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}

for _bits in (8, 16, 32, 64):
    for _kind in "usbf":
        BITS[f"{_kind}{_bits}"] = _bits
    NUMPY[f"u{_bits}"] = NUMPY[f"b{_bits}"] = UNSIGNED[_bits]
    NUMPY[f"s{_bits}"] = getattr(np, f"int{_bits}")

TYPES = frozenset(NUMPY)
FLOATS = frozenset({"f16", "bf16", "f32", "f64"})
HALVES = frozenset({"f16", "bf16"})
PACKED_HALVES = frozenset({"f16x2", "bf16x2"})


def register_bits(type_name: str) -> int:
    """Bits of the array that holds a register of a type: an 8-bit register takes 16."""
    return max(BITS[type_name], 16)


def as_type(bits: int, type_name: str) -> Any:
    """The numpy scalar of a type that has these bits."""
    width = BITS[type_name]
    return np.array(bits & ((1 << width) - 1), UNSIGNED[width]).view(NUMPY[type_name])[()]
