"""`torch.compile` of a step and of a whole training step: one graph, the same bits, compiled once for a run."""

from __future__ import annotations

import pytest
import torch
from cases import ALGORITHMS, assert_same_bits, needs_cpu_kernels
from torch import nn
from torch._dynamo.utils import counters

from maxva_kernels import MAdam

STEPS = 6
OPTIONS = {
    "plain": {},
    "clip": {"max_grad_norm": 0.01},
    "skip": {"skip_nonfinite": True},
    "AMSGrad, decay": {"amsgrad": True, "weight_decay": 0.1},
    "trust ratio": {"trust_ratio": True, "weight_decay": 0.1, "collect_statistics": True},
    "16-bit state": {"state_dtype": torch.bfloat16, "amsgrad": True},
    "master weights": {"master_weights": True, "dtype": torch.bfloat16},
    "whole master weights": {"master_weights": True, "dtype": torch.float16},
    "stochastic rounding": {"stochastic_rounding": True, "dtype": torch.bfloat16},
    "lr in a tensor": {"lr": torch.tensor(0.01)},
}

pytestmark = [needs_cpu_kernels]  # the reference is no operator
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
options = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(algorithm, option):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    settings = {"lr": 0.01, **OPTIONS[option]}
    model.to(settings.pop("dtype", torch.float32))
    if isinstance(settings["lr"], torch.Tensor):
        settings["lr"] = settings["lr"].clone()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "beta1": 0.8}]
    return model, algorithm(groups, **settings)


def loss_of(model, step):
    dtype = next(model.parameters()).dtype
    return model(torch.full((3, 4), 0.1 * step + 0.1, dtype=dtype)).square().mean()


def anneal(optimizer):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].mul_(0.9)
        else:
            group["lr"] *= 0.9


def graphs():
    return counters["stats"]["unique_graphs"]


@algorithms
@options
def test_step_is_one_graph_for_the_whole_run(option, algorithm):
    """Guards against a graph break, other bits, and a graph made anew as the step count or the learning rate moves.

    Two graphs are made: one for the first step, which makes the state, and one for all others.
    """
    runs = [build(algorithm, option) for _ in range(2)]
    optimizer, eager = (optimizer for _, optimizer in runs)
    compiled = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for step in range(STEPS):
        for net, opt in runs:
            opt.zero_grad()
            loss_of(net, step).backward()
        compiled()
        eager.step()
        anneal(optimizer)
        anneal(eager)
        assert graphs() == min(step + 1, 2)
    assert_same_bits(optimizer, eager)


def train(model, optimizer, step):
    for param in model.parameters():  # torch.compile does not go into zero_grad(), of any optimizer
        param.grad = None
    loss = loss_of(model, step)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_compiled(algorithm, option):
    torch._dynamo.reset()
    counters.clear()
    runs = [build(algorithm, option) for _ in range(2)]
    compiled = torch.compile(train, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for step in range(STEPS):
            inputs = torch.tensor(float(step))
            losses = [function(*run, inputs) for function, run in zip((compiled, train), runs, strict=True)]
            assert torch.equal(*losses)
            for _, optimizer in runs:
                anneal(optimizer)
            assert graphs() == min(step + 1, 2)
    assert_same_bits(runs[0][1], runs[1][1])


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot trace a backward pass"
)
@algorithms
@options
def test_training_step_is_one_graph(option, algorithm, pools):
    """Guards the whole: forward, backward and step in one graph, with the bits of the run that is not compiled.

    In a process of its own, for after it torch (2.14) cannot compile any optimizer's step() with its hooks any more.
    """
    pools(1)(train_compiled, algorithm, option)


@algorithms
def test_compiled_step_under_a_scheduler(algorithm):
    """Guards against a graph for each learning rate of a schedule, whose hook around step() is torch's own break."""
    runs = [build(algorithm, "clip") for _ in range(2)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(run[1], lambda step: 1 / (1 + step)) for run in runs]
    compiled = torch.compile(runs[0][1].step, backend="aot_eager")
    for step in range(STEPS):
        for model, optimizer in runs:
            optimizer.zero_grad()
            loss_of(model, step).backward()
        compiled()
        runs[1][1].step()
        for scheduler in schedulers:
            scheduler.step()
        assert graphs() == min(step + 1, 2)
    assert_same_bits(runs[0][1], runs[1][1])


def test_generated_code(tmp_path, monkeypatch):
    """Guards the way through Inductor too, whose code must update in place."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    runs = [build(ALGORITHMS[0], "clip") for _ in range(2)]
    compiled = torch.compile(runs[0][1].step, fullgraph=True)
    for step in range(3):
        for (model, optimizer), call in zip(runs, (compiled, runs[1][1].step), strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            call()
    assert_same_bits(runs[0][1], runs[1][1])


def run_both_ways(option, change, check=lambda model: None):
    """An optimizer that was not compiled and one that was: `change` is done before each of their last two steps, and
    `check` after it."""
    runs = []
    for compiled in (False, True):
        model, optimizer = build(MAdam, option)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
        for number in range(4):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            if number > 1:
                change(model)
            step()
            if number > 1:
                check(model)
        runs.append(optimizer)
    return runs


def test_whole_masters_follow_their_parameters():
    """Guards what others write into a float16 parameter between compiled steps, where nothing counts versions."""

    def write(model):
        model[0].weight.data[0] = 3.0

    def is_kept(model):
        assert (model[0].weight[0] > 2.5).all()

    runs = run_both_ways("whole master weights", write, is_kept)
    assert graphs() == 2
    assert_same_bits(*runs)


def test_parameter_that_loses_its_gradient():
    """Guards against a graph break where a parameter with state has no gradient this time, as an expert unused."""

    def lose(model):
        model[0].weight.grad = None

    assert_same_bits(*run_both_ways("plain", lose))


@pytest.mark.parametrize("eager_steps", [0, 1])
def test_what_compiled_steps_tell(eager_steps):
    """Guards `skipped_steps` and `statistics()`: torch.compile drops what a step assigns to its optimizer."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    runs = [MAdam([param], lr=0.1, skip_nonfinite=True, collect_statistics=True) for param in params]
    steps = [runs[0].step, torch.compile(runs[1].step, backend="aot_eager", fullgraph=True)]
    for number in range(5):
        for param, step, optimizer in zip(params, steps, runs, strict=True):
            param.grad = torch.full((3,), float("nan") if number % 2 else number + 1.0)
            (optimizer.step if number < eager_steps else step)()
        told = [(optimizer.skipped_steps, str(optimizer.statistics())) for optimizer in runs]
        assert told[0] == told[1]
        assert told[0][0] == (number + 1) // 2
