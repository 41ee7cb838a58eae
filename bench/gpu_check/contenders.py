"""The optimizers that take turns: ours by each backend that can run, torch's AdamW, others where they are installed.

Tensors are made on the device. A contender's step is all that it has to do for an update; those that clip have the norm
of all gradients to find as well. Variants of one algorithm share their tensors: each moves all of them in every step,
and they are larger than the L2, or the stage says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from step import OPTIONS, bytes_of, make_params, traffic

from gpu_check.table import COPY, UPDATE
from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.backends import registry

ADAMW = "AdamW (torch, fused)"  # what the others are compared with


@dataclass
class Contender:
    name: str
    step: Callable[[], object]
    bytes: int | None  # moved by a step if every operand crosses the memory bus once each way it must; None: more
    slow: bool = False  # eager code, of which a few steps are enough
    tensors: int = 0  # bytes of all its tensors together


def ours(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, *, reference: bool
) -> list[Contender]:
    """MAdam and LaMAdam by every GPU backend that can run, each with and without clipping; and the eager reference."""
    contenders = []
    backends = [name for name in ("cuda", "triton") if registry.why_not(name, device) is None]
    for algorithm in (MAdam, LaMAdam):
        params = make_params(shapes, dtype, device)
        optimizer = algorithm(params, **OPTIONS)

        def step(backend: str, max_grad_norm: float | None, optimizer: Any = optimizer) -> None:
            optimizer.backend, optimizer.max_grad_norm = backend, max_grad_norm
            optimizer.step()

        step(backends[0], None)
        moved, tensors = traffic(params, optimizer)
        grads = bytes_of([param.grad for param in params])
        for backend in backends:
            name = algorithm.__name__ + (f" ({backend})" if len(backends) > 1 else "")
            plain, clipped = (lambda b=backend, c=clip, step=step: step(b, c) for clip in (None, 1.0))
            contenders.append(Contender(name, plain, moved, tensors=tensors))
            contenders.append(Contender(f"{name}, clipped", clipped, moved + grads, tensors=tensors))
        if reference and algorithm is MAdam:
            eager = lambda step=step: step("reference", None)  # noqa: E731
            contenders.append(Contender("MAdam (reference, eager)", eager, None, slow=True, tensors=tensors))
    return contenders


def torchs(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """torch.optim.AdamW, whose state has the parameters' dtype."""
    return [
        _of(name, lambda params, way=way: torch.optim.AdamW(params, **OPTIONS, **{way: True}), shapes, dtype, device)
        for name, way in ((ADAMW, "fused"), ("AdamW (torch, foreach)", "foreach"))
    ]


# The package, where in it, and with which arguments; what cannot be imported is left out.
OTHERS = {
    "AdamW (apex)": ("apex.optimizers", "FusedAdam", {"adam_w_mode": True}),
    "AdamW (TransformerEngine)": ("transformer_engine.pytorch.optimizers", "FusedAdam", {"adam_w_mode": True}),
    "AdamW (bitsandbytes, 32 bits)": ("bitsandbytes.optim", "AdamW32bit", {}),
}


def others(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, lacks: Callable[[str], None]
) -> list[Contender]:
    """Fused AdamWs of other packages; says of each that cannot run why."""
    contenders = []
    for name, (module, cls, extra) in OTHERS.items():
        try:
            make = getattr(importlib.import_module(module), cls)
            build = lambda params, make=make, extra=extra: make(params, **OPTIONS, **extra)  # noqa: E731
            contenders.append(_of(name, build, shapes, dtype, device))
        except Exception as error:  # whatever a foreign package raises
            lacks(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    return contenders


def bandwidths(size: int, device: torch.device) -> list[Contender]:
    """The floors: a copy between two buffers of so many bytes, and in-place updates of six with as much in all."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    arrays = [torch.ones(max(1, size // 12), device=device) for _ in range(6)]
    return [
        Contender(COPY, lambda: target.copy_(source), 2 * bytes_of([source]), tensors=2 * bytes_of([source])),
        Contender(UPDATE, lambda: torch._foreach_mul_(arrays, -1.0), 2 * bytes_of(arrays), tensors=bytes_of(arrays)),
    ]


def _of(
    name: str,
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> Contender:
    params = make_params(shapes, dtype, device)
    optimizer = make(params)
    optimizer.step()
    moved, tensors = traffic(params, optimizer)
    return Contender(name, optimizer.step, moved, tensors=tensors)
