"""The paper's lines in float32, as a user of plain PyTorch would have them: eager, and through torch.compile.

They keep u~, v~ and w as the paper does, and are inaccurate in float32: see bench/accuracy.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence

import torch

from maxva_kernels import reference
from maxva_kernels.groups import Hyperparameters
from stepbench.contenders import (
    OPTIONS,
    PLAIN,
    Contender,
    Missing,
    Options,
    Params,
    bytes_of,
    clipping_bytes,
    first_step,
)

EAGER, COMPILED = "MAdam (paper, eager)", "MAdam (paper, torch.compile)"
COMPILER = "inductor"

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # one kernel needs no pool of processes


def eager(sets: Sequence[Params], options: Options = PLAIN) -> Contender:
    contender = _contender(EAGER, _update(options), sets, options)
    contender.bytes, contender.slow = None, True  # temporaries are most of what it moves
    return contender


def compiled(sets: Sequence[Params], options: Options = PLAIN, backend: str | None = None) -> Contender:
    """One graph serves all shapes, since it is given flat views.

    Raises:
        Missing: torch.compile does not work here.
    """
    try:
        run = torch.compile(_update(options), backend=backend or COMPILER, dynamic=True)
        return _contender(COMPILED, run, sets, options)
    except Exception as error:  # whatever a compiler raises
        raise Missing(f"{type(error).__name__}: {str(error)[:300]}") from error


def _update(options: Options) -> Callable[..., None]:
    """A step on one tensor."""
    hyper = Hyperparameters(**OPTIONS, beta1=0.9, beta2_range=(0.5, 0.999), amsgrad=options.amsgrad)

    def update(theta: torch.Tensor, grad: torch.Tensor, state: list[torch.Tensor], count: torch.Tensor) -> None:
        new, after, max_denom = reference.step(
            theta.float(),
            grad.float(),
            reference.PaperState(*state[:4]),
            count,  # type: ignore[arg-type]
            hyper,
            laprop=False,
            max_denom=state[4] if options.amsgrad else None,
        )
        theta.copy_(new)
        for old, value in zip(state, after if max_denom is None else [*after, max_denom], strict=True):
            old.copy_(value)

    return update


def _contender(name: str, update: Callable[..., None], sets: Sequence[Params], options: Options) -> Contender:
    states = [[_zeros(param, 4 + options.amsgrad) for param in params] for params in sets]
    steps = [_stepper(update, params, own, options) for params, own in zip(sets, states, strict=True)]
    for params, step in zip(sets, steps, strict=True):
        first_step(params, step)
    turns = itertools.cycle(steps)
    read = bytes_of([param.grad for param in sets[0] if param.grad is not None])
    written = bytes_of([*sets[0], *(tensor for state in states[0] for tensor in state)])
    moved = 2 * written + read + (clipping_bytes(sets[0]) if options.max_grad_norm is not None else 0)
    return Contender(name, lambda: next(turns)(), moved, tensors=len(sets) * (written + read), sets=sets)


def _zeros(param: torch.nn.Parameter, count: int) -> list[torch.Tensor]:
    return [torch.zeros(param.numel(), device=param.device) for _ in range(count)]


def _stepper(
    update: Callable[..., None], params: Params, states: list[list[torch.Tensor]], options: Options
) -> Callable[[], None]:
    count = torch.zeros((), device=params[0].device)

    @torch.no_grad()
    def step() -> None:
        if options.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, options.max_grad_norm)
        count.add_(1)
        for param, state in zip(params, states, strict=True):
            update(param.detach().view(-1), param.grad.view(-1), state, count)  # type: ignore[union-attr]

    return step
