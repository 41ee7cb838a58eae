"""What takes the GPU's place in a rehearsal, on CPU tensors.

The backend "cuda" runs as it is down to the compiled module, for which a `Recorder` stands: it notes each launch and
has the simulator of the tests run it, or nothing. Imitated because nothing else is possible: streams (each has a
number, a capture's is its own, as torch's captures have it), CUDA graphs (a replay calls the captured function again),
events (the host's clock), the profiler's kernels (the noted launches), the error on waiting (torch's operations that
read a number or a comparison back).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_check import trace

TESTS = Path(__file__).resolve().parents[2] / "tests"


class Recorder:
    """Has the functions of maxva_kernels._C_cuda."""

    GRAPHS = True

    def __init__(self, simulated: Any = None):
        self._simulated = simulated
        # csrc/cuda/launch.h; where nothing runs, other numbers would do as well
        limits = {"MAX_TENSORS": 2900, "MAX_GROUPS": 64, "STEP_CHUNK": 8192, "NORM_CHUNK": 16384}
        for name, value in limits.items():
            setattr(self, name, getattr(simulated, name, value))
        self.launches: list[str] = []
        self.muted = False

    def probe(self, device: int) -> None:
        pass

    def step(self, *arguments: Any) -> None:
        self._launch("step", "step_kernel", arguments)

    def update_norms(self, *arguments: Any) -> None:
        self._launch("update_norms", "update_chunks_kernel", arguments)
        self.launches.append("update_total_kernel")

    def norm_chunks(self, *arguments: Any) -> None:
        self._launch("norm_chunks", "norm_chunks_kernel", arguments)

    def norm_total(self, *arguments: Any) -> None:
        self._launch("norm_total", "norm_total_kernel", arguments)

    def _launch(self, function: str, kernel: str, arguments: tuple[Any, ...]) -> None:
        self.launches.append(kernel)
        if self._simulated is not None and not self.muted:
            getattr(self._simulated, function)(*arguments)


class _NoWaiting(TorchDispatchMode):
    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.nonzero.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAITING:
            raise RuntimeError(f"a GPU would be waited for here, in {func}")
        return func(*args, **(kwargs or {}))


class _Stream:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Event(NamedTuple):
    captured: bool


class StandIn:
    real = False
    backend = "cuda"
    name = "REHEARSAL"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._capturing = False
        self._stream = 0  # the current one
        self._streams = itertools.count(1)

    def start(self, *, simulate: bool = False, patches: Any = None) -> None:
        """Has the backend "cuda" drive CPU tensors, while these patches last (a pytest.MonkeyPatch) or for good."""
        if str(TESTS) not in sys.path:
            sys.path.insert(0, str(TESTS))
        import pytest
        import simulated_cuda

        from maxva_kernels import gpu, optim

        patches = patches or pytest.MonkeyPatch()
        self.recorder = Recorder(simulated_cuda.SimulatedLauncher() if simulate else None)
        simulated_cuda.install(self.recorder, patches)
        patches.setattr(gpu, "current_stream", lambda device: self._stream)
        patches.setattr(gpu, "record_event", lambda device: _Event(self._capturing))
        patches.setattr(gpu, "wait_event", self._wait)
        patches.setattr(gpu, "record_use", lambda memory: None)
        patches.setattr(gpu, "is_capturing", lambda: self._capturing)
        patches.setattr(optim, "_is_capturing", lambda groups: self._capturing)

    def synchronize(self) -> None:
        pass

    def delay(self, milliseconds: float) -> None:
        pass

    def milliseconds(self, function: Callable[[], object], behind: float = 0.0) -> float:
        return self.milliseconds_of(function)[0]

    def milliseconds_of(self, *functions: Callable[[], object]) -> list[float]:
        times = [time.perf_counter()]
        for function in functions:
            function()
            times.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(times)]

    def trace(self, function: Callable[[], object]) -> trace.Trace:
        """The launches that were noted, or else torch's operators; the profiler runs either way."""
        self.recorder.launches = []
        seen = trace.record(function, [ProfilerActivity.CPU], ("cpu_op",))
        noted = [trace.Launch("kernel", name, 0.0) for name in self.recorder.launches]
        return trace.Trace(noted) if noted else seen

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        with _NoWaiting():  # type: ignore[no-untyped-call]  # torch annotates not its __init__
            yield

    def _wait(self, event: _Event, device: torch.device) -> None:
        if self._capturing and not event.captured:
            raise RuntimeError("a capture waits for an event from before it, which CUDA refuses")

    @contextmanager
    def _on(self, stream: int) -> Iterator[None]:
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    @contextmanager
    def side_stream(self) -> Iterator[_Stream]:
        with self._on(next(self._streams)):
            yield _Stream()

    def join(self, stream: _Stream) -> None:
        pass

    def warm_up(self, function: Callable[[], object], times: int = 3) -> None:
        with self.side_stream():
            for _ in range(times):
                function()

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        """Runs it once without launches: a capture executes nothing."""
        self._capturing = self.recorder.muted = True
        try:
            with self._on(next(self._streams)):
                function()
        finally:
            self._capturing = self.recorder.muted = False

        def replay() -> None:
            function()

        return replay

    def free_bytes(self) -> int:
        return 2**40

    def allocated_bytes(self) -> int:
        return 0

    def cache_bytes(self) -> int:
        return 1
