"""Where a test asks for a backend that needs a GPU and there is none, its kernels are simulated."""

import pytest


@pytest.fixture(autouse=True)
def _simulate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = request.node.get_closest_marker("simulated")
    if marker and marker.args == ("cuda",):
        from simulated_cuda import SimulatedLauncher, install

        install(SimulatedLauncher(), monkeypatch)
    elif marker:
        from simulated_triton import SimulatedTriton, install_triton

        install_triton(SimulatedTriton(), monkeypatch)
