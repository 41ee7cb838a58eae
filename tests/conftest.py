"""Where a test asks for a backend that needs a GPU and there is none, its kernels are simulated (simulated_cuda.py)."""

import pytest


@pytest.fixture(autouse=True)
def _simulate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("simulated"):
        from simulated_cuda import SimulatedLauncher, install

        install(SimulatedLauncher(), monkeypatch)
