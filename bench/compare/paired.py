"""Optimizers compared by the score of what they trained, each at the learning rate that its loss on seed 0 chose.

Every optimizer sees the same seeds, so what counts is the difference from a baseline seed by seed, which leaves out
how good a seed is for all.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plots
import torch
from torch.optim import Optimizer

from compare import options, tuning
from compare.workers import Make, Run, Train, in_processes

# Where packages lie that are read and not installed.
DATA = Path("~/.cache/maxva_bench")


@dataclass(frozen=True)
class Contender:
    make: Callable[[Any], Optimizer]
    centre: float  # of the grid of learning rates


@dataclass(frozen=True)
class Runs:
    """Where runs are kept, what makes those that are missing, and which are wanted beside those of the rule."""

    kept: tuning.Runs
    make: Make  # the loss to choose by is a run's "validation", None where it is no finite number
    also: Sequence[tuple[str, float]] = ()  # contenders and rates for the fresh seeds


def compare(
    runs: Runs,
    contenders: Mapping[str, Contender],
    baseline: str,
    score: str,
    rates: int,
    seeds: Sequence[int],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """By optimizer: what was tried and what came out.

    Args:
        score: The entry of a run that is compared.
        rates: How many learning rates the grid has.
        seeds: The fresh ones; the rate is chosen on seed 0.
        settings: What else tells runs apart.

    Raises:
        SystemExit: an optimizer of `Runs.also` is none of the contenders.
    """
    options.check_also(runs.also, contenders)

    def key(run: Run) -> dict[str, Any]:
        return dict(zip(("optimizer", "lr", "seed"), run, strict=True)) | settings | {"torch": torch.__version__}

    def say(run: Run, result: dict[str, Any]) -> None:
        print("{} lr {:g} seed {}: ".format(*run) + f"{score} {result[score]:.2f}", flush=True)

    def get(wanted: list[Run]) -> dict[Run, dict[str, Any]]:
        return runs.kept.get(wanted, key, runs.make, say)

    tuned = tuning.tune(get, {name: each.centre for name, each in contenders.items()}, rates, seeds)
    for (name, lr), one in tuning.given(get, runs.also, seeds).items():
        tuned[f"{name} at {lr:g}"] = one
    found = {
        name: {
            "lr": one.lr,
            "at_edge": one.at_edge,
            "by_rate": {f"{lr:g}": run for lr, run in one.by_rate.items()},
            score: [run[score] for run in one.fresh],
            "validation": [run["validation"] for run in one.fresh],
        }
        for name, one in tuned.items()
    }
    for one in found.values():
        one["mean"], one["standard_error"] = _mean(one[score])
        one[f"minus_{baseline}"] = _mean([a - b for a, b in zip(one[score], found[baseline][score], strict=True)])
    return found


def _mean(values: list[float]) -> tuple[float, float]:
    """With its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def table(found: dict[str, Any], baseline: str, score: str) -> str:
    """Means and differences, standard errors in brackets, and the mean loss to choose by, as Markdown."""
    lines = [f"| | best lr | {score} | less {baseline}'s | loss |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        rate = f"{one['lr']:g}{' (edge)' if one['at_edge'] else ''}"
        difference = "{:+.2f} ({:.2f})".format(*one[f"minus_{baseline}"])
        losses = one["validation"]
        loss = "infinite" if None in losses else f"{statistics.mean(losses):.3f}"
        lines.append(f"| {name} | {rate} | {one['mean']:.2f} ({one['standard_error']:.2f}) | {difference} | {loss} |")
    return "\n".join(lines)


def figure(found: dict[str, Any], score: str, unit: str, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 0.8 * len(found)), 3.6), layout="constrained")
    axes = figure.subplots()
    for i, one in enumerate(found.values()):
        axes.plot([i] * len(one[score]), one[score], ".", color="0.6")
        axes.errorbar(i, one["mean"], one["standard_error"], fmt="o", capsize=4, color="tab:blue")
    axes.set_xticks(range(len(found)), [name.replace(" at ", "\nat ") for name in found])
    axes.set(ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    return figure


def parse(doc: str | None, settings: Mapping[str, Any], argv: list[str] | None) -> argparse.Namespace:
    """The arguments of an experiment with settings, which have a ``device``, on packages that are read.

    Raises:
        SystemExit: the setting needs a GPU, and there is none.
    """
    parser = options.parser(doc, settings)
    parser.add_argument("--data", type=Path, metavar="DIR", default=DATA, help=f"where the packages lie ({DATA})")
    return options.parse(parser, settings, argv)


def report(
    args: argparse.Namespace,
    name: str,
    train: Train,
    compare: Callable[[Runs], dict[str, Any]],
    draw: Callable[[dict[str, Any]], Any],
    baseline: str,
    score: str,
) -> None:
    """Makes the runs that are missing in NAME.jsonl, prints the table and writes what the options ask for, by the
    `options.record_name`."""
    name = options.record_name(args, name)
    begin = time.perf_counter()
    with in_processes(train, args.jobs) as make:
        record = compare(Runs(tuning.Runs(args.out and args.out / f"{name}.jsonl"), make, args.also))
    print(f"{time.perf_counter() - begin:.0f} s\n")
    print(table(record["optimizers"], baseline, score))
    plots.write(args, name, record, draw)
