"""The CUDA kernels against the CPU's, bit for bit, with nothing but torch: for tests/test_cuda_gpu.py, and for machines
without pytest, past whose absence the tests' option table is imported."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from maxva_kernels import LaMAdam, MAdam

TESTS = Path(__file__).resolve().parents[2] / "tests"

Algorithm = type[MAdam | LaMAdam]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64)
# Of parameters, gradients and state; None: the arithmetic's.
Kind = tuple[torch.dtype, torch.dtype, torch.dtype | None]
KINDS: list[Kind] = [(param, grad, None) for param in DTYPES for grad in DTYPES]
KINDS += [(param, grad, torch.bfloat16) for param in FLOATS for grad in DTYPES]

# Around what a block takes at a time, behind the sizes of tests/cases.py.
MORE_SIZES = (8191, 8192, 8193, 20_011)


def cases() -> types.ModuleType:
    """tests/cases.py, whether there is pytest or not."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    try:
        import pytest  # noqa: F401
    except ImportError:
        sys.modules["pytest"] = _NoPytest("pytest")
    return importlib.import_module("cases")


class _NoPytest(types.ModuleType):
    """For modules that only decorate with it: every attribute is a decorator, or makes one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Anything:
    def __getattr__(self, name: str) -> _Anything:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


def differences(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> list[str]:
    """Parameters and states that differ in any bit; NaN equals NaN."""
    left, right = (dict(cases().states(optimizer)) for optimizer in (ours, theirs))
    if left.keys() != right.keys():
        return [f"one has, the other has not: {sorted(left.keys() ^ right.keys())}"]
    return [text for name in left for text in tensor_differences(name, left[name], right[name])]


def tensor_differences(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return [f"{name}: {ours.dtype} {list(ours.shape)} and {theirs.dtype} {list(theirs.shape)}"]
    differ = (_bits(ours) != _bits(theirs)).flatten()
    if not differ.any():
        return []
    first = int(differ.nonzero()[0])
    values = f"{ours.flatten()[first].item()!r} and {theirs.flatten()[first].item()!r}"
    return [f"{name}: {int(differ.sum())} of {len(differ)} elements, the first at {first}: {values}"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, which tells 0 from -0, with one kind of NaN."""
    if not tensor.is_floating_point():
        return tensor
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integers)


def twins(
    algorithm: Algorithm,
    device: torch.device,
    backend: str,
    sizes: Sequence[Any],
    dtype: torch.dtype,
    **options: Any,
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """The same optimizer twice: by `backend` on `device`, and by the CPU kernels."""
    make = cases().make_params
    options = {**cases().BASE, **options}
    return (
        algorithm(make(sizes, dtype, device), backend=backend, **options),
        algorithm(make(sizes, dtype), backend="cpu", **options),
    )


def check(
    algorithm: Algorithm,
    option: str,
    param: torch.dtype,
    grad: torch.dtype,
    state: torch.dtype | None,
    device: torch.device,
    backend: str = "cuda",
    sizes: Sequence[Any] | None = None,
    steps: int = 4,
) -> list[str]:
    """Some steps of an entry of the option table; what differs after any of them."""
    table = cases()
    sizes = (*table.SIZES, *MORE_SIZES) if sizes is None else sizes
    pair = twins(algorithm, device, backend, sizes, param, **options_named(option), state_dtype=state)
    for step in range(steps):
        for optimizer in pair:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            table.set_grads(params, step, dtype=grad)
            optimizer.step()
        if found := differences(*pair):
            kind = f"{param} with {grad}" + (f" and state in {state}" if state else "")
            return [f"{algorithm.__name__}, {option}, {kind}, step {step}: {text}" for text in found]
    return []


def variants(few: bool = False) -> Iterator[tuple[Algorithm, str, torch.dtype, torch.dtype, torch.dtype | None]]:
    """Every algorithm with every dtype of parameter, gradient and state, in the options that are to be tried with them:
    the first arguments of `check`."""
    for algorithm in (MAdam, LaMAdam):
        for kind in (KINDS[0], KINDS[-1]) if few else KINDS:
            for option in ("all",) if few else options_of(kind):
                yield algorithm, option, *kind


def options_of(kind: Kind) -> list[str]:
    """All options where parameter and gradient have one dtype; for others, which differ in loads and stores, some."""
    options = list(cases().OPTIONS) if kind[0] == kind[1] else ["base", "all"]
    return options + (list(cases().BFLOAT16_OPTIONS) if kind[0] == torch.bfloat16 else [])


def options_named(option: str) -> dict[str, Any]:
    return (cases().OPTIONS | cases().BFLOAT16_OPTIONS)[option]
