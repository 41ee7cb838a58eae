"""What a run leaves to read: the log, one JSON line a step, its plot, and a line of progress."""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Log:
    """`log.jsonl`. A run that resumes drops the steps after its checkpoint: it will take them again."""

    def __init__(self, path: Path, resumed_at: int):
        self.path = path
        kept = [line for line in read(path) if line["step"] <= resumed_at] if path.exists() else []
        temporary = Path(f"{path}.new")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self.file = path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self.file.close()


def read(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break  # cut short by a crash
    return lines


class Progress:
    """A bar on a terminal; elsewhere (a file, CI) a plain line some twenty times a run."""

    def __init__(self, total: int, done: int, quiet: bool):
        self.total, self.quiet = total, quiet
        self.bar = tqdm(total=total, initial=done, unit="step", disable=quiet or not sys.stderr.isatty())

    def update(self, line: dict[str, Any]) -> None:
        text = f"loss {line['loss']:.3f}  lr {line['lr']:.1e}  {line['tokens_per_s']:,.0f} tokens/s"
        self.bar.update(1)
        self.bar.set_postfix_str(text, refresh=False)
        if not self.quiet and self.bar.disable and line["step"] % max(1, self.total // 20) == 0:
            self.say(f"step {line['step']:>{len(str(self.total))}}/{self.total}  {text}")

    def say(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


def summary(lines: list[dict[str, Any]], unigram: float) -> str:
    """The losses from and to, and the optimizer's share of the steps."""
    steps = [line for line in lines if line["loss"] is not None]
    held_out = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    last = smooth([(line["step"], line["loss"]) for line in steps])[-1][1]
    seconds = statistics.median(line["seconds"] for line in steps)
    inside = statistics.median(line["optimizer_seconds"] for line in steps)
    return (
        f"loss        {steps[0]['loss']:.3f} at the first step, {last:.3f} over the last ones\n"
        f"held out    {held_out[0]:.3f} before, {held_out[-1]:.3f} after; unigram baseline {unigram:.3f}\n"
        f"optimizer   {inside / seconds:.1%} of the step's time, clipping included ({1e3 * inside:.2f} ms "
        f"of {1e3 * seconds:.0f} ms; medians)"
    )


def plot(lines: list[dict[str, Any]], picture: Path, unigram: float, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["heldout_loss"]) for line in lines if "heldout_loss" in line]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(*zip(*smooth(train), strict=True), color="tab:blue", label="training, smoothed")
    axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=4, label="held out")
    axes.axhline(unigram, color="gray", linestyle=":", label=f"unigram baseline, {unigram:.2f}")
    axes.set(xlabel="optimizer step", ylabel="masked-token loss (nats)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over windows of one fiftieth of the run."""
    width = max(1, len(points) // 50)
    windows = [points[i : i + width] for i in range(0, len(points), width)]
    return [(w[len(w) // 2][0], sum(y for _, y in w) / len(w)) for w in windows]
