"""What this installation has: which kernels were built, which backends can run here, and why the others cannot.

`python -m maxva_kernels` prints it. pip hides the output of a build that succeeds, so the build leaves a record in the
package, and the backends quote it when one that was not built is asked for.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent
RECORD = "_build.json"
MODULES = {"cpu": "_C", "cuda": "_C_cuda"}
ROW = "{:<11}{:<7}{:<9}{}"


def build_record() -> dict[str, Any]:
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
        if (site / PACKAGE.name / RECORD).is_file() and site.resolve() != PACKAGE.parent:
            return site
    return None


def report() -> str:
    """The whole of it, as text for a person."""
    from maxva_kernels import __version__
    from maxva_kernels.backends import registry

    record = build_record()
    lines = [
        f"maxva-kernels {__version__} in {PACKAGE}",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, {_gpus()}",
        f"CPU kernel: {_built(record, 'cpu')}",
        f"CUDA kernels: {_built(record, 'cuda')}",
    ]
    table = [ROW.format("backend", "built", "can run", "")]
    for name in registry.BACKENDS:
        why_not = registry.why_not(name, torch.device("cuda" if name in ("cuda", "triton") else "cpu"))
        built = ("yes" if record[name]["built"] else "no") if name in MODULES else "-"
        table.append(ROW.format(name, built, "no" if why_not else "yes", why_not or _note(name)))
    note_column = len(ROW.format("", "", "", ""))
    return "\n".join([_wrap(line, 8) for line in lines] + [""] + [_wrap(row, note_column) for row in table])


def _wrap(line: str, indent: int) -> str:
    return textwrap.fill(line, 120, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _gpus() -> str:
    if torch.version.cuda is None:
        return "not a CUDA build"
    if not torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, which sees no GPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}, {', '.join(names)}"


def _built(record: dict[str, Any], module: str) -> str:
    """What was built, with what; or why not; and whether it loads."""
    from maxva_kernels import _ops

    if not record[module]["built"]:
        return f"not built: {record[module].get('reason', 'the build recorded no reason')}"
    built = f"built with torch {record.get('torch')}"
    if module == "cuda":
        built += f" and {record.get('cuda_home')} for {record.get('archs')}"
    error = _ops.load_error(MODULES[module])
    return f"{built}, but does not load: {error}" if error else built


def _note(name: str) -> str:
    """What is worth knowing of a backend that can run."""
    if name == "cpu":
        return f"{torch.ops.maxva.cpu_capability()}, {torch.get_num_threads()} threads"
    return "the paper's algorithm in PyTorch: slow, for checking" if name == "reference" else ""
