"""A copy of what the package is built from, and whether what is installed was built from what the checkout holds now.

Building in a copy keeps the checkout clean. The copy keeps the files' times, so that a second build compiles only what
has changed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

NAMES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
FOLDERS = ("build_backend", "csrc", "maxva_kernels", "triton_kernels")
LEFT_OUT = shutil.ignore_patterns("*.so", "__pycache__", "_build.json", "*.egg-info")
MARK = "gpu_check_sources"  # in the installation: the fingerprint of what it was built from


def copy(root: Path, to: Path) -> None:
    """Makes `to` the sources of `root`; what a build left in it besides stays."""
    to.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        shutil.rmtree(to / name, ignore_errors=True)
        shutil.copytree(root / name, to / name, ignore=LEFT_OUT)
    for name in NAMES:
        shutil.copy2(root / name, to / name)


def fingerprint(root: Path) -> str:
    """Of everything that a build depends on, but the machine."""
    digest = hashlib.sha256()
    for path in sorted(_files(root)):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def mark(root: Path, work: Path) -> None:
    """Notes that the installation is of these sources."""
    (work / "site" / MARK).write_text(fingerprint(root))


def is_current(root: Path, work: Path) -> bool:
    """Whether there is an installation, and of these sources."""
    return installed(work) == fingerprint(root)


def installed(work: Path) -> str | None:
    """The fingerprint of what is installed, or None where nothing is."""
    path = work / "site" / MARK
    return path.read_text() if path.is_file() else None


def _files(root: Path) -> Iterator[Path]:
    yield from (root / name for name in NAMES)
    for name in FOLDERS:
        for path in (root / name).rglob("*"):
            left_out = path.suffix == ".so" or path.name == "_build.json" or "__pycache__" in path.parts
            if path.is_file() and not left_out:
                yield path
