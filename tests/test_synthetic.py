"""The paper's synthetic experiments, `bench/nonconvex.py` and `bench/quadratic.py`, shortened to seconds."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest
import torch
from cases import needs_cpu_kernels

from maxva_kernels import MAdam

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import nonconvex
import quadratic

RUNS = 40


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are small: threads would wait for each other, on a busy machine for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_objective_and_gradients_of_eq_11():
    """Guards against a wrong branch or sign: the eleven functions, written out, against f and what a step is given."""
    theta = torch.tensor([-3.0, -1.0, -0.4, 0.0, 0.7, 1.0, 2.5], dtype=torch.float64, requires_grad=True)
    inside = theta.abs() <= 1
    first = torch.where(inside, 5.5 * theta**2, 11 * theta.abs() - 5.5)
    other = torch.where(inside, -0.5 * theta**2, 0.5 - theta.abs())
    torch.testing.assert_close(nonconvex.objective(theta), first + 10 * other)
    for function, is_first in ((first, True), (other, False)):
        (grad,) = torch.autograd.grad(function.sum(), theta)
        torch.testing.assert_close(nonconvex.gradient(theta, torch.tensor(is_first)), grad)


def test_objective_and_gradient_of_eq_12():
    """Guards against a factor lost: without noise the gradient is that of the loss; with noise its standard deviation
    is h sigma, as the paper says."""
    h, sigma = torch.tensor([1.0, 20.0], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    theta = torch.tensor([[0.3, -0.1]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(quadratic.objective(theta, h).sum(), theta)
    torch.testing.assert_close(quadratic.gradient(theta, h, sigma, torch.zeros(1, 2)), grad)
    noise = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    moved = quadratic.gradient(theta, h, sigma, noise)
    torch.testing.assert_close(moved, grad + torch.tensor([[-0.2, 8.0]], dtype=torch.float64))


def test_sums_by_hand():
    """Guards against v of another step or without its bias correction: S1 and S2 of steps 1 and 2 from the gradients.

    At step 1 v is g^2. Then Adam's is (0.09 g1^2 + 0.1 g2^2) / 0.19; AMSGrad divides by the larger of that and
    0.1 g1^2 / 0.19; MAdam's beta is 1/(2 - 0.9) = 10/11, which makes the mean of both squares.
    """
    for name in nonconvex.OPTIMIZERS:
        make, rate = nonconvex.OPTIMIZERS[name]
        g1, g2 = (grads[0].clone() for _, _, grads, _ in nonconvex.walk(make, (rate,), RUNS, 2))
        adam = (0.09 * g1**2 + 0.1 * g2**2) / 0.19
        v2 = {"Adam": adam, "AMSGrad": adam.maximum(0.1 * g1**2 / 0.19), "MAdam": (g1**2 + g2**2) / 2}[name]
        first, last = 1 / g1.abs(), v2.rsqrt()
        s1, s2 = 1 + g2**2 / v2, first + (last - first).abs()
        record = nonconvex.follow(name, runs=RUNS, steps=2)
        assert record["T"] == [1, 2]
        assert record["S1"]["median"] == pytest.approx([1, s1.quantile(0.5).item()], rel=1e-6), name
        assert record["S2"]["median"] == pytest.approx([first.quantile(0.5).item(), s2.quantile(0.5).item()]), name
        assert record["S2"]["standard_error"][1] == pytest.approx(s2.std(correction=0).item() / RUNS**0.5), name


def test_adam_diverges_where_amsgrad_and_madam_converge():
    """Guards against a MAdam that forgets the rare strong gradient, as Adam does: its beta must go up to 1."""
    records = {name: nonconvex.follow(name, runs=RUNS, steps=3000) for name in nonconvex.OPTIMIZERS}
    f = {name: record["f"]["median"] for name, record in records.items()}
    assert records["Adam"]["verdict"] == "diverged"
    assert f["Adam"][-1] > 100 * f["Adam"][0]
    for name in ("AMSGrad", "MAdam"):
        assert f[name][-1] < 0.1, name
        assert records[name]["runs_below_1e-4"] > 0, name
    assert f["MAdam"][-1] < f["AMSGrad"][-1]
    assert records["MAdam"]["S1"]["median"][-1] < records["AMSGrad"]["S1"]["median"][-1]


def test_madam_with_equal_bounds_is_the_adam_that_diverges():
    """Guards against a difference that is not the algorithm's: with both bounds at 0.9 MAdam is torch's Adam."""
    make, rate = nonconvex.OPTIMIZERS["Adam"]
    pairs = zip(
        nonconvex.walk(make, (rate,), RUNS, 200),
        nonconvex.walk(
            lambda groups: MAdam(groups, beta1=0.0, beta2_range=(0.9, 0.9), eps_mode="adam"), (rate,), RUNS, 200
        ),
        strict=True,
    )
    for (_, adam, _, _), (_, madam, _, _) in pairs:
        torch.testing.assert_close(madam, adam, rtol=0, atol=1e-9)


def test_verdicts():
    """Guards against an undecided run called a success: one run that stays away is enough, and so is a fall to 0.1."""

    def verdict(below, last):
        return nonconvex.verdict({"runs_below_1e-4": below, "f": {"median": [2.3, last]}}, runs=10)

    assert [verdict(10, 0.0), verdict(9, 0.0), verdict(0, 0.1), verdict(0, 99.0)] == [
        "converged",
        "undecided",
        "undecided",
        "diverged",
    ]


@needs_cpu_kernels
def test_madam_beats_the_best_adam_on_the_noisy_quadratic():
    """Guards against a beta that gains nothing: the paper has 30 to 40 % less loss than the best Adam."""
    (found,) = quadratic.compare(runs=300, settings=quadratic.SETTINGS[:1])
    best = {name: one["best"] for name, one in found["optimizers"].items()}
    assert 2e-3 < best["Adam"]["mean"] < 7e-3
    for name in ("MAdam (0.5, 0.99)", "MAdam (0.5, 0.999)"):
        assert best[name]["mean"] < 0.7 * best["Adam"]["mean"], name
        assert best[name]["standard_error"] < best["Adam"]["standard_error"], name


def test_the_best_is_found_where_it_is():
    """Guards against rows taken for other settings' rows: losses whose best learning rate and beta are known."""
    options = quadratic.ADAM
    losses = torch.stack(
        [torch.tensor([each["lr"], each["betas"][1]]).sub(0.9).abs().sum().expand(200) for each in options]
    )
    losses = losses + torch.linspace(0, 1, 200)  # the second batch of 100 is worse
    found = quadratic.summary(losses, options)
    assert (found["best"]["lr"], found["best"]["betas"]) == (0.2, (0.9, 0.9))
    assert [row["lr"] for row in found["by_rate"]] == list(quadratic.RATES)
    assert all(row["betas"] == (0.9, 0.9) for row in found["by_rate"])
    assert found["batches"] == pytest.approx([0.7 + 49.5 / 199, 0.7 + 149.5 / 199])
    assert found["best"]["mean"] == pytest.approx(1.2)
    deviation = statistics.stdev(i / 199 for i in range(200))  # of all rates the same
    for row in (found["best"], *found["by_rate"]):
        assert row["standard_error"] == pytest.approx(deviation / 200**0.5)
