"""Which learning rates an optimizer is tried at, the same rule for all, and the file of finished runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXTENSIONS = 2


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


def tune(loss: Callable[[float], float], centre: float, count: int) -> dict[float, float]:
    """The loss at each rate that is wanted."""
    losses: dict[float, float] = {}
    while rates := wanted(losses, centre, count):
        losses |= {rate: loss(rate) for rate in rates}
    return dict(sorted(losses.items()))


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


def final(run: dict[str, Any]) -> float:
    """Held-out loss in the end, infinite where the run diverged."""
    return math.inf if run["validation"] is None else run["validation"]


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
