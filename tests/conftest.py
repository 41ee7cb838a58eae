"""Where a test asks for a backend that needs a GPU and there is none, its kernels are simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cases import cannot_simulate
from ranks import Ranks


def _install(backend: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Has that backend drive CPU tensors by simulation; gives its launcher."""
    if reason := cannot_simulate(backend):
        pytest.skip(reason)
    if backend == "cuda":
        from simulated_cuda import SimulatedLauncher, install

        launcher: Any = SimulatedLauncher(**options)
        install(launcher, monkeypatch)
    else:
        from simulated_triton import SimulatedTriton, install_triton

        launcher = SimulatedTriton(**options)
        install_triton(launcher, monkeypatch)
    return launcher


@pytest.fixture(autouse=True)
def _simulated_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = request.node.get_closest_marker("simulated")
    if marker and marker.args:
        _install(*marker.args, monkeypatch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what simulates GPU kernels by itself too, so that `-m "not simulated"` leaves all of that out."""
    for item in items:
        if {"simulate", "simulate_cuda"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("simulated")


@pytest.fixture(params=["cuda", "triton"])
def simulate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Simulates each GPU backend: a function from a launcher's options to that launcher, at work."""
    return lambda **options: _install(request.param, monkeypatch, **options)


@pytest.fixture
def simulated(simulate: Callable[..., Any]) -> Any:
    """The launcher of each simulated GPU backend."""
    return simulate()


@pytest.fixture
def simulate_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """As `simulate`, for what the CUDA kernels alone have."""
    return lambda **options: _install("cuda", monkeypatch, **options)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Processes by their number; started when first asked for, and again where a test has broken them."""
    running: dict[int, Ranks] = {}

    def of(count: int) -> Ranks:
        if count not in running or not running[count].alive:
            running[count] = Ranks(count, tmp_path_factory.mktemp(f"ranks{count}"))
        return running[count]

    yield of
    for ranks in running.values():
        ranks.close()
