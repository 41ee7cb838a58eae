"""How wrong the second moment v becomes in float32: the paper's form against the kernel's, both fed the same gradients.

    python bench/accuracy.py [--json FILE] [--out DIR]        half a minute

Each row is a gradient scale * (mean/std + noise) with 8,192 coordinates, followed for 400 steps at beta in
[0.5, 0.999]. "Error" is the largest relative error of v over coordinates and steps against the paper's form in float64;
"beta off" the share of decisions, from the second step on, where beta differs by more than 0.05 from what float64 would
choose. Float64 is precise enough to be the truth here: the same cancellation costs it 29 bits less. The paper's form
has the constant 1e-16 that the authors' code adds to the denominator of Eq. 6, in float32; in float64 it has none.

The table has gradients as they occur; the figure and "sweep" in the JSON every scale from 1e-10 to 1 at three ratios of
mean to standard deviation.
"""

from __future__ import annotations

import time
from typing import Any

import plots
import torch
from torch import Tensor

from maxva_kernels import MAdam, reference
from maxva_kernels.groups import Hyperparameters

ROWS = ((1.0, 0.0), (1e-3, 0.0), (1.0, 100.0), (1e-6, 1.0), (1e-8, 0.0), (1e-10, 1.0))
SCALES, MEANS = tuple(10.0**power for power in range(-10, 1)), (0.0, 1.0, 100.0)
DELTA = 1e-16  # the constant of the authors' code in the denominator of Eq. 6
COORDINATES, STEPS = 8192, 400
HYPER = Hyperparameters(lr=1e-3, beta1=0.9, beta2_range=(0.5, 0.999), eps=1e-8, weight_decay=0.0)


def corrected_v(state: reference.PaperState) -> Tensor:
    return (state.v / state.w).double()


def follow(scale: float, mean: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(COORDINATES)
    exact = reference.PaperState(*[zeros.double()] * 4)
    paper = reference.PaperState(*[zeros] * 4)
    param = torch.nn.Parameter(zeros.clone())
    optimizer = MAdam([param])
    worst = {"paper": 0.0, "kernel": 0.0}
    off: dict[str, float] = {"paper": 0, "kernel": 0}
    for step in range(STEPS):
        g = (scale * (mean + torch.randn(COORDINATES, generator=generator, dtype=torch.float64))).float()
        old = {name: value.double() for name, value in optimizer.state[param].items()} if step else {}
        beta = reference.maxva_beta(g.double(), exact, HYPER)
        paper_beta = reference.maxva_beta(g, paper, HYPER, DELTA)
        exact = reference.update_moments(g.double(), exact, HYPER)
        paper = reference.update_moments(g, paper, HYPER, DELTA)
        param.grad = g
        optimizer.step()
        new = {name: value.double() for name, value in optimizer.state[param].items()}
        found = {"paper": corrected_v(paper), "kernel": new["grad_var"] + new["grad_mean"] ** 2}
        for name, v in found.items():
            worst[name] = max(worst[name], (v / corrected_v(exact) - 1).abs().max().item())
        if step:
            q = (new["grad_mean"] - old["grad_mean"]) / (
                g.double() - old["grad_mean"]
            )  # weight of g; NaN where it equals u
            off["kernel"] += ((1 - q * new["weight_sum"] - beta).abs() > 0.05).sum().item()
            off["paper"] += ((paper_beta - beta).abs() > 0.05).sum().item()
    decisions = COORDINATES * (STEPS - 1)
    return {
        "scale": scale,
        "mean_over_std": mean,
        **{f"{name}_error": value for name, value in worst.items()},
        **{f"{name}_beta_off": value / decisions for name, value in off.items()},
    }


def draw(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    styles = dict(zip(MEANS, ("-", "--", ":"), strict=True))
    for key, label, colour in (("paper", "the paper's form", "tab:red"), ("kernel", "this package", "tab:blue")):
        for mean, style in styles.items():
            rows = [row for row in record["sweep"] if row["mean_over_std"] == mean]
            scales, errors = ([row[name] for row in rows] for name in ("scale", f"{key}_error"))
            axes.plot(scales, errors, style, marker=".", color=colour, label=f"{label}, mean/std {mean:g}")
    axes.set(
        xscale="log", yscale="log", xlabel="standard deviation of the gradient", ylabel="largest relative error of v"
    )
    axes.set_title(f"v in float32, against float64, over {STEPS} steps")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def main() -> None:
    args = plots.parse(__doc__)
    begin = time.perf_counter()
    found = {
        row: follow(*row) for row in dict.fromkeys((*ROWS, *((scale, mean) for mean in MEANS for scale in SCALES)))
    }
    rows = [found[row] for row in ROWS]
    print("| scale | mean/std | paper's form: error of v | beta off | our kernel: error of v | beta off |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['scale']:g} | {row['mean_over_std']:g} | {row['paper_error']:.0e} | {row['paper_beta_off']:.3%} "
            f"| {row['kernel_error']:.0e} | {row['kernel_beta_off']:.3%} |"
        )
    sweep = [found[scale, mean] for mean in MEANS for scale in SCALES]
    plots.write(args, "accuracy", {"rows": rows, "sweep": sweep, "seconds": time.perf_counter() - begin}, draw)


if __name__ == "__main__":
    main()
