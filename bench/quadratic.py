"""MAdam against the best Adam where gradients are noisy: the quadratic model of Section 4.2 (Eq. 12, Figure 3).

    python bench/quadratic.py [--out DIR]        one minute

The loss is sum of h theta^2 / 2 over two coordinates, a step sees the gradient h (theta - sigma noise), and what counts
is the loss after 1,000 steps, its mean over runs from normally distributed starts. Each optimizer has 20 learning
rates; of Adam the best of eight beta_2 is taken at each. "Best" is the smallest mean over all of these. The paper took
100 runs: "per 100 runs" is the median of the best results, and the range of the middle 90 %, over the batches of 100
into which our runs fall, the best settings chosen anew in each.

All runs and all settings (h, sigma) are coordinates of one tensor for each learning rate and beta, which is a parameter
group. They share starts and noise, so differences between optimizers have less noise than each result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import plots
import torch
from torch import Tensor
from torch.optim import Optimizer

from maxva_kernels import MAdam

RUNS, STEPS, BATCH = 4000, 1000, 100
RATES = (*(round(digit * unit, 3) for unit in (0.001, 0.01) for digit in range(1, 10)), 0.1, 0.2)
BETAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
RANGES = ((0.5, 0.99), (0.5, 0.999))
# h and sigma; the first is the paper's Figure 3, the others change its curvature or its noise.
SETTINGS = (((1, 20), 0.2), ((1, 5), 0.2), ((1, 100), 0.2), ((1, 20), 0.05), ((1, 20), 0.8))

Options = list[dict[str, Any]]  # of each parameter group
ADAM: Options = [{"lr": rate, "betas": (0.9, beta)} for beta in BETAS for rate in RATES]
MADAM: Options = [{"lr": rate, "beta1": 0.9, "beta2_range": bounds} for bounds in RANGES for rate in RATES]


def adam(groups: Any) -> Optimizer:
    return torch.optim.Adam(groups, fused=True)


def objective(theta: Tensor, h: Tensor) -> Tensor:
    """Without the constant that the noise adds to the expectation."""
    return (0.5 * h * theta**2).sum(-1)


def gradient(theta: Tensor, h: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Eq. 12."""
    return h * (theta - sigma * noise)


def final_losses(
    make: Callable[[Any], Optimizer],
    options: Options,
    settings: Any = SETTINGS,
    runs: int = RUNS,
    start: Tensor | None = None,
    path: list[Tensor] | None = None,
) -> Tensor:
    """The loss after the last step: a row for each of ``options``, in it the runs, in these the settings.

    Args:
        start: theta of all runs; None: normally distributed.
        path: gets theta of each step.
    """
    h = torch.tensor([h for h, _ in settings], dtype=torch.float32)
    sigma = torch.tensor([[sigma] for _, sigma in settings])
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(runs, *h.shape, generator=generator)
    theta = (starts if start is None else start.expand_as(starts)).repeat(len(options), 1, 1, 1)
    grads = torch.empty_like(theta)
    params = [torch.nn.Parameter(row) for row in theta]  # views: a step on them all moves theta
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = make([{"params": [param], **each} for param, each in zip(params, options, strict=True)])
    for _ in range(STEPS):
        grads.copy_(gradient(theta, h, sigma, torch.randn(starts.shape, generator=generator)))
        optimizer.step()
        if path is not None:
            path.append(theta.clone())
    return objective(theta, h)


def summary(losses: Tensor, options: Options) -> dict[str, Any]:
    """Of one optimizer in one setting: the best mean at each learning rate and over all, and that of each batch."""
    runs = losses.shape[1]
    means = losses.mean(1)
    errors = losses.std(1) / math.sqrt(runs)
    by_rate = []
    for rate in RATES:
        rows = [i for i, each in enumerate(options) if each["lr"] == rate]
        i = min(rows, key=lambda row: means[row].item())
        named = {key: value for key, value in options[i].items() if key in ("lr", "betas", "beta2_range")}
        by_rate.append({**named, "mean": means[i].item(), "standard_error": errors[i].item()})
    best = min(by_rate, key=lambda one: one["mean"])
    batches = losses.unflatten(1, (-1, min(BATCH, runs))).mean(2).amin(0)
    return {"best": best, "by_rate": by_rate, "batches": batches.tolist()}


def compare(runs: int = RUNS, settings: Any = SETTINGS) -> list[dict[str, Any]]:
    """For each setting Adam and MAdam with each of its ranges."""
    losses = {"Adam": (final_losses(adam, ADAM, settings, runs), ADAM)}
    madam = final_losses(MAdam, MADAM, settings, runs)
    for i, bounds in enumerate(RANGES):
        rows = slice(i * len(RATES), (i + 1) * len(RATES))
        losses[f"MAdam {bounds}"] = (madam[rows], MADAM[rows])
    return [
        {
            "h": h,
            "sigma": sigma,
            "optimizers": {name: summary(loss[..., i], options) for name, (loss, options) in losses.items()},
        }
        for i, (h, sigma) in enumerate(settings)
    ]


def trajectories(best: dict[str, Any]) -> dict[str, list[list[float]]]:
    """One run of each in the first setting, from (1, 1) and with the same noise: theta_1 and theta_2 of each step."""
    found = {}
    for name, one in best.items():
        settings = {key: value for key, value in one["best"].items() if key in ("lr", "betas", "beta2_range")}
        path: list[Tensor] = []
        start = torch.ones(2)
        final_losses(adam if name == "Adam" else MAdam, [settings], SETTINGS[:1], 1, start, path)
        xs, ys = torch.stack([start, *(theta.flatten() for theta in path)]).T
        found[name] = [[round(value, 5) for value in values.tolist()] for values in (xs, ys)]
    return found


def spread(batches: list[float]) -> list[float]:
    """The 5th, 50th and 95th percentile."""
    return torch.tensor(batches).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()


def draw(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    first = record["settings"][0]
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    styles = {"Adam": "-", "MAdam (0.5, 0.99)": "--", "MAdam (0.5, 0.999)": "-"}
    for name, one in first["optimizers"].items():
        mean, error = (torch.tensor([row[key] for row in one["by_rate"]]) for key in ("mean", "standard_error"))
        colour = plots.COLOURS[name.split()[0]]
        label = r"Adam, best $\beta_2$ at each rate" if name == "Adam" else name
        left.plot(RATES, mean, styles[name], marker=".", color=colour, label=label)
        left.fill_between(RATES, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    left.set(xscale="log", yscale="log", xlabel="learning rate", title="loss after 1,000 steps")
    left.legend()
    left.grid(alpha=0.3)
    h = torch.tensor(first["h"])
    for axes, skip, reach, title in (
        (middle, 0, (1.1, 1.1), "one run, from (1, 1)"),
        (right, 800, (0.08, 0.04), "its last 200 steps"),
    ):
        x, y = (torch.linspace(-size, size, 201) for size in reach)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        axes.contour(x, y, objective(grid, h).sqrt(), levels=8, colors="0.85", linewidths=0.8)
        for name in ("Adam", "MAdam (0.5, 0.999)"):
            xs, ys = (values[skip:] for values in record["trajectories"][name])
            label = f"{name}, lr {first['optimizers'][name]['best']['lr']}"
            axes.plot(xs, ys, color=plots.COLOURS[name.split()[0]], linewidth=0.9, label=label)
        axes.set(xlabel=f"$\\theta_1$, curvature {h[0]:g}", ylabel=f"$\\theta_2$, curvature {h[1]:g}", title=title)
    middle.legend()
    setting = f"h = {tuple(first['h'])}, $\\sigma$ = {first['sigma']}"
    figure.suptitle(f"Noisy quadratic, {setting}: means and standard errors of {RUNS:,} runs")
    return figure


def main() -> None:
    args = plots.parse(__doc__)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    record: dict[str, Any] = {"runs": RUNS, "steps": STEPS, "settings": compare()}
    record["trajectories"] = trajectories(record["settings"][0]["optimizers"])
    print(f"Loss after {STEPS} steps at the best learning rate, mean of {RUNS} runs (standard error)\n")
    print("| h | sigma | | lr | beta | loss | / Adam | per 100 runs | / Adam |")
    print("| --- | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for setting in record["settings"]:
        base = setting["optimizers"]["Adam"]
        for name, one in setting["optimizers"].items():
            best = one["best"]
            one["ratio_to_Adam"] = best["mean"] / base["best"]["mean"]
            one["per_100_runs"] = spread(one["batches"])
            one["per_100_runs_ratio_to_Adam"] = spread(
                [own / adams for own, adams in zip(one["batches"], base["batches"], strict=True)]
            )
            low, middle, high = one["per_100_runs"]
            ratios = "{1:.2f} [{0:.2f}, {2:.2f}]".format(*one["per_100_runs_ratio_to_Adam"])
            print(
                f"| {setting['h']} | {setting['sigma']} | {name.split()[0]} | {best['lr']} "
                f"| {best['betas'][1] if name == 'Adam' else best['beta2_range']} "
                f"| {best['mean']:.2e} ({best['standard_error']:.1e}) | {one['ratio_to_Adam']:.2f} "
                f"| {middle:.2e} [{low:.2e}, {high:.2e}] | {ratios} |"
            )
    record["seconds"] = time.perf_counter() - begin
    plots.write(args, "quadratic", record, draw)


if __name__ == "__main__":
    main()
