"""The options of the experiments that make many training runs of small models: a setting, and how many at a time."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import plots
import torch


def parser(doc: str | None, settings: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = plots.parser(doc)
    parser.add_argument("--setting", choices=settings, default="cpu", help="(cpu)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help=f"runs at a time on a CPU, each on one core ({cores})")
    parser.add_argument(
        "--also",
        nargs="+",
        type=_at_rate,
        metavar="NAME=RATE",
        default=[],
        help="train the fresh seeds with these learning rates too, whichever were chosen",
    )
    return parser


def _at_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    try:
        return name, float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RATE, as in AdamW=0.001") from None


def check_also(also: Iterable[tuple[str, float]], names: Collection[str]) -> None:
    """Raises SystemExit where an optimizer of ``--also`` does not take part."""
    if unknown := [name for name, _ in also if name not in names]:
        raise SystemExit(f"--also {unknown[0]}: not one of {', '.join(names)}")


def record_name(args: argparse.Namespace, name: str) -> str:
    """That of the experiment, with the setting's where that is not "cpu"."""
    return name if args.setting == "cpu" else f"{name}_{args.setting}"


def parse(parser: argparse.ArgumentParser, settings: Mapping[str, Any], argv: list[str] | None) -> argparse.Namespace:
    """The arguments; torch then uses one thread.

    Args:
        settings: Each has a ``device``.

    Raises:
        SystemExit: the setting needs a GPU, and there is none.
    """
    args = parser.parse_args(argv)
    if settings[args.setting].device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"{parser.prog}: --setting {args.setting}: torch sees no CUDA device here")
        args.jobs = 1
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least one")
    torch.set_num_threads(1)  # on a CPU the models are too small to share
    return args
