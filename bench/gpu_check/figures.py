"""Figures of the results, from the stages' files and beside them: speed.png, host.png, training.png.

    PYTHONPATH=bench python -m gpu_check.figures FOLDER

Needs matplotlib, and of this programme only the files. A bar far longer than the others is cut, and says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gpu_check.table import COPY, MARK, UPDATE

OURS, ADAMW, EAGER = "tab:blue", "tab:orange", "tab:gray"
KINDS = {"MAdam, LaMAdam": OURS, "AdamW": ADAMW, "the paper's lines, not fused by hand": EAGER}
FLOOR = "floor: the step's bytes at the copy's bandwidth"


@dataclass
class Row:
    """One contender: its bars, one below the other, and what is written at their end."""

    name: str
    bars: list[float]
    label: str
    range: tuple[float, float] | None = None
    floor: float | None = None
    part: float | None = None  # of the first bar, drawn in it

    @property
    def colour(self) -> str:
        if "eager" in self.name or "torch.compile" in self.name:
            return EAGER
        return OURS if "MAdam" in self.name else ADAMW


@dataclass
class Panel:
    title: str
    unit: str
    rows: list[Row]


def speed(data: dict[str, Any]) -> Figure:
    """A panel for each model and dtype; the floors' own lines are no bars: they move other bytes."""
    models = list(dict.fromkeys(case["case"] for case in data["cases"]))
    panels = []
    for case in sorted(data["cases"], key=lambda case: models.index(case["case"])):
        panels.append(speed_panel(f"{case['case']}, {case['dtype']}", case["results"]))
    if compiled := data.get("compiled"):
        title = f"{compiled['case']}, {compiled['dtype']}, torch.compile (turns of its own)"
        panels.append(speed_panel(title, compiled["results"]))
    legend = [*_kinds(), Line2D([], [], color="black", linewidth=2.5, label=FLOOR), _range_mark()]
    return draw(data, "Device time of an optimizer step, medians", panels, legend)


def speed_panel(title: str, results: list[dict[str, Any]]) -> Panel:
    copy = next(result["GB_per_s"] for result in results if result["name"] == COPY)
    rows = []
    for result in results:
        if result["name"] in (COPY, UPDATE):
            continue
        row = Row(result["name"], [result["ms"]], f"{_short(result['ms'])} ms", (result["min"], result["max"]))
        if "share_of_copy" in result:
            row.floor = result["ms"] * result["share_of_copy"]  # bytes / (bytes / ms / share)
            row.label += f", {result['share_of_copy']:.1%} of copy"
        row.label += ", fits the L2" * bool(result.get("in_cache"))
        rows.append(row)
    return Panel(f"{title} (copy: {copy:,.0f} GB/s)", "ms", rows)


def host(data: dict[str, Any]) -> Figure:
    """A panel for each set of tensors: idle device above, busy device below."""
    panels = []
    for case in data["cases"]:
        rows = []
        for result in case["results"]:
            busy = result["us_busy"]
            label = _short(result["us"]) + (f"; {_short(busy)}" if busy is not None else "") + " µs"
            if launches := case["launches"].get(result["name"], {}).get("launches"):
                label += f", {launches:,} launch{'es' * (launches != 1)}"
            bars = [result["us"], *([busy] if busy is not None else [])]
            rows.append(Row(result["name"], bars, label, (result["min"], result["max"])))
        panels.append(Panel(case["case"], "µs", rows))
    legend = [
        *_kinds(),
        Patch(color="black", label="idle device"),
        Patch(color="black", alpha=0.4, label="busy device"),
    ]
    return draw(data, "Host time of step(), medians", panels, [*legend, _range_mark("range, idle")], columns=1)


def training(data: dict[str, Any]) -> Figure:
    """The whole step with the optimizer's part in it, and that part by itself."""
    whole, alone = [], []
    for result in data["results"]:
        if result["steps"]:
            name, ms, part = result["name"], result["ms"], result["optimizer_ms"]
            whole.append(Row(name, [ms], f"{_short(ms)} ms", part=part))
            alone.append(Row(name, [part], f"{_short(part)} ms, {result['share']:.1%} of the step"))
    panels = [
        Panel("whole step, the optimizer's part of it dark", "ms", whole),
        Panel("the optimizer's part alone", "ms", alone),
    ]
    title = f"A training step: {data['model']}, {data['size']['parameters']:,} parameters, medians"
    return draw(data, title, panels, _kinds())


def draw(data: dict[str, Any], title: str, panels: list[Panel], legend: list[Any], columns: int = 2) -> Figure:
    """All panels on one sheet."""
    if not any(panel.rows for panel in panels):
        raise ValueError("nothing was measured")
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    sizes = [2.2 + max(sum(0.5 + 0.5 * len(row.bars) for row in panel.rows) for panel in line) for line in lines]
    figure = Figure(figsize=(8.2 * columns + (columns == 1), 1.6 + 0.3 * sum(sizes)), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=sizes)
    for line, axes_of_line in zip(lines, grid, strict=True):
        for axes in axes_of_line[len(line) :]:
            axes.set_axis_off()
        for panel, axes in zip(line, axes_of_line, strict=False):
            draw_panel(axes, panel)
    mark = MARK.strip() + ": " if data["rehearsal"] else ""
    figure.suptitle(f"{mark}{title}\n{data['device']}, {data['date']}", fontsize=13)
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    if mark:
        size = min(100, 20 * figure.get_figheight())
        figure.text(0.5, 0.5, MARK.strip(), size=size, color="red", alpha=0.15, rotation=25, ha="center", va="center")
    return figure


def draw_panel(axes: Any, panel: Panel) -> None:
    end = longest([time for row in panel.rows for time in row.bars])
    end = 1.03 * max([end, *(row.floor for row in panel.rows if row.floor and row.floor <= 4 * end)])
    for y, row in enumerate(panel.rows):
        height = 0.8 / len(row.bars)
        places = [y - 0.4 + height * (i + 0.5) for i in range(len(row.bars))]
        for i, (place, time) in enumerate(zip(places, row.bars, strict=True)):
            pale = 0.4 if i or row.part is not None else 1.0
            axes.barh(place, min(time, end), height, color=row.colour, alpha=pale)
        reach = min(row.bars[0], end)
        if row.part is not None:
            axes.barh(places[0], min(row.part, end), height, color=row.colour)
        if row.range:
            least, most = (min(time, end) for time in row.range)
            if least < end:
                axes.hlines(places[0], least, most, color="black", linewidth=1)
            reach = max(reach, most)
        if row.floor is not None:
            axes.vlines(min(row.floor, end), y - 0.42, y + 0.42, color="black", linewidth=2.5)
            reach = max(reach, min(row.floor, end))
        reach = max([reach, *(min(time, end) for time in row.bars)])
        cut = " (cut)" if max(row.bars) > end else ""
        axes.text(reach + 0.015 * end, y, row.label + cut, va="center", fontsize=9)
    axes.set_xlim(0, 1.7 * end)  # room for the labels
    axes.set_ylim(len(panel.rows) - 0.4, -0.6)
    axes.set_yticks(range(len(panel.rows)), [row.name for row in panel.rows])
    axes.set_xlabel(panel.unit)
    axes.set_title(panel.title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def longest(times: list[float]) -> float:
    """The longest bar that is not cut: above the median, where the next is more than four times as long."""
    upper = sorted(time for time in times if time >= statistics.median_low(times))
    return next((a for a, b in itertools.pairwise(upper) if b > 4 * a), upper[-1])


def _kinds() -> list[Patch]:
    return [Patch(color=colour, label=name) for name, colour in KINDS.items()]


def _range_mark(label: str = "range of all turns") -> Line2D:
    return Line2D([], [], color="black", linewidth=1, label=label)


def _short(value: float) -> str:
    """Three digits or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


MAKERS: dict[str, Callable[[dict[str, Any]], Figure]] = {"speed": speed, "host": host, "training": training}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_check.figures", description="Draws a folder's results.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the stages' JSON files are")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"no folder {folder}")
    lacking = 0
    for path in (folder / f"{prefix}{stage}.json" for prefix in ("", "rehearsal_") for stage in MAKERS):
        if not path.is_file():
            continue
        picture, temporary = path.with_suffix(".png"), path.with_name(f".{path.stem}.new.png")
        try:
            MAKERS[path.stem.removeprefix("rehearsal_")](json.loads(path.read_text())).savefig(temporary, dpi=100)
            os.replace(temporary, picture)
            print(f"drawn: {picture.name}")
        except (KeyError, TypeError, ValueError, StopIteration, OSError) as error:  # a stage that was cut short
            lacking += 1
            print(f"lacking: {picture.name}: {type(error).__name__}: {error}")
    return int(lacking > 0)


if __name__ == "__main__":
    sys.exit(main())
