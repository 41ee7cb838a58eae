"""Which backend runs on which device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..groups import Group, Scaling
from ..saturation import Saturation
from ..statistics import Recorder
from . import cpu, cuda, reference, triton


class Backend(Protocol):
    """The face of a backend module; see the package's docstring."""

    NAME: str

    def why_not(self, device: torch.device) -> str | None: ...

    def step(
        self,
        groups: Sequence[Group],
        laprop: bool,
        scaling: Scaling,
        recorder: Recorder | None = None,
        saturation: Saturation | None = None,
    ) -> None: ...

    def update_norms(self, groups: Sequence[Group], laprop: bool, scaling: Scaling) -> Tensor: ...

    def grad_norm(self, grads: list[Tensor]) -> Tensor: ...


_MODULES: dict[str, Backend] = {module.NAME: module for module in (cuda, triton, cpu, reference)}

BACKENDS = tuple(_MODULES)
"""The backends' names, fastest first: the order in which "auto" tries them."""


def device_type(name: str) -> str:
    """The type of devices that the backend ``name`` is made for."""
    return "cuda" if name in (cuda.NAME, triton.NAME) else "cpu"


def why_not(name: str, device: torch.device) -> str | None:
    """Why the backend ``name`` cannot run on ``device`` and what to do about it; None if it can.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in _MODULES:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")
    return _MODULES[name].why_not(device)


_selected: dict[tuple[str, torch.device], Backend] = {}  # not functools.cache: torch.compile warns about that


def select(name: str, device: torch.device) -> Backend:
    """The backend ``name``, or for "auto" the fastest that can run on ``device``. Warns where that is the reference.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend cannot run on ``device``; the message says why and what to do.
    """
    backend = _selected.get((name, device))
    if backend is None:
        backend = _selected[name, device] = _select(name, device)
    return backend


def _select(name: str, device: torch.device) -> Backend:
    reasons: dict[str, str] = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        reason = why_not(candidate, device)
        if reason is not None:
            reasons[candidate] = reason
            continue
        if name == "auto" and candidate == reference.NAME:
            _warn(device, {other: text for other, text in reasons.items() if device_type(other) == device.type})
        return _MODULES[candidate]
    if name == "auto":
        raise RuntimeError(f"no backend can run on device {device}: {_listed(reasons)}")
    raise RuntimeError(f"backend={name!r} cannot run on device {device}: {reasons[name]}")


def _warn(device: torch.device, reasons: dict[str, str]) -> None:
    warnings.warn(
        f"maxva: steps on {device} are taken by backend='reference', a hundred times slower than kernels "
        f"({_listed(reasons) or 'there are none for it'}). Name that backend to have no warning.",
        stacklevel=3,
    )


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
