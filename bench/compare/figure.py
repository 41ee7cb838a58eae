"""The figure: for each case the held-out loss by learning rate, training losses, step sizes."""

from __future__ import annotations

import statistics
from typing import Any

import plots

OTHERS = {
    "SGD": "0.5", "AdamW": "tab:red", "LaProp": "tab:olive", "LAMB": "tab:brown", "AdaBelief": "tab:pink",
    "RAdam": "black", "LaMAdam": "tab:cyan",
}  # fmt: skip


def draw(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    cases = record["cases"]
    height = 4.2 if len(cases[0]["optimizers"]) > 4 else 2.6
    figure = Figure(figsize=(14, height * len(cases)), layout="constrained")
    rows = figure.subplots(len(cases), 3, squeeze=False)
    for (left, middle, right), each in zip(rows, cases, strict=True):
        for name, one in each["optimizers"].items():
            colour = {**OTHERS, **plots.COLOURS}[name.split()[0]]
            line = ":" if " at " in name else "--" if name.endswith("0.98") else "-"
            style = {"color": colour, "linestyle": line, "linewidth": 1.2}
            ended = [row for row in one["by_rate"] if None not in row["validation"]]
            means = [statistics.mean(row["validation"]) for row in ended]
            left.plot([row["lr"] for row in ended], means, marker=".", **style)
            mark = "+" if " at " in name else "x"
            left.plot([one["lr"]] * len(one["validation"]), one["validation"], mark, color=colour, markersize=4)
            curves = one["curves"]
            label = f"{name.partition(' at ')[0]}, lr {one['lr']:g}"
            middle.plot(curves["step"], curves["loss"], label=label, **style)
            right.plot(curves["measured"], curves["step_size"], **style)
        left.axhline(each["unigram"], color="gray", linestyle=":", linewidth=0.8)
        left.set(xlabel="learning rate", ylabel=f"{each['case']}: loss (nats)")
        given = ", + at others" if any(" at " in name for name in each["optimizers"]) else ""
        chosen_on = record["budget"]["chosen_on"]
        left.set_title(f"held out: mean of {chosen_on} seeds; fresh ones: x at the best{given}", fontsize="medium")
        low = min((min(one["curves"]["loss"], default=9.0) for one in each["optimizers"].values()), default=0.0)
        middle.set(xlabel="step", title="training, mean of the fresh seeds", ylim=(low - 0.1, each["unigram"] + 0.6))
        right.set(xlabel="step", title="mean |change of a parameter| in a step")
        if any(one["curves"]["step_size"] for one in each["optimizers"].values()):  # without data no log scale
            left.set_xscale("log")
            right.set_yscale("log")
        for axes in (left, middle, right):
            axes.grid(alpha=0.3)
        middle.legend(fontsize="x-small", loc="upper right", ncols=2)
    return figure
