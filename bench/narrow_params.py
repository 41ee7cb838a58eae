"""What parameters in bfloat16 cost, and what master weights and stochastic rounding save: the small BERT.

    python bench/narrow_params.py [--out DIR]       half an hour; the same again goes on after an interruption

`bert_pretrain.py` as it is, MAdam, 1,000 steps, three seeds, in float32 and with the whole model in bfloat16, its
parameters rounded to nearest, stochastically, or with master weights. All runs of a seed have the same text, order and
masks, and the same initial weights but for rounding. Beside float32, forward and backward pass are in bfloat16 too.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import plots
import torch
from compare.tuning import Runs
from narrow_state import SEEDS, bert

VARIANTS = {
    "float32": "float32",
    "bfloat16": "bfloat16, to nearest",
    "bfloat16-stochastic": "bfloat16, stochastic_rounding",
    "bfloat16-master": "bfloat16, master_weights",
}


def train(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Each variant's runs, one a seed."""
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for seed in SEEDS:
        for variant, done in found.items():
            settings = {"params": variant, "seed": seed, "torch": torch.__version__}
            run = runs.find(settings)
            if run is None:
                run = runs.add(settings, bert(seed, "--params", variant))
                print(f"seed {seed}, {VARIANTS[variant]}: held out {run['held_out']:.4f}", flush=True)
            done.append(run)
    return found


def draw(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (variant, label), colour in zip(
        VARIANTS.items(), ("tab:blue", "tab:red", "tab:orange", "tab:green"), strict=True
    ):
        smooth = torch.tensor([run["losses"] for run in record["bert"][variant]]).unfold(1, 25, 5).mean(2)
        steps = torch.arange(smooth.shape[1]) * 5 + 13
        for seed, row in enumerate(smooth):
            axes.plot(steps, row, color=colour, linewidth=0.8, label=label if seed == 0 else None)
    axes.set(xlabel="step", title="small BERT by its parameters: training loss (mean of 25 steps)")
    axes.legend()
    return figure


def main() -> None:
    args = plots.parse(__doc__)
    begin = time.perf_counter()
    found = train(Runs(args.out and args.out / "narrow_params.jsonl"))
    print(f"{time.perf_counter() - begin:.0f} s\n")
    print("| parameters | last 100 steps | held out | less float32's, by seed |\n| --- | ---: | ---: | --- |")
    for variant, runs in found.items():
        last, held_out = (statistics.mean(run[key] for run in runs) for key in ("last_100", "held_out"))
        pairs = zip(runs, found["float32"], strict=True)
        differences = ", ".join(f"{ours['held_out'] - theirs['held_out']:+.3f}" for ours, theirs in pairs)
        print(f"| {VARIANTS[variant]} | {last:.3f} | {held_out:.3f} | {differences} |")
    plots.write(args, "narrow_params", {"bert": found}, draw)


if __name__ == "__main__":
    main()
