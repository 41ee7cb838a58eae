"""What MAdam loses by keeping its state in 16 bits: the error of its denominator, and losses of training.

    python bench/narrow_state.py [--out DIR]            a minute
    python bench/narrow_state.py --bert [--out DIR]     20 minutes

1. sqrt(v) against float64, fed the same gradients for 2,000 steps, of four kinds: the mean relative error (bias) and
its root mean square (spread) over 16,384 coordinates and the second half of the run. Beside bfloat16 as the optimizer
keeps it stands bfloat16 rounded to nearest.
2. The noisy quadratic of `quadratic.py`, first setting: the loss at the best learning rate.
3. With --bert, the small BERT of `bert_pretrain.py`, three seeds: losses at the end of the same run with either state.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plots
import quadratic
import torch
from torch import Tensor

from maxva_kernels import MAdam
from maxva_kernels.groups import MOMENTS

KINDS = ("Gaussian", "biased", "heavy-tailed", "sparse")
UPPERS = (0.98, 0.999)
SEEDS = (0, 1, 2)
Layout = Callable[[dict[str, Tensor], torch.Generator], None]  # makes of float32 state what it would keep
LABELS = {"float32": "float32", "nearest": "bfloat16, to nearest", "bfloat16": "bfloat16"}


def gradients(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Of one step: normally distributed with mean 0 or 3, with a tail of Pareto's kind, or zero in 95 % of cases."""
    noise = torch.randn(count, generator=generator)
    if kind == "biased":
        return noise + 3
    if kind == "heavy-tailed":
        return noise / torch.rand(count, generator=generator).clamp(min=1e-3).sqrt()
    if kind == "sparse":
        return noise * (torch.rand(count, generator=generator) < 0.05)
    return noise


def cut(value: Tensor, kept: int, generator: torch.Generator | None) -> None:
    """Rounds float32 to so many bits behind the leading one: stochastically, or without a generator to nearest."""
    whole = 2 ** (23 - kept)
    bits = value.view(torch.int32)
    if generator is None:
        added: Any = whole // 2 - 1 + ((bits >> (23 - kept)) & 1)
    else:
        added = torch.randint(0, whole, value.shape, generator=generator, dtype=torch.int32)
    value.copy_(((bits + added) & -whole).view(torch.float32))


def rounded(kept: int, to_nearest: bool = False) -> Layout:
    """All moments to so many bits behind the leading one, stochastically or to nearest."""

    def keep(state: dict[str, Tensor], generator: torch.Generator) -> None:
        for name in MOMENTS:
            cut(state[name], kept, None if to_nearest else generator)

    return keep


def error_of_root_v(
    kind: str, upper: float, state: str | Layout = "bfloat16", *, count: int = 16384, steps: int = 2000
) -> tuple[float, float]:
    """Bias and spread of sqrt(v).

    Args:
        kind: of the gradients, one of KINDS.
        upper: the upper bound of beta.
        state: "bfloat16" or "float32" as the optimizer keeps it, or float32 of which a layout makes something else.
    """
    exact, tested = (torch.nn.Parameter(torch.zeros(count, dtype=dtype)) for dtype in (torch.float64, torch.float32))
    options: dict[str, Any] = {"lr": 0.0, "beta2_range": (0.5, upper)}
    narrow = torch.bfloat16 if state == "bfloat16" else None
    pair = (MAdam([exact], **options), MAdam([tested], **options, state_dtype=narrow))
    generator, errors = torch.Generator().manual_seed(0), []
    for step in range(steps):
        tested.grad = gradients(kind, count, generator) * 1e-3
        exact.grad = tested.grad.double()
        for optimizer in pair:
            optimizer.step()
        if callable(state):
            state(pair[1].state[tested], generator)
        if step >= steps // 2 and step % 50 == 49:
            truth, found = (
                root_v(optimizer.state[param]) for optimizer, param in zip(pair, (exact, tested), strict=True)
            )
            errors.append((found / truth - 1)[truth > 0])
    every = torch.cat(errors)
    return every.mean().item(), every.square().mean().sqrt().item()


def root_v(state: dict[str, Tensor]) -> Tensor:
    return (state["grad_var"].double() + state["grad_mean"].double() ** 2).sqrt()


def accuracy() -> list[dict[str, Any]]:
    rows = []
    for upper in UPPERS:
        for kind in KINDS:
            row: dict[str, Any] = {"upper": upper, "gradients": kind}
            for state in LABELS:
                found = error_of_root_v(kind, upper, rounded(7, to_nearest=True) if state == "nearest" else state)
                row[state] = dict(zip(("bias", "spread"), found, strict=True))
            rows.append(row)
    return rows


def noisy_quadratic() -> dict[str, Any]:
    """The best mean loss over learning rates, with its standard error, by state dtype and bounds."""
    found = {}
    for state, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        losses = quadratic.final_losses(
            functools.partial(MAdam, state_dtype=dtype), quadratic.MADAM, quadratic.SETTINGS[:1]
        )[..., 0]
        for i, bounds in enumerate(quadratic.RANGES):
            rows = losses[i * len(quadratic.RATES) : (i + 1) * len(quadratic.RATES)]
            best = int(rows.mean(1).argmin())
            found[f"{state} {bounds}"] = {
                "lr": quadratic.RATES[best],
                "mean": rows[best].mean().item(),
                "standard_error": rows[best].std().item() / math.sqrt(rows.shape[1]),
            }
    return found


def bert(seed: int, *options: str) -> dict[str, Any]:
    """Losses of the small BERT of `bert_pretrain.py` with these options: of each step, held out at the end."""
    script = Path(__file__).with_name("bert_pretrain.py")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(script), *options, "--seed", str(seed), "--out", str(out), "--no-comparison"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return _losses(out)


def _losses(out: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
    last = [line["loss"] for line in lines[-100:]]
    losses = [round(line["loss"], 4) for line in lines]
    return {"held_out": lines[-1]["heldout_loss"], "last_100": statistics.mean(last), "losses": losses}


def bert_runs() -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {"float32": [], "bfloat16": []}
    for seed in SEEDS:
        for state, done in runs.items():
            done.append(bert(seed, "--state-dtype", state))
            losses = f"{done[-1]['last_100']:.4f}, held out {done[-1]['held_out']:.4f}"
            print(f"BERT, seed {seed}, {state}: last 100 steps {losses}", flush=True)
    return runs


def draw(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    trained: Any = record.get("bert")
    figure = Figure(figsize=(11 if trained else 7, 4), layout="constrained")
    right, *others = [figure.subplots()] if not trained else figure.subplots(1, 2)
    for axes in others:
        for state, colour in (("float32", "tab:blue"), ("bfloat16", "tab:orange")):
            runs = torch.tensor([run["losses"] for run in trained[state]])
            smooth = runs.unfold(1, 25, 5).mean(2)
            steps = torch.arange(smooth.shape[1]) * 5 + 13
            for seed, row in enumerate(smooth):
                axes.plot(steps, row, color=colour, linewidth=0.8, label=f"state in {state}" if seed == 0 else None)
        axes.set(xlabel="step", title="small BERT: training loss (mean of 25 steps)")
        axes.legend()
    names = [f"{row['gradients']}, {row['upper']}" for row in record["accuracy"]]
    for shift, (state, colour) in enumerate(
        (("nearest", "tab:red"), ("bfloat16", "tab:orange"), ("float32", "tab:blue"))
    ):
        biases = [max(1e-8, abs(row[state]["bias"])) for row in record["accuracy"]]
        right.barh([i + 0.27 * (1 - shift) for i in range(len(names))], biases, 0.25, color=colour, label=LABELS[state])
    right.set(xscale="log", title=r"$|$bias$|$ of $\sqrt{v}$")
    right.set_yticks(range(len(names)), names)
    right.axvline(1e-3, color="0.5", linewidth=0.8)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    parser = plots.parser(__doc__)
    parser.add_argument("--bert", action="store_true", help="train it with either state and three seeds")
    args = parser.parse_args()
    begin = time.perf_counter()
    record: dict[str, Any] = {"accuracy": accuracy()}
    print("| bound | gradients | " + " | ".join(f"{label}: bias | spread" for label in LABELS.values()) + " |")
    for row in record["accuracy"]:
        cells = (f"{100 * row[state]['bias']:+.3f} % | {100 * row[state]['spread']:.3f} %" for state in LABELS)
        print(f"| {row['upper']} | {row['gradients']} | {' | '.join(cells)} |", flush=True)
    record["quadratic"] = noisy_quadratic()
    for name, best in record["quadratic"].items():
        print(
            f"noisy quadratic, {name}: {best['mean']:.3e} ({best['standard_error']:.1e}) at lr {best['lr']}", flush=True
        )
    if args.bert:
        record["bert"] = bert_runs()
    record["seconds"] = time.perf_counter() - begin
    plots.write(args, "narrow_state", record, draw)


if __name__ == "__main__":
    main()
