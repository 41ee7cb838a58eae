"""`skip_nonfinite`: a step whose gradients have a NaN or an infinity changes nothing and is counted."""

import copy
import math

import pytest
import torch
from cases import ALGORITHMS, BASE, assert_same_bits, backend_params, device_of, make_params, run, set_grads

from maxva_kernels import MAdam

on_backends = pytest.mark.parametrize("backend", backend_params())
both_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)

SIZES = (3, 70, 1)


def make(algorithm, backend, dtype=torch.float32, **options):
    params = make_params(SIZES, dtype, device_of(backend))
    groups = [{"params": params[:2]}, {"params": params[2:], "amsgrad": True}]
    return algorithm(groups, backend=backend, **{**BASE, "skip_nonfinite": True, **options})


def spoil(optimizer, value):
    """One element, in the last group."""
    optimizer.param_groups[1]["params"][0].grad[0] = value


@on_backends
@both_algorithms
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_step_with_it_is_as_if_it_had_never_been(value, clip, algorithm, backend):
    """Guards parameters, state and step counts of all groups; at the first step, which makes the state, and later."""
    optimizer, other = (make(algorithm, backend, max_grad_norm=clip) for _ in range(2))
    for at in range(4):
        run(optimizer, at, at + 1)
        run(other, at, at + 1)
        set_grads([param for group in optimizer.param_groups for param in group["params"]], 100)
        spoil(optimizer, value)
        optimizer.step()
        assert_same_bits(optimizer, other)
        assert optimizer.skipped_steps == at + 1
    assert other.skipped_steps == 0
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}


@on_backends
def test_first_step_may_be_skipped(backend):
    """Guards the state that a skipped first step makes: it must be that of no step."""
    optimizer, other = (make(MAdam, backend) for _ in range(2))
    set_grads([param for group in optimizer.param_groups for param in group["params"]], 0)
    spoil(optimizer, math.nan)
    optimizer.step()
    assert_same_bits(run(optimizer), run(other))


@on_backends
@both_algorithms
def test_without_it_they_spread(algorithm, backend):
    """Guards the default, which is torch's: the run shows that something is wrong."""
    optimizer = make(algorithm, backend, skip_nonfinite=False)
    run(optimizer, 0, 1)
    spoil(optimizer, math.nan)
    optimizer.step()
    assert optimizer.param_groups[1]["params"][0].isnan().all()
    assert not optimizer.param_groups[0]["params"][0].isnan().any()
    assert optimizer.skipped_steps == 0


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_large_finite_gradients_are_no_reason(dtype, backend):
    """Guards against a norm that overflows though every gradient is finite, taken for a gradient that is not."""
    optimizer = make(MAdam, backend, dtype)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.full_like(param, torch.finfo(dtype).max)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


@on_backends
@both_algorithms
def test_finite_runs_are_the_same_without_it(algorithm, backend):
    """Guards against a flag, or a norm, that changes a step."""
    for clip in (None, 1.0):
        plain = make(algorithm, backend, skip_nonfinite=False, max_grad_norm=clip)
        assert_same_bits(run(make(algorithm, backend, max_grad_norm=clip)), run(plain))


@on_backends
def test_gradient_scaler_overflows_are_skipped_once(backend):
    """Guards the two flags together: the scaler backs off, the optimizer counts, and the run goes on as without."""
    device = device_of(backend)
    optimizer, other = make(MAdam, backend), make(MAdam, backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0, growth_interval=100)
    for step, overflows in enumerate((False, True, False)):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        set_grads(params, step)
        for param in params:
            param.grad *= scaler.get_scale()
        scaler.scale(torch.ones((), device=device))
        if overflows:
            spoil(optimizer, math.inf)
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            run(other, step, step + 1)
    assert scaler.get_scale() == 4.0
    assert optimizer.skipped_steps == 1
    assert_same_bits(optimizer, other)


@on_backends
def test_overflow_that_only_the_scaler_knows_of(backend):
    """Guards ``found_inf`` where the gradients are finite: a scaler may have found it in what was put right since."""
    optimizer, other = (run(make(MAdam, backend), 0, 1) for _ in range(2))
    set_grads([param for group in optimizer.param_groups for param in group["params"]], 1)
    optimizer.found_inf = torch.ones((), device=device_of(backend))
    optimizer.step()
    assert_same_bits(optimizer, other)
    optimizer.found_inf = torch.zeros((), device=device_of(backend))
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert_same_bits(optimizer, run(other, 1, 2))


def test_count_goes_with_copies_and_is_no_groups():
    """Guards the count in `deepcopy` (and so pickle), and an option that only the whole optimizer can have."""
    optimizer = run(make(MAdam, "auto"))
    spoil(optimizer, math.nan)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    set_grads([param for group in twin.param_groups for param in group["params"]], 0)
    spoil(twin, math.nan)
    twin.step()
    assert (optimizer.skipped_steps, twin.skipped_steps) == (1, 2)
    with pytest.raises(ValueError, match="skip_nonfinite is the whole optimizer's"):
        MAdam([{"params": make_params(SIZES), "skip_nonfinite": True}])
