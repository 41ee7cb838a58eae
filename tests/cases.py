"""The table that tests draw from: backends x algorithms x options x dtypes, and the tensors to step on.

Hyperparameters are chosen so that a mistake shows: large learning rate and eps, momentum far from 0 and 1, a decay that
matters, gradients whose mean and deviation are alike.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.backends.registry import BACKENDS, why_not

ALGORITHMS = (MAdam, LaMAdam)

BASE = {"lr": 0.1, "beta1": 0.7, "beta2_range": (0.5, 0.98), "eps": 1e-2, "weight_decay": 0.1}

# Each departs from BASE; the last one sets everything at once.
OPTIONS = {
    "base": {},
    "no_momentum": {"beta1": 0.0},
    "fixed_beta": {"beta2_range": (0.9, 0.9)},
    "upper_bound_1": {"beta2_range": (0.5, 1.0)},
    "wide_range": {"beta2_range": (0.1, 0.999)},
    "beta2_init": {"beta2_init": 0.3},
    "eps_0": {"eps": 0.0},
    "adam_eps": {"eps_mode": "adam"},
    "no_decay": {"weight_decay": 0.0},
    "l2": {"decoupled_weight_decay": False},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "clip": {"max_grad_norm": 1.0},
    "trust_ratio": {"trust_ratio": True},
    "all": {
        "amsgrad": True,
        "maximize": True,
        "decoupled_weight_decay": False,
        "eps_mode": "adam",
        "max_grad_norm": 2.0,
        "beta2_init": 0.5,
        "trust_ratio": True,
    },
}

# What is for bfloat16 parameters alone.
BFLOAT16_OPTIONS = {
    "master_weights": {"master_weights": True},
    "stochastic_rounding": {"stochastic_rounding": True},
    "all_and_master_weights": {**OPTIONS["all"], "master_weights": True},
    "all_and_stochastic_rounding": {**OPTIONS["all"], "stochastic_rounding": True},
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Nothing, one, odd, around vector widths (4 to 16), conversion blocks (512) and the norm's lanes (1024).
SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 511, 512, 513, 1023, 1025, 4097)


needs_cpu_kernels = pytest.mark.skipif(
    why_not("cpu", torch.device("cpu")) is not None, reason="the CPU kernels are not built"
)


def device_of(backend: str) -> torch.device:
    """Where a backend is tested: its own kind of device, or the CPU where that is simulated."""
    return torch.device("cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu")


def cannot_simulate(backend: str) -> str | None:
    """What is missing to run a GPU's backend without a GPU."""
    if backend == "cuda":
        return None if shutil.which("nvcc") and shutil.which("g++") else "no GPU, and no nvcc and g++ to simulate one"
    return None if importlib.util.find_spec("triton") else "no GPU, and no Triton to simulate one"


def backend_params(*, oracle: bool = True, simulate: bool = True) -> list:
    """The backends as pytest parameters; one that cannot run here is skipped with its own reason.

    With simulate=False what needs a GPU is not simulated: for runs of hundreds of steps, which would take minutes. The
    simulated kernels' bits are the CPU kernel's, step by step, in test_gpu_kernels.py.
    """
    params = []
    for name in BACKENDS:
        if name == "reference" and not oracle:
            continue
        device = device_of(name)
        marks = [pytest.mark.gpu] if device.type == "cuda" else []
        reason = why_not(name, device)
        if name in ("cuda", "triton") and device.type == "cpu":
            reason = cannot_simulate(name) if simulate else "no GPU, and too long a run to simulate one"
            marks.append(pytest.mark.simulated(name))
        if reason is not None:
            marks.append(pytest.mark.skip(reason=reason))
        params.append(pytest.param(name, marks=marks))
    return params


def make_params(
    sizes: tuple[int, ...] = SIZES,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> list[torch.nn.Parameter]:
    """Parameters of order 1, one for each size."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes)
    return [torch.nn.Parameter(value.to(device, dtype)) for value in values]


def set_grads(
    params: list[torch.nn.Parameter],
    step: int,
    *,
    mean: float = 0.3,
    scale: float = 0.5,
    dtype: torch.dtype | None = None,
) -> None:
    """Gradients of step `step`: the same values on every device and, but for rounding, in every dtype."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        noise = torch.randn(param.shape, dtype=torch.float64, generator=generator)
        param.grad = None
        param.grad_dtype = None  # whatever dtype is given
        param.grad = (scale * (mean + noise)).to(param.device, dtype or param.dtype)


def run(optimizer, first=0, last=4):
    """Steps first ... last - 1; a parameter's gradients depend on its place, so that a copy gets the same."""
    for step in range(first, last):
        set_grads(params_of(optimizer), step)
        optimizer.step()
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def through_file(value):
    """What torch.load makes of it, weights_only: a checkpoint must hold nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every entry of its state, named."""
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            yield f"params[{g}][{i}]", param.detach()
            for name, value in optimizer.state.get(param, {}).items():
                yield f"{name}[{g}][{i}]", no_number(name, value)


def no_number(name: str, value: Tensor) -> Tensor:
    """The 16 bits of a master as integers; among them are such as would be NaN."""
    return value.view(torch.int16) if name == "master" and value.dtype == torch.bfloat16 else value


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers, with one kind of NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integers) if tensor.is_floating_point() else tensor


def assert_same_bits(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Parameters and states of both have the same bits, which tells 0 from -0; NaN equals NaN."""
    left, right = dict(states(a)), dict(states(b))
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name].cpu()
        assert value.dtype == other.dtype, name
        assert value.shape == other.shape, name
        differ = bits(value.detach().cpu()) != bits(other.detach())
        assert not differ.any(), f"{name}: {int(differ.sum())} elements, first {int(differ.flatten().nonzero()[0])}"
