"""`collect_statistics`: what a step tells of itself, on every backend, and that telling changes nothing."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import (
    ALGORITHMS,
    BASE,
    OPTIONS,
    assert_same_bits,
    backend_params,
    device_of,
    make_params,
    needs_cpu_kernels,
    params_of,
    run,
    set_grads,
)

from maxva_kernels import LaMAdam, MAdam, _ops, statistics
from maxva_kernels.statistics import CHUNK

on_backends = pytest.mark.parametrize("backend", backend_params())
both_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)

# Nothing, less than a chunk, a chunk, more of them than are sampled.
SIZES = (0, 1, 700, CHUNK, 2 * CHUNK + 5)


def make(algorithm, backend, dtype=torch.float32, sizes=SIZES, **options):
    params = make_params(sizes, dtype, device_of(backend))
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.05}]
    return algorithm(groups, backend=backend, collect_statistics=True, **{**BASE, **options})


def assert_close(ours, theirs, rtol):
    """Means to rounding; a share may differ by a coordinate whose beta lies at a bound but for rounding."""
    pairs = zip([ours.overall, *ours.groups], [theirs.overall, *theirs.groups], strict=True)
    for i, (a, b) in enumerate(pairs):
        for name in a._fields:
            x, y = getattr(a, name), getattr(b, name)
            slack = 2 / max(b.coordinates, 1) if name.startswith("share") or name == "mean_beta" else 0
            assert x == pytest.approx(y, rel=rtol, abs=slack, nan_ok=True), (i, name)
    assert ours.clip_factor == pytest.approx(theirs.clip_factor, rel=rtol)


@pytest.mark.parametrize("backend", backend_params(oracle=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("option", ["base", "amsgrad", "l2", "maximize", "upper_bound_1", "clip", "all"])
@both_algorithms
def test_they_are_the_references(algorithm, option, dtype, backend):
    """Each step starts both sides from one state. A sum of n float32 numbers is off by n/lanes + log2(lanes) roundings
    at most, with at least 128 lanes for 8192 elements."""
    optimizer = make(algorithm, backend, dtype, **OPTIONS[option])
    for step in range(3):
        oracle = copy.deepcopy(optimizer)
        oracle.backend = "reference"
        for each in (optimizer, oracle):
            run(each, step, step + 1)
        assert_close(optimizer.statistics(), oracle.statistics(), 128 * 2.0**-23)


@on_backends
@both_algorithms
def test_they_are_what_they_say(algorithm, backend):
    """Guards each definition, by what can be seen of a step from outside: the change of the parameters, and w."""
    optimizer = make(algorithm, backend, torch.float64, sizes=(40, 3, 700), weight_decay=0.0, max_grad_norm=0.5)
    run(optimizer, last=3)
    before = [param.detach().clone() for param in params_of(optimizer)]
    weights = [optimizer.state[param]["weight_sum"].clone() for param in params_of(optimizer)]
    run(optimizer, 3, 4)
    told = optimizer.statistics()
    change = torch.cat([(old - new.detach()).abs() for old, new in zip(before, params_of(optimizer), strict=True)])
    assert told.overall.mean_update == pytest.approx(float(change.mean()), rel=1e-5)
    betas = []
    for param, old in zip(params_of(optimizer), weights, strict=True):
        new = optimizer.state[param]["weight_sum"]
        betas.append((1 - new) / (1 - old))  # w <- beta w + (1 - beta)
    beta = torch.cat(betas)
    assert told.overall.mean_beta == pytest.approx(float(beta.mean()), rel=1e-5)
    assert told.overall.share_at_upper == pytest.approx(float((beta > 0.98 - 1e-9).double().mean()), rel=1e-5)
    assert told.overall.share_at_lower == pytest.approx(float((beta < 0.5 + 1e-9).double().mean()), abs=1e-9)
    assert 0.1 < told.overall.share_at_upper < 0.9
    norm = float(torch.cat([param.grad for param in params_of(optimizer)]).norm())
    assert told.overall.grad_norm == pytest.approx(norm)
    assert told.clip_factor == pytest.approx(0.5 / norm)
    of_first = float(torch.cat([param.grad for param in optimizer.param_groups[0]["params"]]).norm())
    assert told.groups[0].grad_norm == pytest.approx(of_first, rel=1e-5)
    assert [told.overall.coordinates, *(group.coordinates for group in told.groups)] == [743, 743, 0]


@on_backends
def test_weight_decay_is_no_update(backend):
    """Guards the paper's step size, which is the optimizer's alone."""
    told = [run(make(MAdam, backend, weight_decay=decay)).statistics().overall for decay in (0.0, 0.3)]
    assert told[0].mean_update == told[1].mean_update


@on_backends
def test_lower_bound(backend):
    """Guards the count at the lower bound: gradients that jump far from their mean take the least beta there is."""
    options = {**BASE, "beta2_range": (0.9, 0.98), "collect_statistics": True}
    optimizer = MAdam(make_params((300,), device=device_of(backend)), backend=backend, **options)
    (param,) = params_of(optimizer)
    for grad in [1.0, 1.001, 0.999] * 4 + [50.0]:
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    told = optimizer.statistics().overall
    assert (told.share_at_lower, told.share_at_upper) == (1.0, 0.0)
    assert told.mean_beta == pytest.approx(0.9)


@on_backends
def test_telling_changes_nothing(backend):
    """Guards the step itself: the same bits with and without statistics, whatever is sampled."""
    sizes = (5, 0, 3, 14 * CHUNK + 1)  # chunks 0 and 13 are sampled
    telling = make(LaMAdam, backend, sizes=sizes)
    silent = copy.deepcopy(telling)
    silent.collect_statistics = False
    assert_same_bits(run(telling, last=2), run(silent, last=2))


@pytest.mark.parametrize("backend", backend_params(simulate=False))
def test_the_sample_is_the_one_described(backend):
    """Guards the choice of chunks, which every backend makes for itself, and the weights of tensors sampled in part."""
    size = 100 * CHUNK
    large, small = (torch.zeros(n, device=device_of(backend)) for n in (size, 10))
    optimizer = MAdam([large, small], backend=backend, collect_statistics=True, **{**BASE, "weight_decay": 0.0})
    chosen = torch.tensor([statistics.is_sampled(chunk) for chunk in range(100)]).repeat_interleave(CHUNK)
    assert chosen[:CHUNK].all()
    assert int(chosen.sum()) == 7 * CHUNK
    large.grad = torch.where(chosen.to(large.device), 0.0, torch.ones_like(large))
    small.grad = torch.ones_like(small)
    optimizer.step()
    told = optimizer.statistics().overall
    assert told.coordinates == size + 10
    # As if all of the large tensor were like its sample, in which nothing moves.
    assert told.mean_update == pytest.approx(float(small.abs().mean()) * 10 / (size + 10))


@needs_cpu_kernels
def test_records_are_written_for_sampled_chunks_alone():
    """Guards `is_sampled`, which Python and C++ both have, over far more chunks than a test could step."""
    chunks = 3000
    lists = [[torch.zeros(chunks * CHUNK)] for _ in range(6)]
    records = torch.full((chunks, len(statistics.FIELDS)), -1.0)
    of_groups = {"beta1": 0.9, "beta2_lower": 0.5, "beta2_upper": 0.9, "beta2_init": 0.9, "eps": 1e-8}
    of_groups |= {"weight_decay": 0.0, "decoupled_weight_decay": 1, "amsgrad": 0, "maximize": 0, "adam_eps": 0}
    of_groups |= {"stochastic_rounding": 0}
    given = {name: [value] for name, value in of_groups.items()}
    lr, steps = torch.tensor([0.1], dtype=torch.float64), [torch.zeros((), dtype=torch.int64)]
    _ops.step_(*lists, [], [], steps, laprop=False, group_sizes=[1], lr=lr, **given, statistics=records)
    assert (records[:, 0] != -1).tolist() == [statistics.is_sampled(chunk) for chunk in range(chunks)]


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_make_no_difference(dtype):
    """Guards chunks that are divided among threads."""
    told = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            told.append(run(make(MAdam, "cpu", dtype, sizes=(3, 17 * CHUNK + 9, 100, 5, 40000))).statistics())
    finally:
        torch.set_num_threads(threads)
    assert told[0] == told[1] == told[2]


def test_blocks_make_no_difference(simulate):
    """Guards the geometry and order of a launch."""
    told = []
    for blocks, seed in ((1, None), (2, 1), (3, 2)):
        launcher = simulate(blocks=blocks, seed=seed)
        told.append(run(make(MAdam, launcher.backend), last=2).statistics())
    assert told[0] == told[1] == told[2]


def test_any_beginning_of_a_tensor(simulated):
    """Guards what lies before and behind a tensor in its packets: it must not be counted."""
    from twins import step_both, with_twin

    optimizer = MAdam(
        make_params((9, 700, 3, CHUNK)),
        backend=simulated.backend,
        collect_statistics=True,
        **OPTIONS["amsgrad"],
        **BASE,
    )
    pair = with_twin(run(optimizer, last=1))
    names = ("param", "grad", "exp_avg", "grad_mean", "grad_var", "weight_sum", "max_denom")
    offsets = [dict.fromkeys(names, offset) for offset in (1, 2, 3)] + [dict.fromkeys(names[:2], 1)]
    step_both(pair, 1, offsets=offsets)
    assert_close(pair[0].statistics(), pair[1].statistics(), 128 * 2.0**-23)
    assert pair[0].statistics().overall.coordinates == 9 + 700 + 3 + CHUNK


@on_backends
def test_elements_in_their_order_in_memory(backend):
    """Guards a parameter that is a transposed view: its chunks are cut in memory, as its gradient's are."""
    values = torch.randn(150, 1000, generator=torch.Generator().manual_seed(1)).to(device_of(backend))
    grads = torch.arange(values.numel(), dtype=torch.float32).reshape(values.shape).to(values)
    told = []
    for transpose in (False, True):
        param = torch.nn.Parameter(values.clone().t() if transpose else values.clone())
        optimizer = MAdam([param], backend=backend, collect_statistics=True, **BASE)
        param.grad = grads.t() if transpose else grads
        optimizer.step()
        told.append(optimizer.statistics())
    assert told[0] == told[1]


@on_backends
def test_scaled_gradients(backend):
    """Guards the norm and the clip under a gradient scaler, whose scale it changes in place after the step."""
    told = []
    for scale in (None, 1024.0):
        optimizer = make(MAdam, backend, max_grad_norm=1.0)
        set_grads(params_of(optimizer), 0)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=device_of(backend))
            for param in params_of(optimizer):
                param.grad.mul_(scale)
        optimizer.step()
        if scale is not None:
            optimizer.grad_scale.fill_(1.0)
        told.append(optimizer.statistics())
    assert_close(*told, 1e-6)
    assert told[0].clip_factor < 0.1


@on_backends
def test_infinite_bound_clips_nothing(backend):
    """Guards a bound that is there for the norm alone: beside an infinite gradient its factor, inf / inf, would make
    every parameter NaN, and not one coordinate."""
    measuring, plain = (make(MAdam, backend, max_grad_norm=bound) for bound in (math.inf, None))
    for each in (measuring, plain):
        set_grads(params_of(each), 0)
        params_of(each)[-1].grad[0] = math.inf
        each.step()
    assert_same_bits(measuring, plain)
    told = measuring.statistics()
    assert (told.clip_factor, told.overall.grad_norm) == (1, math.inf)


@on_backends
def test_step_that_is_skipped(backend):
    """Guards a step that changed nothing from being told as one that changed things by 0."""
    optimizer = make(MAdam, backend, skip_nonfinite=True)
    run(optimizer, last=1)
    set_grads(params_of(optimizer), 1)
    params_of(optimizer)[-1].grad[0] = math.nan
    optimizer.step()
    told = optimizer.statistics()
    assert told.overall.coordinates == 0
    assert math.isnan(told.overall.mean_update)
    assert math.isnan(told.overall.grad_norm)


@on_backends
@pytest.mark.parametrize(("value", "factor"), [(math.inf, 0.0), (math.nan, math.nan)])
def test_clip_by_a_norm_that_is_not_finite(value, factor, backend):
    """Guards a division by the factor 0, and a factor of 1 told where every gradient was made NaN."""
    optimizer = make(MAdam, backend, max_grad_norm=1.0)
    set_grads(params_of(optimizer), 0)
    params_of(optimizer)[-1].grad[0] = value
    optimizer.step()
    told = optimizer.statistics()
    assert told.clip_factor == pytest.approx(factor, nan_ok=True)
    assert told.overall.grad_norm == pytest.approx(value, nan_ok=True)
    assert all(math.isnan(group.grad_norm) for group in told.groups)


@on_backends
@pytest.mark.parametrize(
    "option", [{"max_grad_norm": math.inf}, {"skip_nonfinite": True}], ids=lambda option: next(iter(option))
)
def test_norm_that_the_step_takes_is_exact(option, backend):
    """Guards against the estimate told instead: what is not 0 lies where no sample is taken."""
    assert not statistics.is_sampled(1)
    optimizer = make(MAdam, backend, **option)
    for param in params_of(optimizer):
        param.grad = torch.zeros_like(param)
    params_of(optimizer)[-1].grad[CHUNK + 3] = 5.0
    optimizer.step()
    told = optimizer.statistics()
    assert told.overall.grad_norm == 5.0
    assert told.groups[1].grad_norm == 0.0


def test_coordinates_are_whole():
    """Guards a count that is one too low where the estimate from the sample falls just below it."""
    numel, counted = next(
        (numel, counted)
        for counted in range(1, CHUNK)
        for numel in range(counted, CHUNK)
        if counted * (numel / counted) < numel
    )
    recorder = statistics.Recorder()
    recorder.table([(0, numel)], torch.device("cpu"))[0, 0] = counted
    assert recorder.read(1).overall.coordinates == numel


@on_backends
def test_group_without_gradients(backend):
    """Guards the assignment of records to groups where one takes no part."""
    optimizer = make(MAdam, backend)
    run(optimizer, last=1)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = None
    optimizer.step()
    first, second = optimizer.statistics().groups
    assert first.coordinates == 0
    assert math.isnan(first.mean_beta)
    assert second.coordinates == sum(SIZES[3:])
    assert optimizer.statistics().overall == second


def test_before_a_step():
    """Guards an error that says what to do, also where the option is off."""
    params = make_params((3,))
    for optimizer in (MAdam(params), MAdam(params, collect_statistics=True)):
        with pytest.raises(RuntimeError, match="pass collect_statistics=True and call step"):
            optimizer.statistics()


def test_switched_off():
    """Guards against an older step told as the last one."""
    optimizer = run(make(MAdam, "reference"), last=1)
    optimizer.collect_statistics = False
    run(optimizer, 1, 2)
    with pytest.raises(RuntimeError, match="no step has been recorded"):
        optimizer.statistics()


def test_copies():
    """Guards pickles and copies of an optimizer that has told something: records are of one step of one optimizer."""
    optimizer = run(make(MAdam, "reference"))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.collect_statistics
        with pytest.raises(RuntimeError, match="no step has been recorded"):
            other.statistics()
        run(other, 4, 5)
        assert other.statistics().overall.coordinates == sum(SIZES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@on_backends
def test_defaults_make_no_difference(dtype, backend):
    """Guards records and sums made in the dtype or on the device that is the default."""
    optimizer = MAdam(make_params((70,), device=device_of(backend)), backend=backend, collect_statistics=True)
    set_grads(params_of(optimizer), 0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            optimizer.step()
            assert optimizer.statistics().overall.coordinates == 70
    finally:
        torch.set_default_dtype(before)
