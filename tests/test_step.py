"""Every option x algorithm x dtype x backend against the float64 reference: parameters and states, step by step.

Each step starts both sides from the kernel's own state, so that what is compared is one step's rounding; whole runs are
followed in test_accuracy.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    ALGORITHMS,
    BASE,
    DTYPES,
    OPTIONS,
    assert_same_bits,
    backend_params,
    device_of,
    make_params,
    set_grads,
    states,
)

STEPS = 12

# Parameters, gradients, moments are of order 1 here and a step is a chain of some 20 operations, whose errors the
# division by sqrt(v) + eps magnifies a few times: 64 units of float32 rounding. In float64 the reference's own
# cancellation in v - u^2 dominates: its 1e-16 is divided by squared deviations of 1e-4 and more.
BOUND = {torch.float32: 64 * 2.0**-23, torch.float64: 1e-9}

# The kernels set w to 1 once 1 - w is at most this (csrc/maxva.h), which the paper does not.
SATURATION = {torch.float32: 2.0**-14, torch.float64: 2.0**-43}


def with_grads_of(optimizer, other):
    """Gives `other`'s parameters the gradients of `optimizer`'s."""
    for group, twin in zip(optimizer.param_groups, other.param_groups, strict=True):
        for param, its_twin in zip(group["params"], twin["params"], strict=True):
            its_twin.grad = None if param.grad is None else param.grad.clone()


def assert_same_step(optimizer, oracle, dtype, label):
    theirs = dict(states(oracle))
    for name, ours in states(optimizer):
        if name.startswith("step"):
            assert ours.item() == theirs[name].item()
            continue
        bound = max(BOUND[dtype], SATURATION[dtype]) if name.startswith("weight_sum") else BOUND[dtype]
        torch.testing.assert_close(
            ours, theirs[name], rtol=bound, atol=bound, msg=lambda text, name=name: f"{label}, {name}: {text}"
        )


@pytest.mark.parametrize("backend", backend_params(oracle=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_step_is_the_papers(algorithm, option, dtype, backend):
    params = make_params(dtype=dtype, device=device_of(backend))
    optimizer = algorithm(params, backend=backend, **{**BASE, **OPTIONS[option]})
    for step in range(STEPS):
        set_grads(params, step)
        oracle = copy.deepcopy(optimizer)
        oracle.backend = "reference"
        with_grads_of(optimizer, oracle)
        optimizer.step()
        oracle.step()
        assert_same_step(optimizer, oracle, dtype, f"step {step}")


@pytest.mark.parametrize("backend", backend_params(oracle=False, simulate=False))
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_dtypes_only_round_what_is_stored(algorithm, dtype, grad_dtype, backend):
    """A 16-bit parameter or gradient gives the bits of the float32 step on the same values, the parameter rounded to
    nearest even. A tolerance would let a wrong sign of the weight decay pass in bfloat16."""
    device, wide = device_of(backend), torch.float64 if dtype == torch.float64 else torch.float32
    params = make_params(dtype=dtype, device=device)
    twins = [torch.nn.Parameter(param.detach().to(wide)) for param in params]
    options = {**BASE, "amsgrad": True, "backend": backend}
    optimizer, widened = algorithm(params, **options), algorithm(twins, **options)
    for step in range(STEPS):
        set_grads(params, step, dtype=grad_dtype)
        for param, twin in zip(params, twins, strict=True):
            twin.data.copy_(param.detach())
            twin.grad = param.grad.to(wide)
        optimizer.step()
        widened.step()
        for twin in twins:
            twin.data.copy_(twin.data.to(dtype))
        for (name, ours), (_, theirs) in zip(states(optimizer), states(widened), strict=True):
            assert torch.equal(ours.to(theirs.dtype), theirs), f"step {step}, {name}"


@pytest.mark.parametrize("backend", backend_params(oracle=False))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits_is_to_nearest_even(dtype, backend):
    """Ties, the largest finite values, overflow, subnormals and NaN. The values pass through a step that changes
    nothing (lr = 0), so that only load and store act on them."""
    device = device_of(backend)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    param = torch.nn.Parameter(every.clone())
    param.grad = torch.zeros_like(param)
    from_bits = param.detach().clone()
    MAdamZero = ALGORITHMS[0]
    MAdamZero([param], lr=0.0, backend=backend).step()
    nan = from_bits.isnan()
    assert torch.equal(param[~nan].view(torch.int16), from_bits[~nan].view(torch.int16))
    assert param[nan].isnan().all()

    # Stores: theta = -lr * g with beta1 = 0 and denominators of exactly 1 (eps = 1, the gradient's square vanishes).
    wide = torch.cat(
        [every.float(), every.float() * (1 + 2.0**-12), every.float() * (1 + 2.0**-9), every.float() * 1.001]
    )
    wide = wide[wide.isfinite()]
    target = torch.nn.Parameter(torch.zeros_like(wide, dtype=dtype))
    shift = torch.nn.Parameter(torch.zeros_like(wide))
    for p in (target, shift):
        p.grad = None
        p.grad_dtype = torch.float32
        p.grad = wide.clone()
        MAdamZero([p], lr=1.0, beta1=0.0, eps=1.0, backend=backend).step()
    assert torch.equal(target.detach(), shift.detach().to(dtype))
    assert shift.detach().abs().max() > 0


@pytest.mark.parametrize("backend", backend_params(oracle=False))
def test_every_chunk_edge(backend):
    """Sizes around thread splits and blocks: each element of one big tensor steps like an element of its own."""
    device = device_of(backend)
    sizes = (32768 - 1, 32768, 32768 + 1, 65536 + 3, 100_003)
    params = make_params(sizes, device=device)
    set_grads(params, 0)
    flat = torch.nn.Parameter(torch.cat([param.detach() for param in params]))
    flat.grad = torch.cat([param.grad for param in params])
    for p in (params, [flat]):
        optimizer = ALGORITHMS[0](p, **BASE, backend=backend)
        optimizer.step()
        optimizer.step()
    assert torch.equal(torch.cat([param.detach() for param in params]), flat.detach())


@pytest.mark.parametrize("backend", backend_params(oracle=False))
def test_special_gradients(backend):
    """NaN and inf stay in their coordinate, spread to its state as in torch, and do not touch the neighbours."""
    device = device_of(backend)
    grads = torch.tensor([0.5, torch.nan, torch.inf, -torch.inf, -0.5, 3e38, 1e-45, 0.0])
    param, clean = (torch.nn.Parameter(torch.ones(8, device=device)) for _ in range(2))
    optimizer, other = (ALGORITHMS[0]([p], **BASE, backend=backend) for p in (param, clean))
    for _ in range(3):
        param.grad = grads.to(device)
        clean.grad = torch.where(grads.isfinite(), grads, 0).to(device)
        optimizer.step()
        other.step()
    finite = grads.isfinite()
    assert torch.equal(param.detach().cpu()[finite], clean.detach().cpu()[finite])
    assert param.detach().cpu()[finite].isfinite().all()
    assert param.detach()[1].isnan()
    assert optimizer.state[param]["grad_mean"][1].isnan()
    for name, value in optimizer.state[param].items():
        if name != "step":  # the square of 3e38 overflows, to infinity and not to NaN
            assert not value[5].isnan(), name


@pytest.mark.parametrize("backend", backend_params(oracle=False))
def test_same_bits_every_run(backend):
    runs = []
    for _ in range(2):
        params = make_params(device=device_of(backend))
        optimizer = ALGORITHMS[1](params, **BASE, max_grad_norm=1.0, backend=backend)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        runs.append(optimizer)
    assert_same_bits(*runs)
