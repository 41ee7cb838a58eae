"""Other layouts of the optimizer's state than bfloat16: what each does to sqrt(v), and to the loss of a small BERT.

    python bench/narrow_layouts.py [--out DIR]      23 minutes on two cores, other work beside;
                                                    the same again goes on after an interruption

The layouts are simulated: the state is MAdam's in float32, and after each step every moment becomes one of the two
numbers beside it that the layout has, the upper one with the probability that makes it right on average. Where the
numbers of a block of 128 share a scale, that is their largest, exactly.

1. The error of sqrt(v), as in `narrow_state.py`, for four kinds of gradients and two upper bounds of beta.
2. The BERT of `compare_optimizers.py`, batch 128, 720 steps at that optimizer's best learning rate there, bounds
   (0.5, 0.999): held-out loss on five seeds, and the difference from float32's on the same seeds.

Not controlled: 8-bit codes could lie elsewhere (here each is 9 % above the one below), and blocks be smaller.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import plots
import torch
from bert import settings as bert_settings
from compare import training
from compare.contenders import Contender
from compare.tuning import Runs
from compare.workers import Run, in_processes
from compare_optimizers import SMALL
from narrow_state import KINDS, UPPERS, cut, error_of_root_v
from torch import Tensor

from maxva_kernels import MAdam
from maxva_kernels.groups import MOMENTS

BLOCK = 128
RATE, SEEDS = 8e-3, range(5)
SETTING = replace(SMALL, steps=720)
CORPUS = 6e6  # characters

Rounding = Callable[[Tensor, torch.Generator], Tensor]


def floating(kept: int) -> Rounding:
    """float32 with so many bits behind the leading one."""

    def rounded(value: Tensor, generator: torch.Generator) -> Tensor:
        value = value.clone()
        cut(value, kept, generator)
        return value

    return rounded


def one_of(codes: Tensor, value: Tensor, generator: torch.Generator) -> Tensor:
    """A neighbour of each value among ``codes``, which ascend and reach beyond all values; right on average."""
    above = torch.searchsorted(codes, value).clamp_(1, len(codes) - 1)
    low, high = codes[above - 1], codes[above]
    return torch.where(torch.rand(value.shape, generator=generator) < (value - low) / (high - low), high, low)


def in_blocks(codes: Tensor) -> Rounding:
    """Codes from -1 or 0 to 1, times the largest number of each block."""

    def rounded(value: Tensor, generator: torch.Generator) -> Tensor:
        flat = value.flatten()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True)
        shares = blocks / torch.where(scale > 0, scale, 1)
        return (one_of(codes, shares, generator) * scale).flatten()[: len(flat)].view_as(value)

    return rounded


def powers(count: int, octaves: int) -> Tensor:
    """0, and powers down from 1, equally far apart on a logarithmic scale."""
    return torch.cat([torch.zeros(1), torch.exp2(torch.linspace(-octaves, 0, count))])


def both_signs(codes: Tensor) -> Tensor:
    return torch.cat([-codes[1:].flip(0), codes])


SIXTEEN, UNSIGNED = floating(7), floating(8)
HALVES = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float() / 65504  # all that are finite and positive
HALF, SIGNED_HALF = in_blocks(HALVES), in_blocks(both_signs(HALVES))
EIGHT, SIGNED_EIGHT = in_blocks(powers(255, 32)), in_blocks(both_signs(powers(127, 16)))
SQUARES = functools.partial(one_of, (torch.arange(256) / 255) ** 2)  # w's smallest is 1 - beta: the squares reach lower


@dataclass(frozen=True)
class Layout:
    label: str
    size: float  # bytes a parameter, without those of scales
    exp_avg: Rounding
    grad_mean: Rounding
    grad_var: Rounding
    weight_sum: Rounding

    def __call__(self, state: dict[str, Tensor], generator: torch.Generator) -> None:
        for name in MOMENTS:
            state[name].copy_(getattr(self, name)(state[name], generator))


LAYOUTS = {
    "bfloat16": Layout("bfloat16", 8, SIXTEEN, SIXTEEN, SIXTEEN, SIXTEEN),
    "unsigned": Layout("bfloat16, s and w without a sign", 8, SIXTEEN, SIXTEEN, UNSIGNED, UNSIGNED),
    "float16": Layout("float16, scaled by block", 8, SIGNED_HALF, SIGNED_HALF, HALF, SIXTEEN),
    "w8": Layout("bfloat16, w in 8 bits", 7, SIXTEEN, SIXTEEN, SIXTEEN, SQUARES),
    "mw8": Layout("bfloat16, m and w in 8 bits", 6, SIGNED_EIGHT, SIXTEEN, SIXTEEN, SQUARES),
    "eight": Layout("8 bits, scaled by block", 4, SIGNED_EIGHT, SIGNED_EIGHT, EIGHT, SQUARES),
}  # fmt: skip


class Simulated(MAdam):
    """Keeps its state in a layout."""

    def __init__(self, groups: Any, layout: Layout | None):
        super().__init__(groups, lr=1.0, beta2_range=(0.5, 0.999))
        self.layout, self.generator = layout, torch.Generator().manual_seed(0)

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.layout:
            for state in self.state.values():
                self.layout(state, self.generator)
        return loss


def run(what: tuple[str, ...], number: float, seed: int, text: training.Text) -> dict[str, Any]:
    """The error for gradients of a kind and an upper bound, or a training run at a learning rate."""
    name, *kind = what
    layout = LAYOUTS.get(name)
    if kind:
        bias, spread = error_of_root_v(kind[0], number, layout or "float32", count=4096)
        return {"bias": bias, "spread": spread}
    return training.train(SETTING, text, Contender(lambda groups: Simulated(groups, layout), RATE), number, seed)


ERRORS: list[Run] = [((name, kind), upper, 0) for name, upper, kind in itertools.product(LAYOUTS, UPPERS, KINDS)]
TRAINED: list[Run] = [((name,), RATE, seed) for seed, name in itertools.product(SEEDS, ("float32", *LAYOUTS))]


def record(done: dict[Run, dict[str, Any]]) -> dict[str, Any]:
    """By layout: errors by upper bound and kind, losses by seed."""
    found: dict[str, Any] = {}
    for name in ("float32", *LAYOUTS):
        ends = [done[(name,), RATE, seed]["validation"] for seed in SEEDS]
        plain = [done[("float32",), RATE, seed]["validation"] for seed in SEEDS]
        found[name] = {
            "errors": {
                str(upper): {kind: done[(name, kind), upper, 0] for kind in KINDS}
                for upper in UPPERS
                if name in LAYOUTS
            },
            "held_out": ends,
            "less_float32": [None if None in (a, b) else a - b for a, b in zip(ends, plain, strict=True)],
        }
    return found


def table(found: dict[str, Any]) -> str:
    """The largest errors over the kinds of gradients, and losses."""
    errors_of = " | ".join(f"β̄ {upper}: bias | spread" for upper in UPPERS)
    lines = [f"| state | bytes | {errors_of} | held out | less float32's, by seed |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    for name, one in found.items():
        label, size = (LAYOUTS[name].label, LAYOUTS[name].size) if name in LAYOUTS else (name, 16)
        errors = [
            f"{100 * max(abs(each[key]) for each in kinds.values()):.3g} %"
            for kinds in one["errors"].values()
            for key in ("bias", "spread")
        ]
        errors = errors or ["", "", "", ""]
        ended = [loss for loss in one["held_out"] if loss is not None]
        loss = f"{statistics.mean(ended):.3f}" if ended else ""
        less = ", ".join("diverged" if value is None else f"{value:+.3f}" for value in one["less_float32"])
        lines.append(f"| {label} | {size:g} | {' | '.join(errors)} | {loss} | {less} |")
    return "\n".join(lines)


def draw(found: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    layouts = found["layouts"]
    for i, name in enumerate(LAYOUTS):
        for upper, colour in zip(UPPERS, ("tab:cyan", "tab:blue"), strict=True):
            spreads = [each["spread"] for each in layouts[name]["errors"][str(upper)].values()]
            left.plot(spreads, [i] * len(spreads), "o", color=colour, label=f"β̄ {upper}" if i == 0 else None)
        ended = [less for less in layouts[name]["less_float32"] if less is not None]
        right.plot(ended, [i] * len(ended), ".", color="tab:blue")
    left.set(xscale="log", xlabel=r"spread of $\sqrt{v}$, by kind of gradient")
    left.axvline(2e-2, color="0.5", linewidth=0.8)
    left.set_yticks(range(len(LAYOUTS)), [each.label for each in LAYOUTS.values()])
    left.invert_yaxis()
    left.legend()
    right.axvline(0, color="0.5", linewidth=0.8)
    right.set(xlabel="held-out loss less float32's, by seed")
    return figure


def main() -> None:
    args = plots.parse(__doc__)
    begin = time.perf_counter()
    source = training.Source(None, CORPUS, bert_settings.resolve({}).cache)
    text = training.Text(SETTING, source)
    runs = Runs(args.out and args.out / "narrow_layouts.jsonl")

    def key(one: Run) -> dict[str, Any]:
        told_apart = dict(zip(("what", "number", "seed"), one, strict=True))
        return told_apart | {"tokenizer": text.tokens.tokenizer_hash, "torch": torch.__version__}

    def say(one: Run, result: dict[str, Any]) -> None:
        what, number, seed = one
        told = {name: value for name, value in result.items() if name in ("bias", "spread", "validation")}
        print(f"{', '.join(what)}, {number:g}, seed {seed}: {told}", flush=True)

    with in_processes(functools.partial(run, text=text), len(os.sched_getaffinity(0))) as make:
        done = runs.get(ERRORS + TRAINED, key, make, say)
    found = record(done)
    print(f"{time.perf_counter() - begin:.0f} s\n\n{table(found)}")
    plots.write(args, "narrow_layouts", {"layouts": found}, draw)


if __name__ == "__main__":
    main()
