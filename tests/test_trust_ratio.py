"""`trust_ratio`: LAMB's layer-wise learning rates on every backend. The table of options (cases.py) has it too."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    ALGORITHMS,
    BASE,
    assert_same_bits,
    backend_params,
    device_of,
    make_params,
    needs_cpu_kernels,
    params_of,
    run,
    set_grads,
    states,
)
from twins import step_both, with_twin

from maxva_kernels import LaMAdam, MAdam

on_backends = pytest.mark.parametrize("backend", backend_params())
both_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)

SIZES = (1, 40, 700)


@on_backends
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@both_algorithms
def test_ratio_of_norms(algorithm, dtype, decoupled, backend):
    """Guards the definition: the change of each tensor is lr |theta| / |update| times the update, weight decay
    included, and the update is that of a step without ratio at learning rate 1."""
    options = {**BASE, "decoupled_weight_decay": decoupled}
    params = make_params(SIZES, dtype, device_of(backend))
    optimizer = algorithm(params, backend=backend, trust_ratio=True, **options)
    for step in range(3):
        plain = copy.deepcopy(optimizer)
        plain.param_groups[0].update(trust_ratio=False, lr=1.0)
        before = [param.detach().double().clone() for param in params]
        for each in (optimizer, plain):
            set_grads(each.param_groups[0]["params"], step)
            each.step()
        for old, new, stepped in zip(before, params, plain.param_groups[0]["params"], strict=True):
            update = old - stepped.detach().double()
            expected = old - 0.1 * old.norm() / update.norm() * update
            tolerance = 1e-5 if dtype == torch.float32 else 1e-10
            torch.testing.assert_close(new.detach().double(), expected, rtol=tolerance, atol=tolerance)
        for (name, a), (_, b) in zip(states(optimizer), states(plain), strict=True):
            assert name.startswith("params") or torch.equal(a, b), name  # the ratio is no part of the state


@on_backends
@both_algorithms
def test_norms_of_zero(algorithm, backend):
    """Guards both divisions by nothing: a parameter that begins at zero must move, as without a ratio, and one whose
    update is zero must stay what it is."""
    zero, still = (torch.nn.Parameter(value.to(device_of(backend))) for value in (torch.zeros(9), torch.ones(9)))
    options = {**BASE, "weight_decay": 0.0}
    optimizer = algorithm([zero, still], backend=backend, trust_ratio=True, **options)
    other = torch.nn.Parameter(zero.detach().clone())
    plain = algorithm([other], backend=backend, **options)
    for param, grad in ((zero, 1.0), (other, 1.0), (still, 0.0)):
        param.grad = torch.full_like(param, grad)
    optimizer.step()
    plain.step()
    assert torch.equal(zero, other)
    assert (zero != 0).all()
    assert (still == 1).all()


@on_backends
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32(scale, backend):
    """Guards norms whose squares vanish or overflow: taken for 0, they would turn the ratio off; for infinite, they
    would stop the tensor."""
    param = torch.nn.Parameter(torch.full((100,), scale, device=device_of(backend)))
    optimizer = MAdam([param], backend=backend, trust_ratio=True, **{**BASE, "weight_decay": 0.0})
    param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full_like(param, 0.9 * scale), rtol=1e-5, atol=0)


@on_backends
@both_algorithms
def test_updates_that_are_hardly_any(algorithm, backend):
    """Guards a tensor without gradients whose momentum has nearly decayed: the ratio is beyond float32, and beside a
    momentum of 0 an infinite rate makes a NaN."""
    param = torch.nn.Parameter(torch.full((100,), 1e20, device=device_of(backend)))
    optimizer = algorithm([param], backend=backend, trust_ratio=True, **{**BASE, "weight_decay": 0.0})
    param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.state[param]["exp_avg"][::2] = 2e-38
    optimizer.step()
    assert param.isfinite().all()


@on_backends
@pytest.mark.parametrize("first", [False, True], ids=["one", "both"])
def test_groups_with_and_without(first, backend):
    """Guards groups that differ in it, which are stepped apart: each as it would be alone. And ratios of two groups."""
    together, alone = (make_params(SIZES, device=device_of(backend)) for _ in range(2))
    groups = [
        {"params": together[:1], "trust_ratio": first},
        {"params": together[1:], "trust_ratio": True, "amsgrad": True},
    ]
    optimizer = LaMAdam(groups, backend=backend, **BASE)
    apart = [
        LaMAdam(alone[:1], backend=backend, trust_ratio=first, **BASE),
        LaMAdam(alone[1:], backend=backend, trust_ratio=True, amsgrad=True, **BASE),
    ]
    for step in range(3):
        set_grads(together, step)
        set_grads(alone, step)
        for each in (optimizer, *apart):
            each.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


@on_backends
@pytest.mark.parametrize("trusted", [0, 1])
def test_refusal_changes_nothing(trusted, backend):
    """Guards the order of checks and steps: neither kind of group may have moved when the other's tensor is refused."""
    params = make_params((5, 7), device=device_of(backend))
    groups = [{"params": [param], "trust_ratio": i == trusted} for i, param in enumerate(params)]
    optimizer = run(MAdam(groups, backend=backend, **BASE), last=1)
    for spoiled in params:
        set_grads(params, 1)
        before = {name: value.clone() for name, value in states(optimizer)}
        spoiled.grad_dtype = None
        spoiled.grad = torch.ones_like(spoiled, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="grads"):
            optimizer.step()
        for name, value in states(optimizer):
            assert torch.equal(value, before[name]), name


@on_backends
def test_overflow_and_skipping(backend):
    """Guards that a step which does not happen is no step of the first stage either, and that ratios of a step that
    is skipped, which were never computed, do no harm."""
    optimizer = MAdam(make_params(SIZES, device=device_of(backend)), backend=backend, trust_ratio=True, **BASE)
    other = copy.deepcopy(optimizer)
    optimizer.skip_nonfinite = True
    for step in range(3):
        run(optimizer, step, step + 1)
        run(other, step, step + 1)
        set_grads(optimizer.param_groups[0]["params"], step)
        optimizer.param_groups[0]["params"][1].grad[3] = torch.inf
        optimizer.step()
        assert_same_bits(optimizer, other)
    optimizer.skip_nonfinite = False
    optimizer.found_inf = torch.ones((), device=device_of(backend))
    run(optimizer, 3, 4)
    assert_same_bits(optimizer, other)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_threads_make_no_difference(dtype):
    """Guards the order of additions over chunks."""
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = make_params((3, 200_001, 100), dtype)
            results.append(run(MAdam(params, backend="cpu", trust_ratio=True, **BASE)))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_one_unusual_element(others, dtype, simulated):
    """Guards the shortcut where all squares go to the medium sum: whole chunks in which one parameter, and with it one
    update by the decay, is too small or too large for it."""
    unusual = (1e-25, 1e-15, 1e16, 1e25, torch.inf)
    params = [torch.nn.Parameter(torch.full((2 * 8192 + 9,), others, dtype=dtype)) for _ in unusual]
    with torch.no_grad():
        for i, (param, value) in enumerate(zip(params, unusual, strict=True)):
            param[(5, 8191, 8192, 9000, 3000)[i]] = -value
    pair = with_twin(MAdam(params, backend=simulated.backend, trust_ratio=True, **{**BASE, "weight_decay": 0.1}))
    for _ in range(2):
        for optimizer in pair:
            for param in params_of(optimizer):
                param.grad = torch.zeros_like(param)
            optimizer.step()
        assert_same_bits(*pair)


@pytest.mark.parametrize("blocks", [1, 3])
@both_algorithms
def test_many_chunks_and_dtypes(algorithm, blocks, simulate):
    """Guards the sums over chunks, and the way of ratios to rows where a step takes several launches: one for each
    dtype of parameters and of gradients, whose tensors are mixed."""
    launcher = simulate(blocks=blocks)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16)
    sizes = (700, 9000, 300, 20_000, 0)
    params = [make_params((size,), dtype, seed=i)[0] for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True))]
    groups = [{"params": params[:2]}, {"params": params[2:], "amsgrad": True, "decoupled_weight_decay": False}]
    pair = with_twin(algorithm(groups, backend=launcher.backend, trust_ratio=True, max_grad_norm=1.0, **BASE))
    for step in range(2):
        step_both(pair, step)
        set_grads(params, step, dtype=torch.float16)


def test_traffic_and_launches(simulate):
    """Guards the cost: two launches before the step's, in which everything is read once more and nothing of the
    parameters, gradients and state is written."""
    launcher = simulate(track=True)
    pair = with_twin(MAdam(make_params((700, 9000)), backend=launcher.backend, trust_ratio=True, amsgrad=True, **BASE))
    step_both(pair)
    kernels = [launch.kernel.split("<")[0] for launch in launcher.launches]
    assert kernels == ["update_chunks_kernel", "update_total_kernel", "step_kernel"]
    squares = launcher.launches[0]
    for name in ("param", "grad", "exp_avg", "grad_mean", "grad_var", "weight_sum", "max_denom"):
        for buffer in squares.buffers_of(name):
            assert (buffer.reads == 1).all(), name
            assert (buffer.writes == 0).all(), name
    for total in launcher.launches[:2]:
        for name in ("squares", "norms"):
            assert (total.buffers[name].writes <= 1).all()


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_any_beginning_of_a_tensor(offset, simulated):
    """Guards accesses of a tensor that begins anywhere in a packet, and operands that begin at different places."""
    pair = with_twin(run(MAdam(make_params((9, 700)), backend=simulated.backend, trust_ratio=True, **BASE), last=1))
    step_both(pair, 1, offsets=[{"param": offset, "grad": offset}, {"exp_avg": offset, "weight_sum": 1}])
