"""Which learning rates an optimizer is tried at, the same rule for all, and the file of finished runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compare.workers import Make, Run

EXTENSIONS = 2


@dataclass(frozen=True)
class Budget:
    """The same for all that are tuned."""

    rates: int  # of the grid
    chosen_on: int  # so many seeds, from 0 on
    fresh: int  # and so many after these, which had no say

    @property
    def fresh_seeds(self) -> range:
        return range(self.chosen_on, self.chosen_on + self.fresh)

    @property
    def runs(self) -> int:
        """Of one optimizer, at most."""
        return (self.rates + EXTENSIONS) * self.chosen_on + self.fresh


def grid(centre: float, count: int) -> list[float]:
    """``count`` rates a factor of 2 apart; an even number has one more below the centre."""
    return [centre * 2.0**i for i in range(-(count // 2), count - count // 2)]


def best_rate(losses: dict[float, float]) -> float:
    """The rate of the smallest loss; of equal losses, as of runs that all diverged (infinite), the smallest rate."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def wanted(losses: dict[float, float], centre: float, count: int) -> list[float]:
    """The rates to try after these: the grid, and up to `EXTENSIONS` times one beyond an edge that is the best."""
    if not losses:
        return grid(centre, count)
    beyond = next_rate(losses)
    return [beyond] if beyond and len(losses) < count + EXTENSIONS else []


@dataclass(frozen=True)
class Tuned:
    """What was tried, by learning rate, and the runs of fresh seeds at the best, or at one that was given."""

    by_rate: dict[float, list[dict[str, Any]]]  # each of the seeds to choose on
    losses: dict[float, float]  # their means
    lr: float
    fresh: list[dict[str, Any]]

    @property
    def at_edge(self) -> bool:
        return bool(self.losses) and next_rate(self.losses) is not None


Get = Callable[[list[Run]], dict[Run, dict[str, Any]]]  # the runs asked for, all that can be made side by side


def final(run: dict[str, Any]) -> float:
    """Held-out loss in the end, infinite where the run diverged."""
    return math.inf if run["validation"] is None else run["validation"]


def tune(
    get: Get,
    centres: Mapping[Any, float],
    budget: Budget,
    loss: Callable[[dict[str, Any]], float] = final,
) -> dict[Any, Tuned]:
    """Each key of ``centres`` with the rates that are `wanted`, on the seeds to choose on; then on the fresh ones with
    the rate whose mean ``loss`` is the smallest."""
    tried: dict[Any, dict[float, list[dict[str, Any]]]] = {key: {} for key in centres}
    losses: dict[Any, dict[float, float]] = {key: {} for key in centres}
    while rates := [(key, lr) for key, centre in centres.items() for lr in wanted(losses[key], centre, budget.rates)]:
        for (key, lr), runs in _on(range(budget.chosen_on), get, rates).items():
            tried[key][lr], losses[key][lr] = runs, statistics.mean(map(loss, runs))
    best = {key: best_rate(losses[key]) for key in centres}
    return {
        key: replace(one, by_rate=dict(sorted(tried[key].items())), losses=losses[key])
        for (key, _), one in given(get, best.items(), budget.fresh_seeds).items()
    }


def given(get: Get, rates: Iterable[tuple[Any, float]], seeds: Sequence[int]) -> dict[tuple[Any, float], Tuned]:
    """Keys with rates that were not searched for, on each of ``seeds``."""
    return {(key, lr): Tuned({}, {}, lr, runs) for (key, lr), runs in _on(seeds, get, list(rates)).items()}


def _on(
    seeds: Sequence[int], get: Get, rates: list[tuple[Any, float]]
) -> dict[tuple[Any, float], list[dict[str, Any]]]:
    runs = get([(key, lr, seed) for key, lr in rates for seed in seeds])
    return {(key, lr): [runs[key, lr, seed] for seed in seeds] for key, lr in rates}


def next_rate(losses: dict[float, float]) -> float | None:
    """The rate beyond the best, if that is at an edge."""
    best = best_rate(losses)
    return best / 2 if best == min(losses) else best * 2 if best == max(losses) else None


def largest_stable(losses: dict[float, float], bound: float) -> float | None:
    """The largest rate at which training ended below ``bound``, whatever smaller rates did."""
    return max((rate for rate, loss in losses.items() if loss < bound), default=None)


def steps_to(losses: list[float], target: float, window: int) -> int | None:
    """The first step at which the mean loss of the last ``window`` steps is at most ``target``."""
    for step in range(window, len(losses) + 1):
        if sum(losses[step - window : step]) / window <= target:
            return step
    return None


class Runs:
    """Finished runs by their settings, appended to a file as they end; without a file, remembered."""

    def __init__(self, path: Path | None):
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path and path.exists():
            text = path.read_text()
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # torn by what interrupted it: that run is done again
                    continue
                self.done[self._name(entry["settings"])] = entry["run"]
            if text and not text.endswith("\n"):
                with path.open("a") as file:
                    file.write("\n")

    @staticmethod
    def _name(settings: dict[str, Any]) -> str:
        return json.dumps(settings, sort_keys=True)

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The run of these settings, if it is finished."""
        return self.done.get(self._name(settings))

    def add(self, settings: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        """Keeps a run; as it will be read back, so that a record is the same whether it was interrupted or not."""
        entry = json.loads(json.dumps({"settings": settings, "run": run}))
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return self.done.setdefault(self._name(settings), entry["run"])

    def get(
        self,
        runs: list[Run],
        settings: Callable[[Run], dict[str, Any]],
        make: Make,
        say: Callable[[Run, dict[str, Any]], None],
    ) -> dict[Run, dict[str, Any]]:
        """The runs, of which those that are missing are made, kept and told of."""
        found = {run: self.find(settings(run)) for run in runs}
        for run, result in make([run for run in runs if found[run] is None]):
            found[run] = kept = self.add(settings(run), result)
            say(run, kept)
        return {run: result for run, result in found.items() if result is not None}
