"""What the experiments with one figure share: options, colours, and how results are written."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COLOURS = {"Adam": "tab:orange", "AMSGrad": "tab:green", "MAdam": "tab:blue"}


def parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the numbers and a figure there")
    return parser


def parse(doc: str | None) -> argparse.Namespace:
    return parser(doc).parse_args()


def write(args: argparse.Namespace, name: str, record: dict[str, Any], draw: Callable[[dict[str, Any]], Any]) -> None:
    """Writes what the options ask for: NAME.json, and where matplotlib is installed NAME.png."""
    text = json.dumps({"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), **record}, indent=1)
    text = re.sub(r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list on one line
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    for path in [path for path in (args.json, args.out and args.out / f"{name}.json") if path]:
        path.write_text(text + "\n")
    if args.out:
        try:
            draw(record).savefig(args.out / f"{name}.png", dpi=100)
        except ImportError as error:
            print(f"no figure: {error}")
