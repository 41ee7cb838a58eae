"""What torch.compile makes of the paper's lines: nothing by hand, float32, as a user of plain PyTorch would have it."""

from __future__ import annotations

import os

import torch

from gpu_check.contenders import OPTIONS, Contender, bytes_of
from maxva_kernels import reference
from maxva_kernels.groups import Hyperparameters

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # one kernel needs no pool of processes


def contender(shape: tuple[int, ...], device: torch.device, backend: str) -> Contender:
    """MAdam on one tensor, keeping u~, v~ and w as the paper does; inaccurate in float32, see bench/accuracy.py."""
    theta, grad = torch.randn(shape, device=device), torch.randn(shape, device=device).mul_(1e-3)
    state = [torch.zeros(shape, device=device) for _ in range(4)]
    count = torch.zeros((), device=device)
    hyper = Hyperparameters(**OPTIONS, beta1=0.9, beta2_range=(0.5, 0.999))

    @torch.compile(backend=backend)
    def update(theta: torch.Tensor, grad: torch.Tensor, state: list[torch.Tensor], count: torch.Tensor) -> None:
        count.add_(1)
        new, after, _ = reference.step(
            theta,
            grad,
            reference.PaperState(*state),
            count,
            hyper,
            laprop=False,  # type: ignore[arg-type]
        )
        theta.copy_(new)
        for old, value in zip(state, after, strict=True):
            old.copy_(value)

    def step() -> None:
        with torch.no_grad():
            update(theta, grad, state, count)

    moved, tensors = 2 * bytes_of([theta, *state]) + bytes_of([grad]), bytes_of([theta, grad, *state])
    return Contender("MAdam (paper, torch.compile)", step, moved, tensors=tensors)
