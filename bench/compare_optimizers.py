"""Ten optimizers under one tuning budget: large-batch pretraining of a small BERT (masked language model).

    python bench/compare_optimizers.py --out DIR                   24 minutes on two cores
    python bench/compare_optimizers.py --out DIR                   the same again after an interruption: it goes on
    python bench/compare_optimizers.py --setting varied --out DIR  AdamW and MAdam in other circumstances: 40 minutes*
    python bench/compare_optimizers.py --setting warmup --out DIR  the same with the longer warm-up: 40 minutes*
    python bench/compare_optimizers.py --setting gpu --corpus text/ --out DIR     hours; has never been run

(* An estimate from runs with a smaller budget.)

SGD, Adam, AdamW, AMSGrad, LaProp, LAMB, AdaBelief, RAdam, MAdam and LaMAdam train the same Post-LN BERT on the
documentation of the installed Python packages, as `bert_pretrain.py` does. A setting has cases: two batch sizes, or
where AdamW and MAdam take part alone, with 0.98, batch size, depth, length, warm-up or steps, of which one is changed
at a time. In each case and for each optimizer

- the same number of learning rates is tried on two seeds (on a GPU one), a factor of 2 apart around a centre that is
  the same for all of Adam's kin, and while the best is at an edge of the grid one more beyond it, at most twice. The
  smallest mean loss on held-out text decides, which is infinite where a run diverged;
- with that rate it is trained again on three fresh seeds. What is compared are these runs.

All else is the same: weights and order of the text of a seed, masks, 10 % warm-up and decay by a square root,
gradients clipped to norm 1, decoupled weight decay 0.1 on matrices (Adam and SGD: none). Betas and epsilons are not
tuned: see compare/contenders.py, whose last three have 0.98 in place of 0.999.

A run has diverged, and is ended, when its loss is no number or, after warm-up, on average of 5 % of the steps above
that of the first step. A rate is stable if training on both seeds ends, on average below the loss of guessing without
context. "Steps to target" are those until the mean training loss of 5 % of the steps is at the target: what AdamW's
median run on fresh seeds ends with, plus 0.1. The step size is the mean |change of a parameter| without weight decay
(of LAMB with it), the paper's Figure 5.

Not controlled: the corpus depends on what is installed; the best rate is known to a factor of 2 only and from two
seeds, whose noise may move it; the runs are far too short to say how a BERT ends. LaProp and AdaBelief are those of
`pytorch_optimizer`, and are left out where that is not installed; LAMB is `bert/optimizers.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

try:
    import plots
    import torch
    from bert import settings as bert_settings
    from bert.corpus import CorpusError
    from compare import figure, options, training, tuning
    from compare.contenders import CONTENDERS, PACKAGE
    from compare.workers import Make, Run, in_processes
except ImportError as error:
    if error.name not in ("torch", "numpy", "transformers", "tokenizers", "tqdm", "maxva_kernels"):
        raise
    sys.exit(f'compare_optimizers.py: {error.name} is not installed; in the repository: pip install ".[bench]"')


@dataclass(frozen=True)
class Setting:
    """The cases in which optimizers are compared, and their budget in each."""

    cases: dict[str, training.Setting]
    names: tuple[str, ...] = tuple(CONTENDERS)
    baseline: str = "AdamW"
    budget: tuning.Budget = tuning.Budget(rates=4, chosen_on=2, fresh=3)  # noqa: RUF009  it is frozen
    corpus_size: float = 6.0  # MB

    @property
    def device(self) -> str:
        return next(iter(self.cases.values())).device


SMALL = training.Setting(
    layers=2, hidden=64, heads=2, vocab=512, length=16, batch=128, steps=240, micro_batch=128, held_out=512
)
WARM = replace(SMALL, warmup=0.3)
LARGE = training.Setting(
    layers=6, hidden=384, heads=6, vocab=8192, length=128, batch=512, steps=1000, micro_batch=512, held_out=2048,
    device="cuda",
)  # fmt: skip
TWO: dict[str, Any] = {"names": ("AdamW 0.98", "MAdam 0.98"), "baseline": "AdamW 0.98"}
SETTINGS = {
    "cpu": Setting({"batch 32": replace(SMALL, batch=32), "batch 128": SMALL}),
    "varied": Setting(
        {
            "batch 128": SMALL,
            "batch 512": replace(SMALL, batch=512),
            "4 layers": replace(SMALL, layers=4),
            "6 layers": replace(SMALL, layers=6),
            "32 sequences of 64": replace(SMALL, length=64, batch=32),
            "warm-up 2 %": replace(SMALL, warmup=0.02),
            "warm-up 30 %": WARM,
            "720 steps": replace(SMALL, steps=720),
        },
        **TWO,
    ),
    "warmup": Setting(
        {
            "warm-up 30 %": WARM,
            "and batch 512": replace(WARM, batch=512),
            "and 6 layers": replace(WARM, layers=6),
            "and 12 layers": replace(WARM, layers=12),
            "and 720 steps": replace(WARM, steps=720),
        },
        **TWO,
    ),
    # Never run. Text for it must be given: the documentation of packages is read dozens of times.
    "gpu": Setting(
        {"batch 512": LARGE, "batch 4096": replace(LARGE, batch=4096)},
        budget=tuning.Budget(rates=5, chosen_on=1, fresh=3),
        corpus_size=60.0,
    ),
}
TARGET_MARGIN = 0.1
Texts = dict[str, training.Text]  # by case


def train(which: tuple[str, str], lr: float, seed: int, setting: Setting, texts: Texts) -> dict[str, Any]:
    case, name = which
    return training.train(setting.cases[case], texts[case], CONTENDERS[name], lr, seed)


class Progress:
    """Tells of each run that was made, and how long those to come may take."""

    def __init__(self, setting: Setting, optimizers: int, also: int, jobs: int):
        each = optimizers * setting.budget.runs + also * setting.budget.fresh
        self.left = dict.fromkeys(setting.cases, each)  # at most
        self.setting, self.jobs = setting, jobs
        self.seconds = self.cost = 0.0  # of what was made

    def read(self, run: Run) -> None:
        (case, _), *_ = run
        self.left[case] -= 1

    def made(self, run: Run, result: dict[str, Any]) -> None:
        self.read(run)
        (case, name), lr, seed = run
        self.seconds += result["seconds"]
        self.cost += self.setting.cases[case].cost
        left = sum(count * self.setting.cases[case].cost for case, count in self.left.items())
        minutes = left * self.seconds / self.cost / self.jobs / 60
        loss, end = result["validation"], result["diverged_at"]
        print(
            f"{case}, {name}, lr {lr:g}, seed {seed}: "
            + (f"diverged at step {end}" if loss is None else f"{loss:.3f}")
            + f" in {result['seconds']:.1f} s; at most {sum(self.left.values())} runs, {minutes:.0f} min left",
            flush=True,
        )


def compare(
    setting: Setting,
    texts: Texts,
    names: list[str],
    also: list[tuple[str, float]],
    runs: tuning.Runs,
    make: Make,
    jobs: int,
) -> dict[str, Any]:
    """The record: for each case all optimizers, and what is told by comparing them."""
    progress = Progress(setting, len(names), len(also), jobs)

    def key(run: Run) -> dict[str, Any]:
        (case, name), lr, seed = run
        return {
            **asdict(setting.cases[case]),
            "optimizer": name,
            "lr": lr,
            "seed": seed,
            "decay": CONTENDERS[name].decay,
            "corpus": texts[case].tokens.corpus_hash,
            "tokenizer": texts[case].tokens.tokenizer_hash,
            "torch": torch.__version__,
        }

    def get(wanted: list[Run]) -> dict[Run, dict[str, Any]]:
        for run in wanted:
            if runs.find(key(run)):
                progress.read(run)
        return runs.get(wanted, key, make, progress.made)

    centres = {(case, name): CONTENDERS[name].centre for case in setting.cases for name in names}
    tuned = tuning.tune(get, centres, setting.budget)
    beside = [((case, name), lr) for case in setting.cases for name, lr in also]
    for ((case, name), lr), one in tuning.given(get, beside, setting.budget.fresh_seeds).items():
        tuned[case, f"{name} at {lr:g}"] = one
    return {
        "baseline": setting.baseline,
        "budget": asdict(setting.budget),
        "runs": sum(sum(map(len, one.by_rate.values())) + len(one.fresh) for one in tuned.values()),
        "cases": [
            _case(case, setting, texts[case], {name: one for (its, name), one in tuned.items() if its == case})
            for case in setting.cases
        ],
    }


def _case(case: str, setting: Setting, text: training.Text, tuned: dict[str, tuning.Tuned]) -> dict[str, Any]:
    width = training.window(setting.cases[case].steps)
    base = tuned.get(setting.baseline)
    target = _target(base.fresh, width) if base else None
    return {
        "case": case,
        "setting": asdict(setting.cases[case]),
        "text": text.facts,
        "unigram": text.unigram,
        "window": width,
        "target": target,
        "optimizers": {name: _optimizer(one, base, text.unigram, target, width) for name, one in tuned.items()},
    }


def _optimizer(
    one: tuning.Tuned, base: tuning.Tuned | None, unigram: float, target: float | None, width: int
) -> dict[str, Any]:
    stable = tuning.largest_stable(one.losses, unigram)
    ends = [run["validation"] for run in one.fresh]
    return {
        "lr": one.lr,
        "at_edge": one.at_edge,
        "by_rate": [
            {"lr": lr, **{entry: [run[entry] for run in runs] for entry in ("validation", "diverged_at")}}
            for lr, runs in one.by_rate.items()
        ],
        "largest_stable_lr": stable,
        "unstable_rate_was_tried": stable is not None and stable < max(one.losses),
        "validation": ends,
        **_spread(ends),
        "steps_to_target": [target and tuning.steps_to(run["losses"], target, width) for run in one.fresh],
        "minus_baseline": base
        and [
            None if own is None or theirs["validation"] is None else own - theirs["validation"]
            for own, theirs in zip(ends, base.fresh, strict=True)
        ],
        "curves": _curves(one.fresh, width),
    }


def _spread(losses: list[Any]) -> dict[str, float | None]:
    """No mean of what did not end."""
    if None in losses:
        return {"mean": None, "deviation": None}
    return {"mean": statistics.mean(losses), "deviation": statistics.stdev(losses) if len(losses) > 1 else None}


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
    base, lines = record["baseline"], []
    for each in record["cases"]:
        target = f"{each['target']:.2f}" if each["target"] else "none"
        lines.append(f"\n{each['case']}: target {target}; largest stable below {each['unigram']:.2f}\n")
        lines.append(f"| | best lr | loss | (deviation) | - {base}, by seed | largest stable lr | steps to target |")
        lines.append("| --- | ---: | ---: | ---: | --- | ---: | --- |")
        for name, one in each["optimizers"].items():
            rate = f"{one['lr']:g}{' (edge)' if one['at_edge'] else ''}"
            mean = "diverged" if one["mean"] is None else f"{one['mean']:.3f}"
            deviation = "" if one["deviation"] is None else f"({one['deviation']:.3f})"
            stable = "none" if one["largest_stable_lr"] is None else f"{one['largest_stable_lr']:g}"
            stable = stable if one["unstable_rate_was_tried"] or stable == "none" else f">= {stable}"
            stable = stable if one["by_rate"] else ""
            lines.append(
                f"| {name} | {rate} | {mean} | {deviation} | {_row(one['minus_baseline'], '+.3f')} "
                f"| {stable} | {_row(one['steps_to_target'], 'd')} |"
            )
    return "\n".join(lines)


def _row(values: list[Any] | None, form: str) -> str:
    return ", ".join("-" if value is None else format(value, form) for value in values or ())


def parse(argv: list[str] | None) -> Namespace:
    parser = options.parser(__doc__, SETTINGS)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CONTENDERS, help="these optimizers alone")
    parser.add_argument("--corpus", nargs="+", metavar="PATH", help="one's own text, as for bert_pretrain.py")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="tokenizers and token ids (~/.cache/maxva-kernels)")
    return options.parse(parser, SETTINGS, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    setting = SETTINGS[args.setting]
    names = args.only or list(setting.names)
    if importlib.util.find_spec("pytorch_optimizer") is None and (out := [name for name in names if name in PACKAGE]):
        print(f"without {' and '.join(out)}: pytorch_optimizer is not installed")
        names = [name for name in names if name not in out]
    options.check_also(args.also, names)
    # Runs that two settings share are made once.
    runs = tuning.Runs(args.out and args.out / "compare_optimizers.jsonl")
    try:
        cache = args.cache or bert_settings.resolve({}).cache
        source = training.Source(args.corpus, setting.corpus_size * 1e6, cache)
        texts = {case: training.Text(one, source) for case, one in setting.cases.items()}
        begin = time.perf_counter()
        with in_processes(functools.partial(train, setting=setting, texts=texts), args.jobs) as make:
            record = compare(setting, texts, names, args.also, runs, make, args.jobs)
    except CorpusError as error:
        print(f"compare_optimizers.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "the same command goes on from here" if args.out else "without --out nothing is kept"
        print(f"compare_optimizers.py: interrupted; {kept}", file=sys.stderr)
        return 130
    print(f"{record['runs']} runs, this time {time.perf_counter() - begin:.0f} s")
    print(table(record))
    plots.write(args, options.record_name(args, "compare_optimizers"), record, figure.draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
