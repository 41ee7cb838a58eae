"""Moving in and out: a converted run goes on as the one that never stopped, and what cannot is refused.

The oracle is written here, from what the authors' programs compute: the paper's lines with u~, v~ and w, eps beside the
bias-corrected sqrt(v), 1e-16 in the denominator of Eq. 6, and a LaMAdam whose momentum carries the learning rate.
"""

import argparse
import copy
import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch
from cases import make_params, needs_cpu_kernels, params_of, run, set_grads, through_file
from torch.optim import Optimizer

from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.__main__ import main
from maxva_kernels.checkpoint import UNSAID
from maxva_kernels.convert import from_adam, from_authors, to_authors

on_backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu_kernels)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

SIZES = (3, (2, 5), 257, 0, ())
COMMON = {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}
OURS = {**COMMON, "beta1": 0.7, "beta2_range": (0.5, 0.98), "eps_mode": "adam"}


def paper_moments(g, state, names, lower, upper, step):
    """u~, v~ and w after ``g``; beta is its upper bound at the first step."""
    mean, square, w = (state[name] for name in names)
    if step == 1 or lower == upper:
        beta = upper
    else:
        variance = square / w - (mean / w) ** 2
        deviation = (g - mean / w) ** 2
        beta = (deviation + variance) / (w * (deviation - variance) + deviation + variance + 1e-16)
        beta = beta.clamp(lower, upper)
    new = (beta * mean + (1 - beta) * g, beta * square + (1 - beta) * g * g, beta * w + (1 - beta))
    state.update(zip(names, new, strict=True))
    return new


class TheirOptimizer(Optimizer):
    """What the authors' classes share: eager steps on one parameter after the other."""

    def __init__(self, params, step_in_group, **defaults):
        super().__init__(params, {**COMMON, **defaults})
        self.step_in_group = step_in_group

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if self.step_in_group:
                group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update({name: torch.zeros_like(param) for name in self.tensors(group)})
                if self.step_in_group:
                    step = group["step"]
                else:
                    step = state["step"] = state.get("step", 0) + 1
                g = param.grad
                if group.get("lamb"):
                    pass  # the update has it
                elif self.decoupled(group):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                else:
                    g = g + group["weight_decay"] * param
                self.update(param, g, state, group, step)


class TheirMAdam(TheirOptimizer):
    def __init__(self, params, step_in_group=False, **options):
        defaults = {"beta1": 0.7, "beta2_range": (0.5, 0.98), "amsgrad": False, "adamw": True, "moment_warmup": 0}
        unused = {"nesterov": False, "lamb": False, "share_beta": False, "use_sgd": False, "ams_reset_freq": -1}
        super().__init__(params, step_in_group, **{**defaults, **unused, **options})

    def tensors(self, group):
        maximum = ["max_exp_avg_sq"] if group["amsgrad"] else []
        return ["exp_avg", "exp_avg_sq", "exp_avg_grad", "total_w", *maximum]

    def decoupled(self, group):
        return group["adamw"]

    def update(self, param, g, state, group, step):
        names = ("exp_avg", "exp_avg_sq", "total_w")
        _, square, w = paper_moments(g, state, names, *group["beta2_range"], step)
        if step == 1:
            state["total_w"] = 1 - group["beta2_range"][1]  # a number, as in two of their programs
        if step <= group["moment_warmup"]:
            return
        denominator = (square / w).sqrt() + group["eps"]
        if group["amsgrad"]:
            denominator = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], denominator)
        beta1 = group["beta1"]
        m = state["exp_avg_grad"] = beta1 * state["exp_avg_grad"] + (1 - beta1) * g
        change = m / denominator / (1 - beta1 ** (step - group["moment_warmup"]))
        if group["lamb"]:
            change = change + group["weight_decay"] * param
            if group["weight_decay"] > 0 and param.norm() > 0 and change.norm() > 0:
                change = change * (param.norm() / change.norm())
        param.sub_(group["lr"] * change)


class TheirLaMAdam(TheirOptimizer):
    rate = "update_lr_bc"

    def __init__(self, params, **options):
        decay = {"use_adamw": True, "amsgrad": False} if self.rate == "update_lr_bc" else {"use_adam": False}
        super().__init__(params, False, **{"momentum": 0.7, "beta": 0.98, "beta_min": 0.5, **decay, **options})

    def tensors(self, group):
        return ["update_est", "g_est", "g_sq_est", "total_w"]

    def decoupled(self, group):
        return group["use_adamw"]

    def update(self, param, g, state, group, step):
        names = ("g_est", "g_sq_est", "total_w")
        _, square, w = paper_moments(g, state, names, group["beta_min"], group["beta"], step)
        momentum, lr = group["momentum"], group["lr"]
        direction = g / ((square / w).sqrt() + group["eps"])
        state["update_est"] = momentum * state["update_est"] + (1 - momentum) * lr * direction
        state[self.rate] = momentum * state.get(self.rate, 0.0) + (1 - momentum) * lr
        param.sub_(lr / state[self.rate] * state["update_est"])


class FairseqLaMAdam(TheirLaMAdam):
    """Their other program: the average of the learning rate has another name, and use_adam means L2."""

    rate = "update_avg_lr"

    def decoupled(self, group):
        return not group["use_adam"]


THEIRS = {
    "MAdam": (TheirMAdam, {}),
    "MAdam, step in group": (TheirMAdam, {"step_in_group": True}),
    "MAdam, AMSGrad": (TheirMAdam, {"amsgrad": True}),
    "MAdam, L2": (TheirMAdam, {"adamw": False}),
    "MAdam, equal bounds": (TheirMAdam, {"beta2_range": (0.9, 0.9)}),
    "MAdam, trust ratio": (TheirMAdam, {"lamb": True}),
    "MAdam, trust ratio without decay, which is 1": (TheirMAdam, {"lamb": True, "weight_decay": 0.0}),
    "MAdam, moment warm-up": (TheirMAdam, {"moment_warmup": 4}),
    "LaMAdam": (TheirLaMAdam, {}),
    "LaMAdam, L2": (TheirLaMAdam, {"use_adamw": False}),
    "LaMAdam, AMSGrad, which it ignores": (TheirLaMAdam, {"amsgrad": True}),
    "LaMAdam, fairseq": (FairseqLaMAdam, {}),
    "LaMAdam, fairseq, L2": (FairseqLaMAdam, {"use_adam": True}),
}
THEIR_RUNS = pytest.mark.parametrize(("theirs", "options"), list(THEIRS.values()), ids=list(THEIRS))


def ours_of(theirs):
    return MAdam if issubclass(theirs, TheirMAdam) else LaMAdam


def copied(optimizer, dtype):
    """The parameters' values, as a model's checkpoint brings them."""
    return [torch.nn.Parameter(param.detach().to(dtype, copy=True)) for param in params_of(optimizer)]


def cast(state_dict, dtype):
    """What a run in that dtype would have saved."""
    state = {
        index: {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def close(one, other, rtol=1e-5):
    """Parameters, and how far they have moved, agree: those near 0 must not hide behind their size."""
    for a, b in zip(params_of(one), params_of(other), strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=rtol, atol=rtol * COMMON["lr"])


# --- runs that go on -------------------------------------------------------------------------------------------------


@on_backends
@dtypes
@THEIR_RUNS
@pytest.mark.parametrize("stop", [5, 40])
def test_their_run_goes_on_here(theirs, options, stop, dtype, backend):
    """Guards against any moment, count or hyperparameter of the authors' lost or misread. The oracle runs in float64;
    a float32 file is its state rounded."""
    straight = run(theirs(make_params(SIZES, torch.float64), **options), 0, stop)
    saved = through_file(cast(copy.deepcopy(straight.state_dict()), dtype))
    ours = ours_of(theirs)(copied(straight, dtype), lr=9.0, beta1=0.1, eps=1.0, backend=backend)
    ours.load_state_dict(from_authors(saved))
    close(run(straight, stop, stop + 20), run(ours, stop, stop + 20))


@on_backends
@THEIR_RUNS
def test_our_run_goes_on_there(theirs, options, backend):
    """Guards against a state that the authors' classes would read otherwise than we wrote it."""
    fairseq = theirs is FairseqLaMAdam
    l2 = options.get("adamw") is False or options.get("use_adamw") is False or options.get("use_adam") is True
    hyper = {**OURS, "decoupled_weight_decay": not l2, "amsgrad": ours_of(theirs) is MAdam and "amsgrad" in options}
    hyper["weight_decay"] = options.get("weight_decay", COMMON["weight_decay"])
    hyper["trust_ratio"] = options.get("lamb", False) and hyper["weight_decay"] > 0
    hyper["beta2_range"] = options.get("beta2_range", OURS["beta2_range"])
    straight = run(ours_of(theirs)(make_params(SIZES, torch.float64), **hyper, backend=backend), 0, 20)
    there = theirs(copied(straight, torch.float64), lr=9.0, eps=1.0, **options)
    there.load_state_dict(through_file(to_authors(straight.state_dict(), fairseq=fairseq)))
    close(run(straight, 20, 40), run(there, 20, 40))


@on_backends
@dtypes
@pytest.mark.parametrize("adam", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.0}], ids=str)
@pytest.mark.parametrize("stop", [1, 3, 30])
def test_adam_goes_on_as_madam_with_equal_bounds(adam, options, stop, dtype, backend):
    """Guards against a wrong u, s or w, by the exact oracle; also where |m^| > sqrt(v^), which occurs early: there
    u = m^ with s = 0 would give another v."""
    options = {**COMMON, "betas": (0.7, 0.98), **options}
    straight = run(adam(make_params(SIZES, torch.float64), **options), 0, stop)
    saved = through_file(cast(straight.state_dict(), dtype))
    entry = saved["state"][2]
    excess = (entry["exp_avg"] / (1 - 0.7**stop)) ** 2 > 1.05 * entry["exp_avg_sq"] / (1 - 0.98**stop)
    assert excess.any() or stop == 1  # else this would not test it
    ours = MAdam(copied(straight, dtype), backend=backend)
    ours.load_state_dict(from_adam(saved, beta2_range=(0.98, 0.98)))
    close(run(straight, stop, stop + 20), run(ours, stop, stop + 20))


@on_backends
def test_adam_with_amsgrad(backend):
    """Guards against maxima of v~ taken for those of sqrt(v). Once w is near 1, here after 150 steps at 0.9, torch's
    maximum and ours are the same; before, ours starts from torch's denominator of that step."""
    options = {**COMMON, "betas": (0.7, 0.9), "amsgrad": True}
    straight = run(torch.optim.AdamW(make_params(SIZES, torch.float64), **options), 0, 5)
    early = from_adam(straight.state_dict(), beta2_range=(0.9, 0.9))["state"][2]
    denominator = (straight.state_dict()["state"][2]["max_exp_avg_sq"] / (1 - 0.9**5)).sqrt()
    torch.testing.assert_close(early["max_denom"], denominator, rtol=1e-12, atol=0)
    run(straight, 5, 150)
    ours = MAdam(copied(straight, torch.float64), backend=backend)
    ours.load_state_dict(from_adam(straight.state_dict(), beta2_range=(0.9, 0.9)))
    close(run(straight, 150, 170), run(ours, 150, 170))


@pytest.mark.parametrize("fairseq", [False, True])
@pytest.mark.parametrize("algorithm", [MAdam, LaMAdam])
def test_there_and_back(algorithm, fairseq):
    """Guards against what only one direction knows. In float32 v~ loses of s what is below 2^-24 of u^2: three
    roundings of v, and v / s is at most 100 where compared."""
    amsgrad = algorithm is MAdam and not fairseq
    optimizer = run(algorithm([("a", make_params((257,))[0])], **OURS, amsgrad=amsgrad), 0, 20)
    before = optimizer.state_dict()
    before["param_groups"][0]["initial_lr"] = 0.7
    after = from_authors(through_file(to_authors(before, fairseq=fairseq)))
    (group,), (was,) = after["param_groups"], before["param_groups"]
    assert was.keys() - group.keys() <= UNSAID.keys()  # the authors' say nothing of these
    assert group == {name: was[name] for name in group}
    old, new = before["state"][0], after["state"][0]
    assert old.keys() == new.keys()
    steady = old["grad_var"] > 0.01 * (old["grad_var"] + old["grad_mean"] ** 2)
    assert steady.float().mean() > 0.9
    for name, value in old.items():
        assert value.dtype == new[name].dtype, name
        compared = steady if name == "grad_var" else ...
        rtol = 100 * 2**-22 if name == "grad_var" else 2**-21
        torch.testing.assert_close(new[name][compared], value[compared], rtol=rtol, atol=0, msg=name)


@on_backends
def test_a_changed_learning_rate(backend):
    """Guards against a LaMAdam momentum divided by the present rate, where others are still in it: the direction at the
    conversion is theirs. Where momentum has forgotten the change, the run is theirs too."""
    straight = run(TheirLaMAdam(make_params(SIZES, torch.float64)), 0, 8)
    straight.param_groups[0]["lr"] = 0.005
    run(straight, 8, 10)
    saved = straight.state_dict()["state"][2]
    m = from_authors(straight.state_dict())["state"][2]["exp_avg"]
    torch.testing.assert_close(m / (1 - 0.7**10), saved["update_est"] / saved["update_lr_bc"], rtol=1e-12, atol=0)
    run(straight, 10, 60)
    ours = LaMAdam(copied(straight, torch.float64), backend=backend)
    ours.load_state_dict(from_authors(straight.state_dict()))
    close(run(straight, 60, 80), run(ours, 60, 80))


def test_a_learning_rate_without_its_average():
    """Guards against a refusal, or a division by nothing, where a file has neither update_lr_bc nor update_avg_lr."""
    state_dict = run(TheirLaMAdam(make_params((7,), torch.float64)), 0, 5).state_dict()
    expected = from_authors(state_dict)["state"][0]["exp_avg"]
    del state_dict["state"][0]["update_lr_bc"]
    torch.testing.assert_close(from_authors(state_dict)["state"][0]["exp_avg"], expected, rtol=1e-12, atol=0)


# --- what a state dict may look like ---------------------------------------------------------------------------------


def their_dict(theirs=TheirMAdam, sizes=(4,), steps=3, **options):
    return run(theirs(make_params(sizes), **options), 0, steps).state_dict()


def test_formulas_of_adam():
    """Guards against u, s, w other than m^, v^ - m^^2, 1 - beta2^t where m^ is no larger than sqrt(v^)."""
    optimizer = run(torch.optim.Adam(make_params((257,), torch.float64), betas=(0.9, 0.98)), 0, 40)
    saved = optimizer.state_dict()["state"][0]
    m, v = saved["exp_avg"] / (1 - 0.9**40), saved["exp_avg_sq"] / (1 - 0.98**40)
    entry = from_adam(optimizer.state_dict())["state"][0]
    within = m * m < v
    assert within.float().mean() > 0.9
    assert torch.equal(entry["exp_avg"], saved["exp_avg"])
    assert (entry["weight_sum"] == 1 - 0.98**40).all()
    torch.testing.assert_close(entry["grad_mean"][within], m[within], rtol=1e-12, atol=0)
    torch.testing.assert_close(entry["grad_var"][within], (v - m * m)[within], rtol=1e-9, atol=0)
    torch.testing.assert_close(entry["grad_var"] + entry["grad_mean"] ** 2, v, rtol=1e-12, atol=0)


def test_hyperparameters():
    """Guards against a hyperparameter that gets lost or another's place, in any group; names and what users keep in
    groups stay."""
    a, b = make_params((2, 3))
    groups = [{"params": [("a", a)], "initial_lr": 0.3}, {"params": [("b", b)], "lr": 0.2, "eps": 1e-5}]
    adam = torch.optim.AdamW(groups, weight_decay=0.3, betas=(0.8, 0.97), amsgrad=True, maximize=True)
    made = from_adam(run(adam, 0, 1).state_dict(), beta2_range=[0.6, 0.9])["param_groups"]
    loaded = MAdam([("a", a)]).state_dict()["param_groups"][0]
    loaded = {name: value for name, value in loaded.items() if name not in UNSAID}
    common = {"beta1": 0.8, "beta2_range": (0.6, 0.9), "weight_decay": 0.3, "amsgrad": True, "maximize": True}
    common = {**loaded, **common, "eps_mode": "adam", "decoupled_weight_decay": True}
    assert made[0] == {**common, "initial_lr": 0.3}
    assert made[1] == {**common, "lr": 0.2, "eps": 1e-5, "params": [1], "param_names": ["b"]}

    l2 = from_adam(torch.optim.Adam([a], lr=torch.tensor(0.5), betas=(0.8, 0.97)).state_dict())["param_groups"][0]
    assert l2["lr"].item() == 0.5
    assert (l2["decoupled_weight_decay"], l2["beta2_range"], l2["maximize"]) == (False, (0.5, 0.97), False)
    theirs = from_authors(TheirLaMAdam([a], momentum=0.6, beta=0.95, beta_min=0.4).state_dict())["param_groups"][0]
    assert (theirs["beta1"], theirs["beta2_range"], theirs["algorithm"]) == (0.6, (0.4, 0.95), "LaMAdam")
    assert not {"momentum", "beta", "beta_min", "use_adamw"} & theirs.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    """Guards against a state in the file's 16-bit dtype, which ours refuses, or float64 rounded to float32; it loads
    into parameters of that dtype, whose state may also have been float32."""
    for saved in {dtype, torch.float32 if dtype != torch.float64 else dtype}:
        for source in (their_dict(), their_dict(TheirLaMAdam), run(torch.optim.Adam(make_params((4,))), 0, 2)):
            convert = from_adam if isinstance(source, Optimizer) else from_authors
            state_dict = convert(cast(source.state_dict() if isinstance(source, Optimizer) else source, saved))
            expected = torch.float64 if saved == torch.float64 else torch.float32
            entry = state_dict["state"][0]
            assert {n: v.dtype for n, v in entry.items()} == {
                n: torch.int64 if n == "step" else expected for n in entry
            }
            assert entry["step"].shape == ()
            algorithm = LaMAdam if state_dict["param_groups"][0]["algorithm"] == "LaMAdam" else MAdam
            optimizer = algorithm(make_params((4,), dtype))
            optimizer.load_state_dict(state_dict)
            run(optimizer, 3, 4)


def test_parameters_without_state():
    """Guards against state that slips to another parameter, or one made up, where some never had a gradient."""
    for optimizer, convert in (
        (TheirMAdam(make_params((3, 4, 5))), from_authors),
        (TheirMAdam(make_params((3, 4, 5)), step_in_group=True), from_authors),
        (torch.optim.Adam(make_params((3, 4, 5))), from_adam),
    ):
        assert convert(optimizer.state_dict())["state"] == {}
        params = params_of(optimizer)
        set_grads(params[:1] + params[2:], 0)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][1] = {}  # as a look at optimizer.state[param] leaves it
        made = convert(saved)
        assert {index: list(entry["exp_avg"].shape) for index, entry in made["state"].items()} == {0: [3], 2: [5]}
        assert [params for group in made["param_groups"] for params in group["params"]] == [0, 1, 2]
        assert to_authors(made)["state"].keys() == {0, 2}


@pytest.mark.parametrize("step", [4, 4.0, torch.tensor(4), torch.tensor(4.0), torch.tensor([4.0])], ids=repr)
def test_kinds_of_step(step):
    """Guards against a step read only where it is an int."""
    state_dict = their_dict()
    state_dict["state"][0]["step"] = step
    assert from_authors(state_dict)["state"][0]["step"].item() == 4
    del state_dict["state"][0]["step"]
    state_dict["param_groups"][0]["step"] = step
    assert from_authors(state_dict)["state"][0]["step"].item() == 4


def test_a_step_that_one_of_their_programs_left_behind():
    """Guards against a stale count: of what we write, with both, their BERT code goes on in the group and leaves those
    of the parameters, their others do the opposite."""
    state_dict = to_authors(run(MAdam(make_params((3, 4)), **OURS), 0, 6).state_dict())
    assert [entry["step"] for entry in state_dict["state"].values()] == [6, 6]
    assert state_dict["param_groups"][0]["step"] == 6
    ahead = copy.deepcopy(state_dict)
    ahead["param_groups"][0]["step"] = 8
    assert [entry["step"].item() for entry in from_authors(ahead)["state"].values()] == [8, 8]
    state_dict["state"][0]["step"], state_dict["state"][1]["step"] = 9, 5
    assert [entry["step"].item() for entry in from_authors(state_dict)["state"].values()] == [9, 5]


def test_zero_state():
    """Guards against 0 / 0 where nothing has been stepped: the first step is Eq. 7's there."""
    for source, convert in ((their_dict(), from_authors), (their_dict(TheirLaMAdam), from_authors)):
        entry = source["state"][0]
        for name, value in entry.items():
            entry[name] = torch.zeros(4) if name == "total_w" or torch.is_tensor(value) else 0
        made = convert(source)["state"][0]
        assert not any(value.any() for value in made.values())
    adam = run(torch.optim.Adam(make_params((4,)), amsgrad=True), 0, 1).state_dict()
    for value in adam["state"][0].values():
        value.zero_()
    assert not any(value.any() for value in from_adam(adam)["state"][0].values())


def test_rounding_of_a_float32_file():
    """Guards against s = v~/w - (u~/w)^2 computed in float32, where it cancels, and a w that rounding took above 1."""
    state_dict = their_dict()
    entry = state_dict["state"][0]
    w = torch.tensor([0.3, 0.7, 0.9, 1 + 2**-23])
    entry.update(exp_avg=100 * w, exp_avg_sq=(1e4 + 1) * w, total_w=w)
    mean, square = (entry[name].double() / w.double().clamp(max=1) for name in ("exp_avg", "exp_avg_sq"))
    made = from_authors(state_dict)["state"][0]
    torch.testing.assert_close(made["grad_var"], (square - mean**2).clamp(min=0).float(), rtol=2**-22, atol=0)
    assert made["weight_sum"].tolist() == [*w[:3].tolist(), 1]


def test_tiny_and_broken_numbers():
    """Guards against subnormal state, on which CPUs crawl, and NaN or infinity turned into something harmless."""
    state_dict = their_dict()
    for name, values in {
        "exp_avg_grad": [1e-44, 1.0, torch.nan, 0.0],
        "exp_avg": [1e-44, 1.0, torch.nan, 0.5],
        "exp_avg_sq": [1e-44, 1.0, 1.0, torch.inf],
        "total_w": [1.0, torch.nan, 1.0, 0.5],
    }.items():
        state_dict["state"][0][name] = torch.tensor(values)
    made = from_authors(state_dict)["state"][0]
    assert made["exp_avg"].nan_to_num(nan=7.0).tolist() == [0, 1, 7, 0]
    assert made["grad_mean"].nan_to_num(nan=7.0).tolist() == [0, 7, 7, 1]
    assert made["grad_var"].nan_to_num(nan=7.0, posinf=8.0).tolist() == [0, 7, 7, 8]
    adam = run(torch.optim.Adam(make_params((3,))), 0, 2).state_dict()
    adam["state"][0]["exp_avg"] = torch.tensor([torch.nan, 1e-44, 1.0])
    adam["state"][0]["exp_avg_sq"] = torch.tensor([1.0, 1e-44, torch.nan])
    made = from_adam(adam)["state"][0]
    assert made["grad_mean"].isnan().tolist() == made["grad_var"].isnan().tolist() == [True, False, True]
    assert made["exp_avg"][1] == made["grad_mean"][1] == made["grad_var"][1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_is_changed_or_shared(dtype):
    """Guards against a source that a step on the converted state would write to, as `to` shares where no dtype
    changes; other entries of the dict stay."""
    adam = run(torch.optim.Adam(make_params((4,), dtype), amsgrad=True), 0, 2).state_dict()
    ours = run(MAdam(make_params((4,), dtype), amsgrad=True), 0, 2).state_dict()
    laprop = run(LaMAdam(make_params((4,), dtype), lr=1.0), 0, 2).state_dict()
    theirs = cast(their_dict(amsgrad=True), dtype)
    for source, convert in ((adam, from_adam), (theirs, from_authors), (ours, to_authors), (laprop, to_authors)):
        source["loss_scale"] = 128
        source["param_groups"][0]["lr"] = torch.tensor(0.5)
        before = copy.deepcopy(source)
        made = convert(source)
        assert made["loss_scale"] == 128
        for value in made["state"][0].values():
            if torch.is_tensor(value):
                value.fill_(3)
        made["param_groups"][0]["lr"].fill_(3)
        made["param_groups"][0]["params"].clear()
        assert source["param_groups"] == before["param_groups"]
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(before["state"][0][n]))
            for n, v in source["state"][0].items()
        )


# --- what is refused -------------------------------------------------------------------------------------------------


def edited(state_dict, *, group=None, state=None, drop=()):
    """The dict with entries of its first group and first state changed or dropped."""
    state_dict = copy.deepcopy(state_dict)
    state_dict["param_groups"][0].update(group or {})
    if state_dict["state"]:
        state_dict["state"][0].update(state or {})
    for name in drop:
        state_dict["param_groups"][0].pop(name, None)
        if state_dict["state"]:
            state_dict["state"][0].pop(name, None)
    return state_dict


def torch_dict(optimizer=torch.optim.Adam, **options):
    return run(optimizer(make_params((4,)), **options), 0, 2).state_dict()


REFUSED = {
    "no state dict": (from_authors, lambda: {"model": 1}, ["'state'", "'param_groups'", "['model']"]),
    "no dict": (from_adam, lambda: [1], ["type list"]),
    "nobody's": (from_authors, lambda: torch_dict(torch.optim.SGD, momentum=0.9), ["'nesterov'", "'momentum_buffer'"]),
    "RAdam": (from_adam, lambda: torch_dict(torch.optim.RAdam), ["Adam or AdamW", "'betas'"]),
    "NAdam": (from_adam, lambda: torch_dict(torch.optim.NAdam), ["'momentum_decay'", "'mu_product'"]),
    "Adam as theirs": (from_authors, torch_dict, ["authors' LaMAdam", "'betas'", "it is of torch.optim.Adam"]),
    "theirs as Adam": (from_adam, their_dict, ["'beta2_range'", "it is of the authors' MAdam"]),
    "theirs as ours": (to_authors, their_dict, ["of this package", "'total_w'"]),
    "ours as theirs": (from_authors, lambda: torch_dict(MAdam), ["it is of this package"]),
    "mixed groups": (
        from_authors,
        lambda: {"state": {}, "param_groups": their_dict()["param_groups"] + torch_dict()["param_groups"]},
        ["param_groups[0]", "'beta2_range'"],
    ),
    "no groups": (from_authors, lambda: {"state": {}, "param_groups": []}, ["no groups"]),
    "another's state": (
        from_authors,
        lambda: {**their_dict(), "state": torch_dict()["state"]},
        ["parameter 0", "'exp_avg_grad'", "has ['exp_avg', 'exp_avg_sq', 'step']"],
    ),
    "state of nobody": (
        from_authors,
        lambda: {**their_dict(), "state": {5: their_dict()["state"][0]}},
        ["parameter 5", "remove"],
    ),
    "no step": (from_authors, lambda: edited(their_dict(), drop=["step"]), ["parameter 0", "step"]),
    "half a step": (from_authors, lambda: edited(their_dict(), state={"step": 1.5}), ["whole number", "1.5"]),
    "negative step": (from_adam, lambda: edited(torch_dict(), state={"step": torch.tensor(-1.0)}), ["whole number"]),
    "infinite step": (from_adam, lambda: edited(torch_dict(), state={"step": torch.inf}), ["whole number"]),
    "many steps": (from_adam, lambda: edited(torch_dict(), state={"step": torch.ones(2)}), ["whole number"]),
    "wrong shape": (
        from_authors,
        lambda: edited(their_dict(), state={"exp_avg_sq": torch.ones(5)}),
        ["parameter 0", "one shape", "'exp_avg_sq': [5]"],
    ),
    "wrong weights": (from_authors, lambda: edited(their_dict(), state={"total_w": torch.ones(5)}), ["'total_w': [5]"]),
    "weights above 1": (from_authors, lambda: edited(their_dict(), state={"total_w": 1.5}), ["total_w", "1.5"]),
    "negative weights": (from_authors, lambda: edited(their_dict(), state={"total_w": -1}), ["total_w", "-1"]),
    "integers": (from_adam, lambda: edited(torch_dict(), state={"exp_avg": torch.ones(4).int()}), ["torch.int32"]),
    "no tensor": (from_authors, lambda: edited(their_dict(), state={"exp_avg_sq": [1]}), ["exp_avg_sq", "a list"]),
    "nesterov": (from_authors, lambda: edited(their_dict(), group={"nesterov": True}), ["param_groups[0]", "nesterov"]),
    "share_beta": (from_authors, lambda: edited(their_dict(), group={"share_beta": True}), ["share_beta"]),
    "LaMAdam's nesterov": (from_authors, lambda: edited(their_dict(TheirLaMAdam), group={"nesterov": 1}), ["nesterov"]),
    "lamb that decays twice": (
        from_authors,
        lambda: their_dict(lamb=True, adamw=False),
        ["lamb=True", "set lamb to False"],
    ),
    "a trust ratio that would be 1": (
        to_authors,
        lambda: torch_dict(MAdam, trust_ratio=True, weight_decay=0.0),
        ["trust_ratio=True"],
    ),
    "LaMAdam's trust ratio": (to_authors, lambda: torch_dict(LaMAdam, trust_ratio=True), ["trust_ratio=True"]),
    "in moment warm-up": (from_authors, lambda: their_dict(moment_warmup=3), ["step 3 of moment_warmup=3"]),
    "update without rate": (
        from_authors,
        lambda: edited(their_dict(TheirLaMAdam), state={"update_lr_bc": 0.0}),
        ["update_est", "['lr']"],
    ),
    "kind of decay": (
        from_adam,
        lambda: edited(torch_dict(weight_decay=0.1), drop=["decoupled_weight_decay"]),
        ["weight_decay=0.1", "pass decoupled_weight_decay"],
    ),
    "MAdam's kind of decay": (from_authors, lambda: edited(their_dict(), drop=["adamw"]), ["set its adamw"]),
    "LaMAdam's kind of decay": (
        from_authors,
        lambda: edited(their_dict(TheirLaMAdam), drop=["use_adamw"]),
        ["set its use_adamw"],
    ),
    "bounds of another order": (
        from_authors,
        lambda: edited(their_dict(), group={"beta2_range": (0.9, 0.5)}),
        ["param_groups[0]", "beta2_range"],
    ),
    "beta2 below 0.5": (from_adam, lambda: torch_dict(betas=(0.9, 0.3)), ["beta2_range", "(0.5, 0.3)"]),
    "maximize": (to_authors, lambda: torch_dict(MAdam, maximize=True), ["maximize"]),
    "LaMAdam's AMSGrad": (to_authors, lambda: torch_dict(LaMAdam, amsgrad=True), ["amsgrad"]),
    "fairseq's AMSGrad": (
        lambda state_dict: to_authors(state_dict, fairseq=True),
        lambda: torch_dict(MAdam, amsgrad=True),
        ["amsgrad"],
    ),
    "master weights": (
        to_authors,
        lambda: run(MAdam(make_params((4,), torch.bfloat16), master_weights=True), 0, 2).state_dict(),
        ["param_groups[0]", "master_weights=True"],
    ),
    "LaMAdam's stochastic rounding": (
        to_authors,
        lambda: run(LaMAdam(make_params((4,), torch.bfloat16), stochastic_rounding=True), 0, 2).state_dict(),
        ["stochastic_rounding=True"],
    ),
    "LaMAdam at rate 0": (to_authors, lambda: torch_dict(LaMAdam, lr=0.0), ["lr=0"]),
}


@pytest.mark.parametrize(("convert", "make", "words"), list(REFUSED.values()), ids=list(REFUSED))
def test_refused(convert, make, words):
    """Guards against a file of another kind, or one whose run could not go on, converted to something that loads."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011 -- the words are checked below
        convert(make())
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_old_adam_says_its_decay_by_argument():
    """Guards against AdamW taken for Adam where the checkpoint is older than torch's key; without decay it is all one,
    and what the checkpoint says goes first."""
    old = edited(torch_dict(weight_decay=0.1), drop=["decoupled_weight_decay", "maximize"])
    for said in (True, False):
        assert from_adam(old, decoupled_weight_decay=said)["param_groups"][0]["decoupled_weight_decay"] is said
    from_adam(edited(torch_dict(), drop=["decoupled_weight_decay"]))
    new = from_adam(torch_dict(weight_decay=0.1), decoupled_weight_decay=True)
    assert new["param_groups"][0]["decoupled_weight_decay"] is False


# --- the command -----------------------------------------------------------------------------------------------------


def command(monkeypatch, *arguments):
    """The command in this process; what it exits with, None where all went well."""
    monkeypatch.setattr(sys, "argv", ["maxva_kernels", "convert", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return None


def test_command_both_ways(tmp_path):
    """Guards against a command that works only when called from Python: a fairseq checkpoint here and back, whose other
    entries must stay, and whose optimizer then goes on."""
    theirs = run(TheirMAdam(make_params(SIZES)), 0, 4)
    rest = {"args": argparse.Namespace(lr=[0.1]), "model": {"weight": torch.ones(2)}, "extra_state": {"epoch": 3}}
    files = [tmp_path / name for name in ("theirs.pt", "ours.pt", "back.pt")]
    checkpoint = {**rest, "last_optimizer_state": theirs.state_dict()}
    torch.save(checkpoint, files[0], _use_new_zipfile_serialization=False)  # the format of their time
    for source, target in itertools.pairwise(files):
        line = [sys.executable, "-m", "maxva_kernels", "convert", source, target]
        result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "last_optimizer_state" in result.stdout
        assert "5 parameters" in result.stdout
        assert str(target) in result.stdout
    assert sorted(tmp_path.iterdir()) == sorted(files)  # nothing partial beside them
    ours, back = (torch.load(file, weights_only=False) for file in files[1:])
    assert ours["args"] == rest["args"]
    assert ours["extra_state"] == rest["extra_state"]
    assert torch.equal(ours["model"]["weight"], torch.ones(2))
    loaded = MAdam(copied(theirs, torch.float32))
    loaded.load_state_dict(ours["last_optimizer_state"])
    again = TheirMAdam(copied(theirs, torch.float32))
    again.load_state_dict(back["last_optimizer_state"])
    run(theirs, 4, 8)
    close(theirs, run(loaded, 4, 8))
    close(theirs, run(again, 4, 8))


def test_command_options(tmp_path, monkeypatch, capsys):
    """Guards against options that do not arrive, or are ignored where they mean nothing."""
    old = edited(torch_dict(weight_decay=0.1), drop=["decoupled_weight_decay"])
    adam, madam, laprop, out = (tmp_path / name for name in ("adam.pt", "madam.pt", "laprop.pt", "out.pt"))
    torch.save(old, adam)
    torch.save(torch_dict(MAdam), madam)
    torch.save({"optimizers": [torch_dict(LaMAdam)]}, laprop)
    assert "pass decoupled_weight_decay" in command(monkeypatch, adam, out)
    assert not out.exists()
    assert command(monkeypatch, adam, out, "--decoupled-weight-decay", "--beta2-range", "0.6", "0.9") is None
    group = torch.load(out)["param_groups"][0]
    assert (group["beta2_range"], group["decoupled_weight_decay"]) == ((0.6, 0.9), True)
    before = out.read_bytes()
    assert "--overwrite" in command(monkeypatch, laprop, out, "--fairseq")
    assert out.read_bytes() == before
    assert command(monkeypatch, laprop, out, "--fairseq", "--overwrite") is None
    assert "['optimizers'][0]" in capsys.readouterr().out
    assert "update_avg_lr" in torch.load(out)["optimizers"][0]["state"][0]
    assert "--fairseq is for" in command(monkeypatch, adam, tmp_path / "no.pt", "--fairseq")
    assert "--beta2-range" in command(monkeypatch, madam, tmp_path / "no.pt", "--beta2-range", "0.6", "0.9")
    assert command(monkeypatch, madam, madam, "--overwrite") is None  # in its own place
    assert "total_w" in torch.load(madam)["state"][0]
    assert not (tmp_path / "no.pt").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"weight": torch.ones(1)}, "epoch": 1}, ["none", "['epoch', 'model']"]),
        (torch.ones(1), ["none", "a Tensor"]),
        ({"a": torch_dict(), "b": [torch_dict()]}, ["several", "['a'], ['b'][0]"]),
        ({"optimizer": torch_dict(torch.optim.SGD)}, ["['optimizer']", "'nesterov'", "authors' LaMAdam or torch"]),
        ({"optimizer": torch_dict(), "thing": copy.copy}, ["tensors and plain values", "maxva_kernels.convert"]),
        ({"optimizer": {**torch_dict(), "state": [1]}}, ["['optimizer']", "not as an optimizer leaves it", "list"]),
        ([{**torch_dict(), "param_groups": None}], ["[0]", "not as an optimizer leaves it"]),
        (edited(torch_dict(), group={"betas": None}), ["in.pt", "not as an optimizer leaves it", "NoneType"]),
    ],
    ids=["no optimizer", "a tensor", "several", "nobody's", "code", "state", "groups", "group"],
)
def test_command_refuses(tmp_path, monkeypatch, content, words):
    """Guards against a file written from what is not understood, and a message without the keys that were found."""
    torch.save(content, tmp_path / "in.pt")
    message = command(monkeypatch, tmp_path / "in.pt", tmp_path / "out.pt")
    assert all(word in message for word in words), message
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_command_on_files_that_cannot_be_read_or_written(tmp_path, monkeypatch):
    """Guards against a traceback, and a partial file where writing stops."""
    (tmp_path / "text.pt").write_text("hello")
    assert "cannot be loaded" in command(monkeypatch, tmp_path / "text.pt", tmp_path / "out.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "cannot be loaded" in command(monkeypatch, tmp_path / "empty.pt", tmp_path / "out.pt")
    assert "missing.pt" in command(monkeypatch, tmp_path / "missing.pt", tmp_path / "out.pt")
    torch.save(torch_dict(), tmp_path / "in.pt")
    assert "nowhere" in command(monkeypatch, tmp_path / "in.pt", tmp_path / "nowhere" / "out.pt")

    def full(value, file):
        file.write(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", full)
    assert "no space left" in command(monkeypatch, tmp_path / "in.pt", tmp_path / "out.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.pt", "in.pt", "text.pt"]


def test_command_that_is_ended_leaves_no_partial_file(tmp_path, monkeypatch):
    """Guards disks from hidden gigabytes, which a job that ran out of time would leave."""
    torch.save(torch_dict(), tmp_path / "in.pt")
    monkeypatch.setattr(torch, "save", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert command(monkeypatch, tmp_path / "in.pt", tmp_path / "out.pt") == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_command_leaves_rights_and_links(tmp_path, monkeypatch):
    """Guards against a private checkpoint that all may read afterwards, a link replaced by a file, a link to nowhere
    written through unasked, and devices."""
    files = kept, link, lost, out = [tmp_path / name for name in ("kept.pt", "link.pt", "lost.pt", "out.pt")]
    torch.save(torch_dict(MAdam), kept)
    kept.chmod(0o640)
    link.symlink_to("kept.pt")
    assert "--overwrite" in command(monkeypatch, kept, link)
    assert command(monkeypatch, link, link, "--overwrite") is None
    assert link.is_symlink()
    assert "total_w" in torch.load(kept)["state"][0]
    assert kept.stat().st_mode & 0o777 == 0o640
    lost.symlink_to("elsewhere.pt")
    assert "--overwrite" in command(monkeypatch, kept, lost)
    before = os.umask(0o027)
    try:
        assert command(monkeypatch, kept, out) is None
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    assert "no file" in command(monkeypatch, kept, tmp_path / "pipe", "--overwrite")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(tmp_path.iterdir()) == sorted([*files, tmp_path / "pipe"])
