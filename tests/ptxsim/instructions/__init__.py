"""The instructions: each module compiles those of one kind."""

from . import atomics, bits, compare, control, convert, floats, integers, loads, matrix, warp  # noqa: F401 - they register
from .registry import compile_kernel

__all__ = ["compile_kernel"]
