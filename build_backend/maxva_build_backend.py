"""PEP 517 backend: setuptools, building against the torch of the environment that is installed into.

Build isolation hides that torch. Asking for one in `build-system.requires` would make pip download a second, perhaps
another one, of several gigabytes; so this backend looks the first one up, and asks for torch only where there is none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import setuptools
from maxva_build_plan import MIN_TORCH, BuildError, parse_version, requested_mode
from setuptools import build_meta

if parse_version(setuptools.__version__) < (77, 0):  # build isolation sees to it, --no-build-isolation does not
    raise BuildError(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77' ninja")

Settings = dict[str, Any] | None

FIND_TORCH = """
import importlib.metadata, importlib.util, json, os, sys
spec = importlib.util.find_spec("torch")
found = None
if spec and spec.origin:
    home = os.path.dirname(os.path.dirname(spec.origin))
    for torch in importlib.metadata.distributions(name="torch"):
        found = {"version": torch.version, "path": [home, *filter(os.path.isdir, sys.path)]}
        break
print(json.dumps(found))
"""


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    if requested_mode(os.environ) == "python":
        return []
    return ["ninja"] if _torch_is_at_hand() else ["ninja", "torch>=" + ".".join(map(str, MIN_TORCH))]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _expose_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    _expose_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    with _without_kernels():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    with _without_kernels():
        return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    with _without_kernels():
        return build_meta.build_sdist(sdist_directory, config_settings)


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Run setup.py for what does not depend on the compiled modules, so that it needs no torch."""
    before = {name: os.environ.pop(name, None) for name in ("MAXVA_BUILD", "FORCE_CUDA")}
    os.environ["MAXVA_BUILD"] = "python"
    try:
        yield
    finally:
        del os.environ["MAXVA_BUILD"]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _torch_is_at_hand() -> bool:
    return importlib.util.find_spec("torch") is not None or _installed_torch() is not None


def _expose_torch() -> None:
    """Make the target environment's torch importable, after everything the build environment has of its own."""
    if requested_mode(os.environ) == "python" or importlib.util.find_spec("torch") is not None:
        return
    if torch := _installed_torch():
        sys.path += [entry for entry in torch["path"] if entry not in sys.path]


@cache
def _installed_torch() -> dict[str, Any] | None:
    """The torch of the environment that pip works for, where it is new enough.

    pip isolates by means of PYTHONPATH: the same interpreter without it sees that environment as its user does, with
    user site, system site packages and .pth files. It runs outside the source tree, which is no part of that.
    """
    command = [sys.executable, "-E", "-c", FIND_TORCH]
    result = subprocess.run(command, capture_output=True, text=True, cwd=sys.prefix, check=True)
    torch: dict[str, Any] | None = json.loads(result.stdout.splitlines()[-1])  # what a .pth file prints comes before
    return torch if torch and parse_version(torch["version"] or "") >= MIN_TORCH else None
