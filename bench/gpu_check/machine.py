"""The GPU as the programme and tests/test_cuda_gpu.py use it. stand_ins.py has the same face for a rehearsal."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity

from gpu_check import trace
from gpu_check.stage import Lacking

if TYPE_CHECKING:
    from gpu_check.stand_ins import StandIn
    from gpu_check.trace import Trace  # in the class `trace` is a method

REHEARSE = "MAXVA_REHEARSE"


def find() -> Gpu | StandIn | None:
    """The GPU, or in a rehearsal what takes its place; None where there is neither."""
    if os.environ.get(REHEARSE):
        from gpu_check.stand_ins import StandIn

        return StandIn()
    return Gpu() if torch.cuda.is_available() else None


def need() -> Gpu | StandIn:
    """The same, started. Raises where the CUDA kernels cannot run on it."""
    machine = find()
    if machine is None:
        raise RuntimeError("torch finds no CUDA GPU here")
    machine.start()
    return machine


class Gpu:
    real = True
    backend = "cuda"  # for tests, which go through several

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self._cycles: float | None = None  # of the delay kernel, per millisecond
        self._activities: list[ProfilerActivity] | None = None  # with which the profiler is known to see kernels

    def start(self) -> None:
        from maxva_kernels.backends import registry

        reason = registry.why_not("cuda", self.device)
        if reason is not None:
            raise RuntimeError(f"the CUDA kernels cannot run: {reason}")
        torch.zeros(1, device=self.device)

    # --- time ---------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def delay(self, milliseconds: float) -> None:
        """Has the device busy for about so long from here on, on the current stream."""
        if self._cycles is None:
            torch.cuda._sleep(200_000_000)  # an idle GPU's clock is slow, and rises with work
            self._cycles = 50_000_000 / self.milliseconds(lambda: torch.cuda._sleep(50_000_000))
        torch.cuda._sleep(int(milliseconds * self._cycles))

    def milliseconds(self, function: Callable[[], object], behind: float = 0.0) -> float:
        """The device's time for what `function` queues, by events on the stream.

        What the host needs for the queueing is no part of it if `behind` is longer: so many milliseconds the device is
        given other work, and then finds everything there.
        """
        if behind:
            torch.cuda.synchronize()
            self.delay(behind)
        return self.milliseconds_of(function)[0]

    def milliseconds_of(self, *functions: Callable[[], object]) -> list[float]:
        """The device's time for what each of them queues, one after the other."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
        events[0].record()
        for function, event in zip(functions, events[1:], strict=True):
            function()
            event.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]

    # --- launches -----------------------------------------------------------------------------------------------

    def trace(self, function: Callable[[], object]) -> Trace:
        """What `function` launches.

        Raises:
            Lacking: the profiler sees nothing here.
        """
        if self._activities is None:
            for activities in ([ProfilerActivity.CUDA], [ProfilerActivity.CPU, ProfilerActivity.CUDA]):
                if self._record(lambda: torch.ones(8, device=self.device).add_(1), activities).launches:
                    self._activities = activities
                    break
            else:
                raise Lacking("the profiler sees no kernels on this machine (is CUPTI allowed here?)")
        return self._record(function, self._activities)

    def _record(self, function: Callable[[], object], activities: list[ProfilerActivity]) -> Trace:
        def run() -> None:
            function()
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        return trace.record(run, activities, trace.ON_DEVICE)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Torch raises in here where the host would wait for the device."""
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    # --- streams and graphs -------------------------------------------------------------------------------------

    @contextmanager
    def side_stream(self) -> Iterator[torch.cuda.Stream]:
        """A new stream is the current one in here; it begins where the one before stood."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream

    def join(self, stream: torch.cuda.Stream) -> None:
        """The current stream goes on when that one is done."""
        torch.cuda.current_stream().wait_stream(stream)

    def warm_up(self, function: Callable[[], object], times: int = 3) -> None:
        """Runs it on a side stream, as PyTorch's notes on CUDA graphs ask for before a capture."""
        with self.side_stream() as stream:
            for _ in range(times):
                function()
        self.join(stream)

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        """`function` as a CUDA graph; gives what replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()

        def replay(captured: Callable[[], object] = function) -> None:
            # `captured` lives as long as this does: the graph reads and writes its tensors.
            graph.replay()

        return replay

    # --- memory -------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Of the device, when all that is dead is given back."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def cache_bytes(self) -> int:
        """Of the L2."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size
