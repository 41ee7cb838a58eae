"""An optimizer on a simulated GPU and its twin, which steps by the CPU kernels: the two must agree bit for bit."""

from __future__ import annotations

import copy

import torch
from cases import set_grads, states


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
    assert_identical(*pair)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers, with one kind of NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integers) if tensor.is_floating_point() else tensor


def assert_identical(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Parameters and states have the same bits, which tells 0 from -0; NaN equals NaN."""
    left, right = dict(states(a)), dict(states(b))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        differ = bits(value.detach()) != bits(right[name].detach())
        assert not differ.any(), f"{name}: {int(differ.sum())} elements, first {int(differ.flatten().nonzero()[0])}"
