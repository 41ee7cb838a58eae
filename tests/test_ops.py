"""The registered operators, as torch sees them: schemas, fakes, tracing."""

from __future__ import annotations

import pytest
import torch
from cases import make_params, needs_cpu_kernels, set_grads

from maxva_kernels import _ops
from maxva_kernels.launch import DTYPE_CODES, PACKED_GROUP, NormLaunch, StepLaunch, TotalLaunch

pytestmark = needs_cpu_kernels


def step_arguments(amsgrad: bool, dtype: torch.dtype = torch.float32):
    """Arguments of maxva::step_ over two groups, the second with AMSGrad if asked for."""
    params = make_params((5, 0, 33), dtype=dtype)
    set_grads(params, 0)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    moments = [[torch.zeros_like(param, dtype=state) for param in params] for _ in range(4)]
    steps = [torch.zeros((), dtype=torch.int64) for _ in params]
    maxima = [torch.zeros_like(params[2], dtype=state)] if amsgrad else []
    masters = [
        torch.zeros_like(param if dtype == torch.bfloat16 else param[:0], dtype=torch.bfloat16) for param in params
    ]
    lists = ([param.detach() for param in params], [param.grad for param in params], *moments, maxima, masters, steps)
    options = {
        "laprop": False,
        "group_sizes": [2, 1],
        "lr": torch.tensor([0.1, 0.2], dtype=torch.float64),
        "beta1": [0.9, 0.8],
        "beta2_lower": [0.5, 0.5],
        "beta2_upper": [0.999, 0.98],
        "beta2_init": [0.999, 0.9],
        "eps": [1e-8, 1e-6],
        "weight_decay": [0.0, 0.1],
        "decoupled_weight_decay": [1, 0],
        "amsgrad": [0, int(amsgrad)],
        "maximize": [0, 1],
        "adam_eps": [0, 1],
        "stochastic_rounding": [0, 0],
        "grad_scale": torch.tensor(2.0),
        "found_inf": torch.tensor(0.0),
        "grad_norm": torch.tensor(3.0),
        "max_grad_norm": 1.0,
    }
    return lists, options


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_step(dtype, amsgrad):
    torch.library.opcheck(_ops.step_, *step_arguments(amsgrad, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_grad_norm(dtype):
    torch.library.opcheck(_ops.grad_norm, ([torch.randn(5, dtype=dtype), torch.randn(3, 4)],))


@pytest.mark.parametrize("name", ["step_", "grad_norm"])
def test_operators_know_gpus(name):
    """Guards against a compiled step on a GPU that finds no kernel: eager ones go another way."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"maxva::{name}", "CUDA")


def test_every_list_is_checked():
    """A list of another length is refused before anything is read beyond its end."""
    lists, options = step_arguments(amsgrad=True)
    for i in range(len(lists)):
        short = [list(values) for values in lists]
        short[i].pop()
        with pytest.raises(RuntimeError, match="entries for"):
            _ops.step_(*short, **options)
    for name, value in options.items():
        if isinstance(value, list):
            with pytest.raises(RuntimeError, match="entries for"):
                _ops.step_(*lists, **{**options, name: value[:1]})
    with pytest.raises(RuntimeError, match="lr must be"):
        _ops.step_(*lists, **{**options, "lr": options["lr"].float()})
    assert not any(step.item() for step in lists[-1])


def test_opcheck_cpu_capability():
    """Without the checks that compare outputs, which torch cannot do with strings."""
    torch.library.opcheck(_ops.cpu_capability, (), test_utils=("test_schema", "test_autograd_registration"))
    assert _ops.cpu_capability() in ("AVX512", "AVX2", "DEFAULT")


@pytest.mark.skipif(_ops.load_error("_C_cuda") is not None, reason="the CUDA kernels are not there")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the addresses lead nowhere")
def test_compiled_module_takes_what_the_host_composes():
    """Guards the formats by which csrc/cuda/module.cpp reads a launch: without a GPU it comes as far as asking for one,
    and says so as an error that can be caught."""
    module = _ops.module("_C_cuda")
    step = StepLaunch(*[0] * 5, *[False] * 3, *[1] * 4, bytes(PACKED_GROUP.size), bytes(8), *[0] * 8, -1.0)
    norm_chunks = NormLaunch(0, 0, 0, False, 1, 1, 1, bytes(8), 1)
    norm_total = TotalLaunch(0, 0, False, 1, 1, 1)
    for function, launch in (
        (module.step, step),
        (module.step, step._replace(statistics=1)),
        (module.step, step._replace(state_dtype=DTYPE_CODES[torch.bfloat16])),
        (module.update_norms, step),
        (module.norm_chunks, norm_chunks),
        (module.norm_total, norm_total),
    ):
        with pytest.raises(RuntimeError, match=r"maxva: .*\(cudaError\w+\)"):
            function(launch)
