"""What the tests of the experiments that compare optimizers by a score share (bench/compare/paired.py)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from compare import tuning


def check_end_to_end(
    module: ModuleType,
    baseline: str,
    score: str,
    budget: tuning.Budget,
    command: list[str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> dict[str, Any]:
    """Runs a command that writes to ``out``, and again; its record."""
    made, train, name = [], module.train, module.__name__
    monkeypatch.setattr(module, "train", lambda *args, **data: made.append(args) or train(*args, **data))
    command = [*command, "--jobs", "1", "--out", str(out)]  # in this process, where they are counted
    module.main(command)
    record = json.loads((out / f"{name}.json").read_text())
    assert record["optimizers"].keys() == module.CONTENDERS.keys()
    for optimizer, one in record["optimizers"].items():
        assert budget.rates <= len(one["by_rate"]) <= budget.rates + tuning.EXTENSIONS, optimizer
        seeds = [seed for n, lr, seed in made if (n, lr) == (optimizer, one["lr"])]
        assert seeds == list(range(budget.chosen_on + budget.fresh)), optimizer
        means = {rate: sum(run[score] for run in runs) for rate, runs in one["by_rate"].items()}
        assert {len(runs) for runs in one["by_rate"].values()} == {budget.chosen_on}, optimizer
        assert means[f"{one['lr']:g}"] == max(means.values()), optimizer
        differences = [a - b for a, b in zip(one[score], record["optimizers"][baseline][score], strict=True)]
        for values, told in (
            (one[score], [one["mean"], one["standard_error"]]),
            (differences, one[f"minus_{baseline}"]),
        ):
            expected = [statistics.mean(values), statistics.stdev(values) / budget.fresh**0.5]
            assert told == pytest.approx(expected, abs=1e-12), optimizer
    assert record["optimizers"][baseline][f"minus_{baseline}"] == [0, 0]
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| LaMAdam |" in capsys.readouterr().out
    before = len(made)
    module.main(command)
    assert len(made) == before
    assert json.loads((out / f"{name}.json").read_text()) == record
    return record
