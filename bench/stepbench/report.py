"""What a run of bench/step.py shows: a table for each set of tensors, and all of them as one figure."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from gpu_check.table import COPY, UPDATE


def heading(run: dict[str, Any]) -> str:
    asked = [name if value is True else f"{name} {value}" for name, value in run["options"].items() if value]
    return ", ".join([run["title"], run["dtype"], *asked])


def floor_rate(run: dict[str, Any]) -> float:
    """In GB/s."""
    return next(result["GB_per_s"] for result in run["results"] if result["name"] == run["floor"])


def optimizers(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The results without those of memory, which move bytes of their own."""
    return [result for result in run["results"] if result["name"] not in (COPY, UPDATE)]


def table(run: dict[str, Any]) -> str:
    """Where memory does not bind, its columns stay empty; a GPU has two more."""
    count, parameters, copies = run["tensors"], run["parameters"], run["copies"]
    lines = [f"\n{heading(run)}: {count:,} tensor{'s' * (count > 1)}, {parameters:,} parameters"]
    if copies > 1:
        lines[0] += f", {copies} copies of each in turns"
    if run["memory_bound"]:
        lines.append(f"floor: {run['floor']}, {floor_rate(run):.1f} GB/s")
    on_gpu = run["device"] != "cpu"
    columns = (
        f"{'':30}{'ms':>10} {'[min, max]':>22} {'MB':>8} {'B/param':>8} {'GB/s':>7} {'of floor':>9} {'/ AdamW':>8}"
    )
    lines.append(columns + f" {'host ms':>9} {'kernels':>8}" * on_gpu)
    for result in optimizers(run):
        spread = f"[{result['min']:.3f}, {result['max']:.3f}]"
        line = f"{result['name']:30}{result['ms']:10.3f} {spread:>22}"
        if "GB_per_s" in result and run["memory_bound"]:
            line += f" {result['bytes'] / 1e6:8,.0f} {result['bytes_per_parameter']:8.1f} {result['GB_per_s']:7.1f}"
            line += f" {result['share_of_floor']:9.0%}"
        else:
            line += " " * 36
        line += f" {result['of_adamw']:8.2f}"
        if on_gpu:
            line += f" {median(result['host']):9.3f} {result.get('kernels', 'n/a'):>8}"
        lines.append(line + "  (fits the cache)" * bool(run["memory_bound"] and result.get("in_cache")))
    for reason in dict.fromkeys(run["lacking"].values()):
        names = [name for name, other in run["lacking"].items() if other == reason]
        lines.append(f"not measured: {', '.join(names)}: {reason}")
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Bars of time, with the floor marked.

    Raises:
        ImportError: there is no matplotlib.
    """
    from gpu_check import figures
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = []
    for run in record["runs"]:
        rows = []
        for result in optimizers(run):
            row = figures.Row(result["name"], [result["ms"]], "", (result["min"], result["max"]))
            labels = [f"{result['ms']:,.{0 if result['ms'] >= 100 else 2}f} ms"]
            if "share_of_floor" in result and run["memory_bound"]:
                row.floor = result["ms"] * result["share_of_floor"]  # bytes / (bytes / ms / share)
                labels.append(f"{result['share_of_floor']:.0%} of the floor's rate")
            if run["device"] != "cpu":
                labels.append(f"host {median(result['host']):.2f} ms")
                labels += [f"{result['kernels']} kernels"] if "kernels" in result else []
            row.label = ", ".join(labels)
            rows.append(row)
        floor = f"\n{run['floor']}: {floor_rate(run):.0f} GB/s" if run["memory_bound"] else ""
        panels.append(figures.Panel(heading(run) + floor, "ms", rows))
    legend = [
        *(Patch(color=colour, label=name) for name, colour in figures.KINDS.items()),
        Line2D([], [], color="black", linewidth=2.5, label="floor: the step's bytes at the rate above the bars"),
        Line2D([], [], color="black", linewidth=1, label="range of all turns"),
    ]
    columns = min(2, len(panels))
    data = {"rehearsal": False, "device": record["machine"]["processor"], "date": record["date"]}
    if "gpu" in record["machine"]:
        data["device"] = record["machine"]["gpu"]
    title = f"An optimizer step, medians (torch {record['torch']})"
    figures.draw(data, title, panels, legend, columns).savefig(path, dpi=100)
