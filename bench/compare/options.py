"""The options of the experiments that make many training runs of small models: a setting, and how many at a time."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import plots
import torch


def parser(doc: str | None, settings: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = plots.parser(doc)
    parser.add_argument("--setting", choices=settings, default="cpu", help="(cpu)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help=f"runs at a time on a CPU, each on one core ({cores})")
    return parser


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
