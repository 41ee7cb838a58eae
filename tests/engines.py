"""A small training run under each of PyTorch's engines, for `test_distributed`: what every rank of it executes.

Of the parameters some divide unevenly over two and over three ranks, and some leave ranks without any element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from cases import no_number
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import maxva_kernels

ROWS = 12  # of a batch, over all ranks
STEPS = 6


class Model(nn.Module):
    """Nothing in it makes a gradient vanish by symmetry: then rounding alone would decide what a step does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(inputs)).sin() + 0.3)).squeeze(-1)


def make_model(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Everyone's rows; their gradients differ from step to step and are well above norm 0.1."""
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(ROWS, 7, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), (3 * inputs[:, 0] - inputs[:, 1] ** 2).to(dtype)


def loss_of(model: nn.Module, step: int, share: slice = slice(None)) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs, targets = batch(step, dtype)
    return ((model(inputs[share]) - targets[share]) ** 2).mean()


def my_rows() -> slice:
    each = ROWS // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def shard(model: nn.Module) -> nn.Module:
    """FSDP2; two units, so that there is more than one collective to be in order."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_and_replicate(model: nn.Module) -> nn.Module:
    """FSDP2 on a mesh of two dimensions, replicated along the first."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh)


def split_layers(model: nn.Module) -> nn.Module:
    """Tensor parallelism: the first layer by columns, the second by rows, and what is between them replicated."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    distribute_module(model.norm, mesh)
    plan = {
        "first": ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
        "second": RowwiseParallel(input_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def replicate(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def alone(model: nn.Module) -> nn.Module:
    return model


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


def run(
    name: str,
    wrap: Callable[[nn.Module], nn.Module],
    zero: bool = False,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Trains; the parameters in the end, and where the engine lets one see it their state, whole."""
    model = wrap(make_model(dtype))
    optimizer = make_optimizer(name, model, zero, **options)
    for step in range(steps):
        train_step(model, optimizer, step, slice(None) if wrap in (alone, split_layers) else my_rows())
    states = [] if zero else [state_of(optimizer, param) for param in model.parameters()]
    return [whole(param) for param in model.parameters()], states


def make_optimizer(name: str, model: nn.Module, zero: bool = False, **options: Any) -> torch.optim.Optimizer:
    cls = getattr(maxva_kernels, name)
    options = {"lr": 0.01, **options}
    return ZeroRedundancyOptimizer(model.parameters(), cls, **options) if zero else cls(model.parameters(), **options)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rows: slice) -> None:
    optimizer.zero_grad()
    loss_of(model, step, rows).backward()
    optimizer.step()


def state_of(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    return {name: no_number(name, whole(value)) for name, value in optimizer.state[param].items()}


def spread(tensors: list[Tensor], mesh: Any, placements: list[Any]) -> list[DTensor]:
    return [distribute_tensor(tensor, mesh, placement) for tensor, placement in zip(tensors, placements, strict=True)]
