"""The optimizers that take turns: ours by each backend that can run, torch's AdamW, others where they are installed.

Tensors are made on the device, for each contender its own. Variants of one algorithm share theirs: each moves all of
them in every step, and they are larger than the L2, or the stage says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from stepbench import contenders as shared
from stepbench.contenders import (
    ADAMW,
    OPTIONS,
    OTHERS,
    PLAIN,
    TORCHS,
    Contender,
    Missing,
    bandwidths,
    bytes_of,
    first_step,
    make_params,
    saturate,
    traffic,
)

from gpu_check.table import COPY, UPDATE
from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.backends import registry

__all__ = ["ADAMW", "COPY", "OPTIONS", "UPDATE", "Contender", "bandwidths", "bytes_of", "make_params"]


def ours(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, *, reference: bool
) -> list[Contender]:
    """MAdam and LaMAdam by every GPU backend that can run, each with and without clipping, with state in 16 bits, and
    with what keeps the updates of bfloat16 parameters; MAdam with w at 1; and the eager reference."""
    contenders = []
    backends = [name for name in ("cuda", "triton") if registry.why_not(name, device) is None]
    narrow: dict[str, dict[str, Any]] = {"bfloat16 state": {"state_dtype": torch.bfloat16}}
    if dtype == torch.bfloat16:
        narrow |= {"master weights": {"master_weights": True}, "stochastic rounding": {"stochastic_rounding": True}}
    variants = list(itertools.product((MAdam, LaMAdam), [("", {}), *narrow.items()]))
    variants += [(MAdam, ("saturated", {})), (MAdam, ("bfloat16 state, saturated", narrow["bfloat16 state"]))]
    for algorithm, (kind, extra) in variants:
        params = make_params(shapes, dtype, device)
        optimizer = algorithm(params, **OPTIONS, **extra)

        def step(backend: str, max_grad_norm: float | None, optimizer: Any = optimizer) -> None:
            optimizer.backend, optimizer.max_grad_norm = backend, max_grad_norm
            optimizer.step()

        first_step(params, partial(step, backends[0], None))
        moved, tensors = traffic(params, optimizer)
        if "saturated" in kind:
            moved -= saturate(optimizer)
        grads = bytes_of([param.grad for param in params if param.grad is not None])
        clips: dict[str, float | None] = {f", {kind}": None} if kind else {"": None, ", clipped": 1.0}
        for backend in backends:
            name = algorithm.__name__ + (f" ({backend})" if len(backends) > 1 else "")
            for suffix, clip in clips.items():
                bytes_moved = moved + (grads if clip else 0)
                contenders.append(Contender(name + suffix, partial(step, backend, clip), bytes_moved, tensors=tensors))
        if reference and algorithm is MAdam and not kind:
            eager = partial(step, "reference", None)
            contenders.append(Contender("MAdam (reference, eager)", eager, None, slow=True, tensors=tensors))
    return contenders


def torchs(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """torch.optim.AdamW."""
    return [shared.torchs(name, [make_params(shapes, dtype, device)]) for name in TORCHS]


def others(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, lacks: Callable[[str], None]
) -> list[Contender]:
    """Other packages' fused AdamWs with a state of full precision; says of each that cannot run why."""
    contenders = []
    for name in (name for name, other in OTHERS.items() if not other.quantized):
        try:
            contenders.append(shared.others(name, lambda: [make_params(shapes, dtype, device)], device, PLAIN))
        except Missing as missing:
            lacks(f"{name}: {missing}")
    return contenders
