"""Ten optimizers under one tuning budget: large-batch pretraining of a small BERT (masked language model).

    python bench/compare_optimizers.py --out DIR                   some 20 minutes on a CPU
    python bench/compare_optimizers.py --out DIR                   the same again after an interruption: it goes on
    python bench/compare_optimizers.py --setting gpu --corpus text/ --out DIR     hours; has never been run

SGD, Adam, AdamW, AMSGrad, LaProp, LAMB, AdaBelief, RAdam, MAdam and LaMAdam train the same Post-LN BERT on the
documentation of the installed Python packages, as `bert_pretrain.py` does. For each batch size and each optimizer

- the same number of learning rates is tried on seed 0, a factor of 2 apart around a centre that is the same for all of
  Adam's kin, and while the best is at an edge of the grid one more beyond it, at most twice. The smallest loss on
  held-out text decides;
- with that rate it is trained again on fresh seeds. What is compared are these runs.

All else is the same: steps (for both batch sizes too), weights and order of the text of a seed, masks, 10 % warm-up and
decay by a square root, gradients clipped to norm 1, decoupled weight decay 0.1 on matrices (Adam and SGD: none). Betas
and epsilons are not tuned: see compare/contenders.py, whose last three have 0.98 in place of 0.999.

A run has diverged, and is ended, when its loss is no number or, after warm-up, on average of 5 % of the steps above
that of the first step. A rate is stable if training ends below the loss of guessing without context. "Steps to
target" are those until the mean training loss of 5 % of the steps is at the target: what AdamW's median run on fresh
seeds ends with, plus 0.1. The step size is the mean |change of a parameter| without weight decay (of LAMB with it), the
paper's Figure 5.

Not controlled: the corpus depends on what is installed; the best rate is known to a factor of 2 only and from one seed,
whose noise may move it; the runs are far too short to say how a BERT ends. LaProp and AdaBelief are those of
`pytorch_optimizer`, and are left out where that is not installed; LAMB is `bert/optimizers.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

try:
    import plots
    import torch
    from bert import settings as bert_settings
    from bert.corpus import CorpusError
    from compare import figure, training, tuning
    from compare.contenders import CONTENDERS, PACKAGE
except ImportError as error:
    if error.name not in ("torch", "numpy", "transformers", "tokenizers", "tqdm", "maxva_kernels"):
        raise
    sys.exit(f'compare_optimizers.py: {error.name} is not installed; in the repository: pip install ".[bench]"')

SETTINGS = {
    "cpu": training.Setting(
        layers=2, hidden=64, heads=2, vocab=512, length=16, batches=(32, 128), steps=240, micro_batch=128,
        held_out=512, rates=4,
    ),
    # Never run. Text for it must be given: the documentation of packages is read dozens of times.
    "gpu": training.Setting(
        layers=6, hidden=384, heads=6, vocab=8192, length=128, batches=(512, 4096), steps=1000, micro_batch=512,
        held_out=2048, device="cuda", corpus_size=60.0,
    ),
}  # fmt: skip
TUNING_SEED = 0
TARGET_MARGIN = 0.1
BASELINE = "AdamW"


class Comparison:
    """All runs of one setting, made or read."""

    def __init__(self, setting: training.Setting, text: training.Text, names: list[str], runs: tuning.Runs):
        self.setting, self.text, self.names, self.runs = setting, text, names, runs
        most = setting.rates + tuning.EXTENSIONS + setting.fresh_seeds
        self.left = most * len(names) * len(setting.batches)
        self.seconds: dict[int, list[float]] = {}  # by batch size

    def run(self, name: str, batch: int, lr: float, seed: int) -> dict[str, Any]:
        contender = CONTENDERS[name]
        settings = {
            **{key: value for key, value in dataclasses.asdict(self.setting).items() if key in training.RESULT},
            "optimizer": name,
            "batch": batch,
            "lr": lr,
            "seed": seed,
            "decay": contender.decay,
            "corpus": self.text.tokens.corpus_hash,
            "tokenizer": self.text.tokens.tokenizer_hash,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        self.left -= 1
        if (run := self.runs.find(settings)) is None:
            run = self.runs.add(settings, training.train(self.setting, self.text, contender, lr, batch, seed))
            self.seconds.setdefault(batch, []).append(run["seconds"])
            minutes = self.left * statistics.mean(map(statistics.mean, self.seconds.values())) / 60
            end = f"diverged at step {run['diverged_at']}" if run["validation"] is None else f"{run['validation']:.3f}"
            print(
                f"batch {batch} {name} lr {lr:g} seed {seed}: {end} in {run['seconds']:.1f} s; "
                f"at most {self.left} runs, {minutes:.0f} min left",
                flush=True,
            )
        return run

    def tuned(self, name: str, batch: int) -> dict[str, Any]:
        """One optimizer at one batch size: its grid, and its runs on fresh seeds."""
        by_rate: dict[float, dict[str, Any]] = {}

        def loss(rate: float) -> float:
            by_rate[rate] = self.run(name, batch, rate, TUNING_SEED)
            return tuning.final(by_rate[rate])

        before = self.left
        losses = tuning.tune(loss, CONTENDERS[name].centre, self.setting.rates)
        self.left = before - self.setting.rates - tuning.EXTENSIONS
        best = tuning.best_rate(losses)
        seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + self.setting.fresh_seeds)
        fresh = [self.run(name, batch, best, seed) for seed in seeds]
        stable = tuning.largest_stable(losses, self.text.unigram)
        return {
            "lr": best,
            "at_edge": tuning.next_rate(losses) is not None,
            "by_rate": [
                {"lr": rate, "validation": by_rate[rate]["validation"], "diverged_at": by_rate[rate]["diverged_at"]}
                for rate in losses
            ],
            "largest_stable_lr": stable,
            "unstable_rate_was_tried": stable is not None and stable < max(losses),
            "validation": [run["validation"] for run in fresh],
            **_spread([run["validation"] for run in fresh]),
            "fresh": fresh,
        }


def _spread(losses: list[float | None]) -> dict[str, float | None]:
    """No mean of what did not end."""
    if None in losses:
        return {"mean": None, "deviation": None}
    return {"mean": statistics.mean(losses), "deviation": statistics.stdev(losses) if len(losses) > 1 else None}


def compare(setting: training.Setting, text: training.Text, names: list[str], runs: tuning.Runs) -> dict[str, Any]:
    """The record: for each batch size all optimizers, and what is told by comparing them."""
    comparison = Comparison(setting, text, names, runs)
    found: dict[int, dict[str, Any]] = {batch: {} for batch in setting.batches}
    for name in names:
        for batch in setting.batches:
            found[batch][name] = comparison.tuned(name, batch)
    width = training.window(setting.steps)
    batches = []
    for batch, optimizers in found.items():
        base = optimizers.get(BASELINE)
        target = base and _target(base["fresh"], width)
        for one in optimizers.values():
            fresh = one.pop("fresh")
            one["steps_to_target"] = [target and tuning.steps_to(run["losses"], target, width) for run in fresh]
            one["minus_AdamW"] = base and [
                None if own is None or theirs is None else own - theirs
                for own, theirs in zip(one["validation"], base["validation"], strict=True)
            ]
            one["curves"] = _curves(fresh, width)
        batches.append({"batch": batch, "target": target, "optimizers": optimizers})
    return {
        "setting": dataclasses.asdict(setting),
        "text": text.facts,
        "unigram": text.unigram,
        "threads": torch.get_num_threads(),
        "window": width,
        "runs": setting.fresh_seeds * len(names) * len(setting.batches)
        + sum(len(one["by_rate"]) for each in batches for one in each["optimizers"].values()),
        "batches": batches,
    }


def _target(fresh: list[dict[str, Any]], width: int) -> float | None:
    ends = [math.inf if run["validation"] is None else statistics.mean(run["losses"][-width:]) for run in fresh]
    median = statistics.median(ends)
    return median + TARGET_MARGIN if math.isfinite(median) else None


def _curves(fresh: list[dict[str, Any]], width: int) -> dict[str, list[float]]:
    """Means over the fresh seeds that ended: training loss over `width` steps, step size at the steps measured."""
    ended = [run for run in fresh if run["validation"] is not None]
    if not ended:
        return {"step": [], "loss": [], "measured": [], "step_size": []}
    means = [statistics.mean(values) for values in zip(*(run["losses"] for run in ended), strict=True)]
    ends = range(width, len(means) + 1, max(1, width // 2))
    sizes = list(zip(*(run["step_sizes"] for run in ended), strict=False))
    return {
        "step": list(ends),
        "loss": [round(statistics.mean(means[end - width : end]), 4) for end in ends],
        "measured": [entries[0][0] for entries in sizes],
        "step_size": [float(f"{statistics.mean(size for _, size in entries):.4g}") for entries in sizes],
    }


def table(record: dict[str, Any]) -> str:
    lines = []
    for each in record["batches"]:
        target = f"{each['target']:.2f}" if each["target"] else "none"
        lines.append(f"\nBatch {each['batch']}, target {target}; largest stable below {record['unigram']:.2f}\n")
        lines.append("| | best lr | loss | (deviation) | - AdamW, by seed | largest stable lr | steps to target |")
        lines.append("| --- | ---: | ---: | ---: | --- | ---: | --- |")
        for name, one in each["optimizers"].items():
            rate = f"{one['lr']:g}{' (edge)' if one['at_edge'] else ''}"
            mean = "diverged" if one["mean"] is None else f"{one['mean']:.3f}"
            deviation = "" if one["deviation"] is None else f"({one['deviation']:.3f})"
            stable = "none" if one["largest_stable_lr"] is None else f"{one['largest_stable_lr']:g}"
            stable = stable if one["unstable_rate_was_tried"] or stable == "none" else f">= {stable}"
            lines.append(
                f"| {name} | {rate} | {mean} | {deviation} | {_row(one['minus_AdamW'], '+.3f')} "
                f"| {stable} | {_row(one['steps_to_target'], 'd')} |"
            )
    return "\n".join(lines)


def _row(values: list[Any] | None, form: str) -> str:
    return ", ".join("-" if value is None else format(value, form) for value in values or ())


def parse(argv: list[str] | None) -> Namespace:
    parser = plots.parser(__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="cpu", help="(cpu)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CONTENDERS, help="these optimizers alone")
    parser.add_argument("--corpus", nargs="+", metavar="PATH", help="one's own text, as for bert_pretrain.py")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="tokenizers and token ids (~/.cache/maxva-kernels)")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on CPU (2)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setting = SETTINGS[args.setting]
    names = args.only or list(CONTENDERS)
    if importlib.util.find_spec("pytorch_optimizer") is None and (out := [name for name in names if name in PACKAGE]):
        print(f"without {' and '.join(out)}: pytorch_optimizer is not installed")
        names = [name for name in names if name not in out]
    if setting.device == "cuda" and not torch.cuda.is_available():
        print("compare_optimizers.py: error: --setting gpu: torch sees no CUDA device here", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    try:
        text = training.Text(setting, args.corpus, args.cache or bert_settings.resolve({}).cache)
        runs = tuning.Runs(args.out and args.out / "compare_optimizers.jsonl")
        begin = time.perf_counter()
        record = compare(setting, text, names, runs)
    except CorpusError as error:
        print(f"compare_optimizers.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "the same command goes on from here" if args.out else "without --out nothing is kept"
        print(f"compare_optimizers.py: interrupted; {kept}", file=sys.stderr)
        return 130
    print(f"{record['runs']} runs, this time {time.perf_counter() - begin:.0f} s")
    print(table(record))
    plots.write(args, "compare_optimizers", record, figure.draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
