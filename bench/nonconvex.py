"""Where Adam diverges: the stochastic problem of Section 4.1 of the paper (Eq. 11, Figure 2).

    python bench/nonconvex.py [--out DIR]        two minutes

f is a sum of eleven functions of one variable, and a step sees the gradient of one of them, drawn at random. Ten push
weakly away from the only minimum, theta = 0, one pulls strongly towards it, so what matters is for how long an
optimizer remembers the strong one. Printed, at step T, are medians over 100 runs with standard errors (standard
deviation over runs / sqrt(runs)) of f and of what the paper plots beside it, without learning rates,

    S1 = sum over t <= T of |g_t / sqrt(v_t)|^2             S2 = sum over t <= T of |1/sqrt(v_t) - 1/sqrt(v_(t-1))|

with the bias-corrected v_t that the step divides by (AMSGrad: its maximum), and 1/sqrt(v_0) = 0. Then the same problem
at other learning rates. All runs are coordinates of one float64 tensor, and all optimizers see the same draws.

Adam and AMSGrad are `torch.optim.Adam`: `MAdam` with both bounds at 0.9 is the same Adam (tests/test_synthetic.py), but
torch's is the one that people mean, and its AMSGrad keeps the maximum of the uncorrected v.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import plots
import torch
from torch import Tensor
from torch.optim import Optimizer

from maxva_kernels import MAdam

START, RUNS, STEPS = 2.0, 100, 100_000
BETA = 0.9
NEAR = 1e-4  # of the minimum; the authors' script ends the axis of f there
RATES, SWEEP_STEPS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6), 10_000
# alpha = 0: no momentum. The learning rates are the paper's.
OPTIMIZERS: dict[str, tuple[Callable[[Any], Optimizer], float]] = {
    "Adam": (lambda groups: torch.optim.Adam(groups, betas=(0.0, BETA)), 0.8),
    "AMSGrad": (lambda groups: torch.optim.Adam(groups, betas=(0.0, BETA), amsgrad=True), 0.8),
    "MAdam": (lambda groups: MAdam(groups, beta1=0.0, beta2_range=(0.5, 1.0)), 1.2),
}


def objective(theta: Tensor) -> Tensor:
    """f, the sum of Eq. 11: theta^2 / 2 within [-1, 1], |theta| - 1/2 outside."""
    size = theta.abs()
    return torch.where(size <= 1, 0.5 * theta**2, size - 0.5)


def gradient(theta: Tensor, is_first: Tensor) -> Tensor:
    """Of the function with index 1 where ``is_first``, elsewhere of any of the ten others, which are all the same."""
    return torch.where(is_first, 11.0, -1.0) * theta.clamp(-1, 1)


def second_moment(optimizer: Optimizer, param: Tensor) -> Tensor:
    """The bias-corrected v by whose square root the last step divided."""
    state = optimizer.state[param]
    if isinstance(optimizer, MAdam):
        return state["grad_var"] + state["grad_mean"] ** 2
    return state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1 - BETA ** state["step"].item())


def walk(
    make: Callable[[Any], Optimizer], rates: tuple[float, ...], runs: int, steps: int
) -> Iterator[tuple[int, Tensor, Tensor, Optimizer]]:
    """After each step t: t, theta and the gradients, one row for each learning rate, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.full((len(rates), runs), START, dtype=torch.float64)
    grads = torch.empty_like(theta)
    params = [torch.nn.Parameter(row) for row in theta]  # views: a step on them all moves theta
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = make([{"params": [param], "lr": rate} for param, rate in zip(params, rates, strict=True)])
    for t in range(1, steps + 1):
        is_first = torch.randint(11, (runs,), generator=generator) == 0
        grads.copy_(gradient(theta, is_first))
        optimizer.step()
        yield t, theta, grads, optimizer


def earlier(first: Tensor, t: int, f: Tensor) -> Tensor:
    """The step at which f first fell below `NEAR`, infinite before that, brought up to step t."""
    return first.minimum(torch.where(f < NEAR, float(t), math.inf))


def finite(values: Tensor) -> list[float | None]:
    """JSON has no infinity."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _median(x: Tensor) -> Tensor:
    """Over runs; torch's own takes the lower of the two in the middle."""
    ordered = x.sort(-1).values
    n = x.shape[-1]
    return (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2


def follow(name: str, runs: int = RUNS, steps: int = STEPS) -> dict[str, Any]:
    """One optimizer at the paper's learning rate, at steps of equal distance on a log scale."""
    make, rate = OPTIMIZERS[name]
    kept = {round(10 ** (i / 20)) for i in range(20 * 6)} | {steps}
    record: dict[str, Any] = {"lr": rate, "T": []}
    s1 = s2 = last = torch.zeros(1, runs)
    first = torch.full((1, runs), math.inf)
    for t, theta, grads, optimizer in walk(make, (rate,), runs, steps):
        (param,) = optimizer.param_groups[0]["params"]
        f, inverse = objective(theta), second_moment(optimizer, param).rsqrt()
        s1 = s1 + (grads * inverse) ** 2
        s2 = s2 + (inverse - last).abs()
        last = inverse
        first = earlier(first, t, f)
        if t in kept:
            record["T"].append(t)
            for key, value in (("f", f), ("S1", s1), ("S2", s2)):
                lists = record.setdefault(key, {"median": [], "standard_error": []})
                lists["median"].append(_median(value).item())
                lists["standard_error"].append((value.std(correction=0) / math.sqrt(runs)).item())
    record["runs_below_1e-4"] = (f < NEAR).sum().item()
    (record["median_first_step_below_1e-4"],) = finite(_median(first))
    record["verdict"] = verdict(record, runs)
    return record


def verdict(record: dict[str, Any], runs: int = RUNS) -> str:
    """Converged: every run ended below 1e-4. Diverged: none did, and the median ended above the start."""
    if record["runs_below_1e-4"] == runs:
        return "converged"
    start = objective(torch.tensor(START)).item()
    if record["runs_below_1e-4"] == 0 and record["f"]["median"][-1] > start:
        return "diverged"
    return "undecided"


def sweep(name: str, runs: int = RUNS, steps: int = SWEEP_STEPS) -> list[dict[str, Any]]:
    """The same optimizer at several learning rates: how soon the median run is near the minimum, and how many stay."""
    first = torch.full((len(RATES), runs), math.inf)
    for t, theta, _, _ in walk(OPTIMIZERS[name][0], RATES, runs, steps):
        f = objective(theta)
        first = earlier(first, t, f)
    near = (f < NEAR).sum(-1).tolist()
    return [
        {"name": name, "lr": rate, "median_first_step_below_1e-4": median, "runs_below_1e-4": count}
        for rate, median, count in zip(RATES, finite(_median(first)), near, strict=True)
    ]


def draw(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    titles = {
        "f": r"$f(\theta)$",
        "S1": r"$S_1=\sum_t |g_t/\sqrt{v_t}|^2$",
        "S2": r"$S_2=\sum_t |1/\sqrt{v_t}-1/\sqrt{v_{t-1}}|$",
    }
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for name, one in record["optimizers"].items():
            median, error = (torch.tensor(one[key][what]) for what in ("median", "standard_error"))
            colour = plots.COLOURS[name]
            axes.plot(one["T"], median, color=colour, label=f"{name}, lr {one['lr']}")
            # A lower end at or below 0 has no place on a log scale.
            low = (median - error).clamp(min=1e-30)
            axes.fill_between(one["T"], low, median + error, color=colour, alpha=0.2, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="step", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylim(NEAR, 1e5)
    figure.axes[2].set_ylim(bottom=0.5)
    figure.axes[0].legend()
    figure.suptitle(f"Medians and standard errors of {RUNS} runs on the problem of Eq. 11")
    return figure


def main() -> None:
    args = plots.parse(__doc__)
    torch.set_num_threads(1)  # the tensors are too small to share
    begin = time.perf_counter()
    record: dict[str, Any] = {"runs": RUNS, "steps": STEPS, "start": START}
    record["optimizers"] = {name: follow(name) for name in OPTIMIZERS}
    record["sweep_steps"] = SWEEP_STEPS
    record["sweep"] = [row for name in OPTIMIZERS for row in sweep(name)]
    record["seconds"] = time.perf_counter() - begin

    print(f"f, S1, S2: medians over {RUNS} runs, standard errors in brackets\n")
    print("| | lr | T | f | S1 | S2 |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, one in record["optimizers"].items():
        for t in (10, 100, 1000, 10_000, STEPS):
            i = one["T"].index(t)
            cells = [f"{one[key]['median'][i]:.3g} ({one[key]['standard_error'][i]:.2g})" for key in ("f", "S1", "S2")]
            print(f"| {name} | {one['lr']} | {t:,} | {' | '.join(cells)} |")
    print()
    for name, one in record["optimizers"].items():
        first = one["median_first_step_below_1e-4"]
        print(
            f"{name}: {one['verdict']}; final median f {one['f']['median'][-1]:.3g}, standard error "
            f"{one['f']['standard_error'][-1]:.3g}; {one['runs_below_1e-4']} of {RUNS} runs end below 1e-4, the median "
            f"run is there {'never' if first is None else f'at step {first:,.0f}'}"
        )
    print(f"\nBy learning rate: step at which the median run is first below 1e-4; runs below at step {SWEEP_STEPS:,}\n")
    print(f"| lr | {' | '.join(f'{rate:g}' for rate in RATES)} |\n| --- |{' ---: |' * len(RATES)}")
    for name in OPTIMIZERS:
        cells = []
        for row in record["sweep"]:
            if row["name"] == name:
                first = row["median_first_step_below_1e-4"]
                cells.append(f"{'-' if first is None else f'{first:,.0f}'}; {row['runs_below_1e-4']}")
        print(f"| {name} | {' | '.join(cells)} |")
    plots.write(args, "nonconvex", record, draw)


if __name__ == "__main__":
    main()
