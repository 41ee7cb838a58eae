"""Launches PTX on the GPU by the driver's own functions, with the face of the simulator's `Module`: the same text, the
same arguments, the other machine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch


class Module:
    """A PTX text, compiled by the driver for the current device."""

    def __init__(self, text: str):
        torch.zeros(1, device="cuda")  # torch's context is the current one from here on
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), ctypes.c_char_p(text.encode()))

    def launch(self, name: str, grid: int, block: int, arguments: Sequence[Any]) -> None:
        """Tensors are passed by address, ints as 32 bits."""
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module, ctypes.c_char_p(name.encode()))
        values = [
            ctypes.c_uint64(argument.data_ptr()) if isinstance(argument, torch.Tensor) else ctypes.c_int32(argument)
            for argument in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = map(ctypes.c_uint, (grid, 1, 1, block, 1, 1, 0))
        self._call("cuLaunchKernel", function, *sizes, stream, pointers, None)
        torch.cuda.synchronize()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()} ({status})")
