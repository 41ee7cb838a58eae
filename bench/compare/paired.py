"""Optimizers compared by the score of what they trained, each at the learning rate that its loss on seed 0 chose.

Every optimizer sees the same seeds, so what counts is the difference from a baseline seed by seed, which leaves out
how good a seed is for all.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plots
import torch
from torch.optim import Optimizer

from compare import tuning

# Where packages lie that are read and not installed.
DATA = Path("~/.cache/maxva_bench")


@dataclass(frozen=True)
class Contender:
    make: Callable[[Any], Optimizer]
    centre: float  # of the grid of learning rates


Train = Callable[[str, float, int], dict[str, Any]]  # (optimizer, learning rate, seed): "validation" and the score


def compare(
    runs: tuning.Runs,
    train: Train,
    contenders: Mapping[str, Contender],
    baseline: str,
    score: str,
    rates: int,
    seeds: Iterable[int],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """By optimizer: what was tried and what came out.

    Args:
        train: Gives the loss to choose by as "validation", None where it is no finite number.
        score: The entry of a run that is compared.
        rates: How many learning rates the grid has.
        seeds: The fresh ones; the rate is chosen on seed 0.
        settings: What else tells runs apart.
    """
    seeds = list(seeds)

    def run(name: str, lr: float, seed: int) -> dict[str, Any]:
        key = {"optimizer": name, "lr": lr, "seed": seed, **settings, "torch": torch.__version__}
        result, is_new = runs.get(key, lambda: train(name, lr, seed))
        if is_new:
            print(f"{name} lr {lr:g} seed {seed}: {score} {result[score]:.2f}", flush=True)
        return result

    found: dict[str, Any] = {}
    for name, contender in contenders.items():
        losses = tuning.tune(lambda lr, name=name: tuning.final(run(name, lr, 0)), contender.centre, rates)  # type: ignore[misc]
        best = tuning.best_rate(losses)
        found[name] = {
            "lr": best,
            "at_edge": tuning.next_rate(losses) is not None,
            "by_rate": {f"{lr:g}": run(name, lr, 0) for lr in losses},
            score: [run(name, best, seed)[score] for seed in seeds],
        }
    for one in found.values():
        one["mean"], one["standard_error"] = _mean(one[score])
        one[f"minus_{baseline}"] = _mean([a - b for a, b in zip(one[score], found[baseline][score], strict=True)])
    return found


def _mean(values: list[float]) -> tuple[float, float]:
    """With its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def table(found: dict[str, Any], baseline: str, score: str) -> str:
    """Means and differences, standard errors in brackets, as Markdown."""
    lines = [f"| | best lr | {score} | less {baseline}'s |", "| --- | ---: | ---: | ---: |"]
    for name, one in found.items():
        rate = f"{one['lr']:g}{' (edge)' if one['at_edge'] else ''}"
        difference = "{:+.2f} ({:.2f})".format(*one[f"minus_{baseline}"])
        lines.append(f"| {name} | {rate} | {one['mean']:.2f} ({one['standard_error']:.2f}) | {difference} |")
    return "\n".join(lines)


def figure(found: dict[str, Any], score: str, unit: str, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, one in enumerate(found.values()):
        axes.plot([i] * len(one[score]), one[score], ".", color="0.6")
        axes.errorbar(i, one["mean"], one["standard_error"], fmt="o", capsize=4, color="tab:blue")
    axes.set_xticks(range(len(found)), list(found))
    axes.set(ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    return figure


def parse(doc: str | None, settings: Mapping[str, Any], argv: list[str] | None) -> argparse.Namespace:
    """The arguments of an experiment with settings, which have a ``device``, on packages that are read.

    Raises:
        SystemExit: the setting needs a GPU, and there is none.
    """
    parser = plots.parser(doc)
    parser.add_argument("--setting", choices=settings, default="cpu", help="(cpu)")
    parser.add_argument("--data", type=Path, metavar="DIR", default=DATA, help=f"where the packages lie ({DATA})")
    args = parser.parse_args(argv)
    if settings[args.setting].device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{parser.prog}: --setting {args.setting}: torch sees no CUDA device here")
    return args


def report(
    args: argparse.Namespace,
    name: str,
    compare: Callable[[tuning.Runs], dict[str, Any]],
    draw: Callable[[dict[str, Any]], Any],
    baseline: str,
    score: str,
) -> None:
    """Makes the runs that are missing in NAME.jsonl, prints the table and writes what the options ask for."""
    begin = time.perf_counter()
    record = compare(tuning.Runs(args.out and args.out / f"{name}.jsonl"))
    print(f"{time.perf_counter() - begin:.0f} s\n")
    print(table(record["optimizers"], baseline, score))
    plots.write(args, name, record, draw)
