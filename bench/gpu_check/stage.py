"""What every stage is given, and how it ends."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_check.record import Record

LIMIT = "MAXVA_CHECK_ENDS"  # when the stage will be stopped, by time.time()


class Lacking(Exception):
    """This machine has not what a part of the programme needs. No failure: it is recorded, and the rest goes on."""


@dataclass
class Stage:
    root: Path  # of the checkout
    work: Path  # scratch; the package is installed in work/site
    rehearsal: bool
    record: Record
    wheel: Path | None = None

    @property
    def site(self) -> Path:
        return self.work / "site"

    def seconds_left(self) -> float:
        return float(os.environ.get(LIMIT, "inf")) - time.time()

    def check_package(self) -> None:
        """Raises unless the package that Python would import is the one that this programme installed."""
        spec = importlib.util.find_spec("maxva_kernels")
        found = Path(str(spec and spec.origin)).resolve()
        if not found.is_relative_to(self.site.resolve()):
            raise RuntimeError(f"maxva_kernels is imported from {found}, and not from {self.site}")


def main(run: Callable[[Stage], None]) -> None:
    """A stage module's main: its record ends as passed, failed or lacking, and so does the process."""
    parser = argparse.ArgumentParser()
    for name in ("--root", "--work", "--record"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--wheel", type=Path)
    args = parser.parse_args()
    record = Record(args.record)
    status = None
    try:
        run(Stage(args.root, args.work, args.rehearse, record, args.wheel))
    except Lacking as missing:
        record.lacks(str(missing))
        status = "lacking"
    except Exception as error:
        traceback.print_exc()
        record.problem(f"{type(error).__name__}: {error}")
        record["traceback"] = traceback.format_exc().splitlines()[-30:]
    record["status"] = "failed" if record["problems"] else status or "passed"
    sys.exit(1 if record["problems"] else 0)
