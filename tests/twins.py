"""An optimizer on a simulated GPU and its twin, which steps by the CPU kernels: the two must agree bit for bit."""

from __future__ import annotations

import copy

import torch
from cases import assert_same_bits, set_grads


def at_offset(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """A copy that begins so many elements behind where packets begin, as a view of a flat buffer may."""
    flat = tensor.new_zeros(elements + tensor.numel())
    assert flat.data_ptr() % 16 == 0
    return flat[elements:].copy_(tensor.detach())


def move(param: torch.nn.Parameter, state: dict[str, torch.Tensor], offsets: dict[str, int]) -> None:
    """Has a parameter, its gradient and its state begin at these offsets; names as in `Launch.buffers`."""
    param.data = at_offset(param.data, offsets.get("param", 0))
    param.grad = at_offset(param.grad, offsets.get("grad", 0))
    for name, value in state.items():
        if name != "step":
            state[name] = at_offset(value, offsets.get(name, 0))


def with_twin(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """An optimizer, and a copy of it that steps by the CPU kernels."""
    twin = copy.deepcopy(optimizer)
    twin.backend = "cpu"
    return optimizer, twin


def step_both(
    pair: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    step: int = 0,
    dtype: torch.dtype | None = None,
    offsets: list[dict[str, int]] | None = None,
) -> None:
    """One step of both; the first one's tensors begin at these offsets. The results must be identical."""
    for optimizer in pair:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        set_grads(params, step, dtype=dtype)
        if offsets is not None and optimizer is pair[0]:
            for param, its_offsets in zip(params, offsets, strict=True):
                move(param, optimizer.state[param], its_offsets)
        optimizer.step()
    assert_same_bits(*pair)
