"""Optimizers compared by the score of what they trained, each at the learning rate that scored best on other seeds.

Every optimizer sees the same seeds, so what counts is the difference from a baseline seed by seed, which leaves out
how good a seed is for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
class Experiment:
    name: str  # of what is written
    contenders: Mapping[str, Contender]
    baseline: str
    score: str  # the entry of a run that is compared, the larger the better
    unit: str
    title: str  # of the figure


def compare(
    experiment: Experiment,
    budget: tuning.Budget,
    kept: tuning.Runs,
    make: Make,
    settings: dict[str, Any],
    also: Sequence[tuple[str, float]] = (),
) -> dict[str, Any]:
    """By optimizer: what was tried and what came out.

    Args:
        make: Makes the runs that are not ``kept``.
        settings: What else tells runs apart.
        also: Contenders and rates for the fresh seeds.

    Raises:
        SystemExit: an optimizer of ``also`` is none of the contenders.
    """
    contenders, baseline, score = experiment.contenders, experiment.baseline, experiment.score
    options.check_also(also, contenders)

    def key(run: Run) -> dict[str, Any]:
        return dict(zip(("optimizer", "lr", "seed"), run, strict=True)) | settings | {"torch": torch.__version__}

    def say(run: Run, result: dict[str, Any]) -> None:
        print("{} lr {:g} seed {}: ".format(*run) + f"{score} {result[score]:.2f}", flush=True)

    def get(wanted: list[Run]) -> dict[Run, dict[str, Any]]:
        return kept.get(wanted, key, make, say)

    centres = {name: each.centre for name, each in contenders.items()}
    tuned = tuning.tune(get, centres, budget, lambda run: -run[score])
    for (name, lr), at_rate in tuning.given(get, also, budget.fresh_seeds).items():
        tuned[f"{name} at {lr:g}"] = at_rate
    found: dict[str, dict[str, Any]] = {
        name: {
            "lr": one.lr,
            "at_edge": one.at_edge,
            "by_rate": {f"{lr:g}": runs for lr, runs in one.by_rate.items()},
            **{entry: [run[entry] for run in one.fresh] for entry in one.fresh[0]},
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


def table(experiment: Experiment, found: dict[str, Any]) -> str:
    """Of fresh seeds means and differences, standard errors in brackets, and the mean loss if a run has one; of the
    others the mean score by rate; as Markdown."""
    baseline, score = experiment.baseline, experiment.score
    lines = [f"| | best lr | {score} | less {baseline}'s | loss | {score} by lr, when it was chosen |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    for name, one in found.items():
        rate = f"{one['lr']:g}{' (edge)' if one['at_edge'] else ''}"
        difference = "{:+.2f} ({:.2f})".format(*one[f"minus_{baseline}"])
        losses = one.get("loss")
        loss = "" if losses is None else "infinite" if None in losses else f"{statistics.mean(losses):.3f}"
        tried = (f"{lr}: {statistics.mean(run[score] for run in runs):.2f}" for lr, runs in one["by_rate"].items())
        lines.append(
            f"| {name} | {rate} | {one['mean']:.2f} ({one['standard_error']:.2f}) | {difference} | {loss} "
            f"| {', '.join(tried)} |"
        )
    return "\n".join(lines)


def draw(experiment: Experiment, record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    found, score = record["optimizers"], experiment.score
    figure = Figure(figsize=(max(7.0, 0.8 * len(found)), 3.6), layout="constrained")
    axes = figure.subplots()
    for i, one in enumerate(found.values()):
        axes.plot([i] * len(one[score]), one[score], ".", color="0.6")
        axes.errorbar(i, one["mean"], one["standard_error"], fmt="o", capsize=4, color="tab:blue")
    axes.set_xticks(range(len(found)), [name.replace(" at ", "\nat ") for name in found])
    seeds = record["setting"]["budget"]["fresh"]
    axes.set(ylabel=experiment.unit, title=f"{experiment.title}: {seeds} seeds, mean and standard error")
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


def report(args: argparse.Namespace, experiment: Experiment, train: Train, setting: Any, **data: Any) -> None:
    """Makes the runs that are missing in NAME.jsonl, prints the table and writes what the options ask for, by the
    `options.record_name`.

    Args:
        train: A run has the score, and perhaps "loss", None where that is no finite number.
        setting: A dataclass that has a ``budget``; all else in it tells runs apart.
        data: What else the record says; it tells runs apart too.
    """
    name = options.record_name(args, experiment.name)
    settings = dataclasses.asdict(setting)
    apart = {entry: value for entry, value in (settings | data).items() if entry != "budget"}
    begin = time.perf_counter()
    with in_processes(train, args.jobs) as make:
        kept = tuning.Runs(args.out and args.out / f"{name}.jsonl")
        found = compare(experiment, setting.budget, kept, make, apart, args.also)
    print(f"{time.perf_counter() - begin:.0f} s\n")
    print(table(experiment, found))
    record = {"setting": settings, **data, "optimizers": found}
    plots.write(args, name, record, functools.partial(draw, experiment))
