"""What the build of this package left behind: which kernels it built, and why not the others.

pip hides the output of a build that succeeds, so the build writes a record into the package, and the backends quote it
when one that was not built is asked for.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
RECORD = "_build.json"
MODULES = {"cpu": "_C", "cuda": "_C_cuda"}


def read() -> dict[str, Any]:
    """What the build of this package left: `cpu` and `cuda` with `built` and, where that is False, `reason`; and
    `version`, `torch`, `cuda_home` and `archs`, where they apply.

    Where there is no record that can be read, nothing counts as built and the reason says what to do.
    """
    try:
        record: dict[str, Any] = json.loads((PACKAGE / RECORD).read_text(encoding="utf-8"))
        if all(isinstance(record[module]["built"], bool) for module in MODULES):
            return record
        reason = _unreadable("built is neither true nor false")
    except FileNotFoundError:
        reason = _absent()
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = _unreadable(f"{type(error).__name__}: {error}")
    return {module: {"built": False, "reason": reason} for module in MODULES}


def outdated(name: str) -> str | None:
    """Whether the compiled module ``"_C"`` or ``"_C_cuda"`` is older than its sources, as in an editable installation
    after a pull or an edit, and what to do; None where it is not, or where there are no sources beside the package."""
    csrc = PACKAGE.parent / "csrc"
    others = "cuda" if name == MODULES["cpu"] else "cpu"
    sources = [path for path in csrc.rglob("*") if path.is_file() and path.relative_to(csrc).parts[0] != others]
    built = [path.stat().st_mtime for path in PACKAGE.glob(f"{name}.*")]
    changed = [path for path in sources if built and path.stat().st_mtime > max(built)]
    if not changed:
        return None
    return (
        f"the kernels of {name} are older than their sources ({changed[0].relative_to(PACKAGE.parent)} has changed "
        "since) and compute what those did; run pip install -e . again"
    )


def _unreadable(why: str) -> str:
    return f"the build record {PACKAGE / RECORD} cannot be read ({why}): install maxva-kernels again"


def _absent() -> str:
    if elsewhere := _installed_elsewhere():
        return (
            f"Python imports the source tree {PACKAGE.parent}, which was not built, and not the installation in "
            f"{elsewhere}: run from another folder, or install the tree itself with pip install -e ."
        )
    return f"{PACKAGE} was not built: run pip install . in the source tree"


def _installed_elsewhere() -> Path | None:
    """Where the package is installed besides here: the current folder, when it holds the source, hides it."""
    for distribution in importlib.metadata.distributions(name="maxva-kernels"):
        site = Path(str(distribution.locate_file("")))
        if (site / PACKAGE.name / RECORD).is_file():
            return site
    return None
