"""What this installation has: which kernels were built, which backends can run here, and why the others cannot.

`python -m maxva_kernels` prints it.
"""

from __future__ import annotations

import platform
import textwrap
from typing import Any

import torch

from . import __version__, _ops, build_record
from .backends import registry

ROW = "{:<11}{:<7}{:<9}{}"


def report() -> str:
    """The whole of it, as text for a person."""
    record = build_record.read()
    lines = [
        f"maxva-kernels {__version__} in {build_record.PACKAGE}",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, {_gpus()}",
        f"CPU kernel: {_built(record, 'cpu')}",
        f"CUDA kernels: {_built(record, 'cuda')}",
    ]
    table = [ROW.format("backend", "built", "can run", "")]
    for name in registry.BACKENDS:
        why_not = _why_not(name)
        built = ("yes" if record[name]["built"] else "no") if name in build_record.MODULES else "-"
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
    """What was built, with what; or why not; and whether it loads and is up to date."""
    if not record[module]["built"]:
        return f"not built: {record[module].get('reason', 'the build recorded no reason')}"
    built = f"built with torch {record.get('torch')}"
    if module == "cuda":
        built += f" and {record.get('cuda_home')} for {record.get('archs')}"
    error = _ops.load_error(build_record.MODULES[module])
    if error:
        return f"{built}, but does not load: {error}"
    outdated = build_record.outdated(build_record.MODULES[module])
    return f"{built}; {outdated}" if outdated else built


def _why_not(name: str) -> str | None:
    """Why a backend cannot run; also where an optimizer refuses to be made, for an environment variable set wrong."""
    try:
        return registry.why_not(name, torch.device(registry.device_type(name)))
    except RuntimeError as error:
        return str(error).removeprefix("maxva: ")


def _note(name: str) -> str:
    """What is worth knowing of a backend that can run."""
    if name == "cpu":
        return f"{torch.ops.maxva.cpu_capability()}, {torch.get_num_threads()} threads"
    return "the paper's algorithm in PyTorch: slow, for checking" if name == "reference" else ""
