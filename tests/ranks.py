"""Functions run on several processes at once, which gloo connects: what a test needs of a cluster."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 180  # a call that takes longer hangs


class Ranks:
    """Processes that stay, since starting them takes longer than most of what they do.

    Calling it runs ``function(*arguments)``, of a module's top level, on every rank, and gives what each returned.
    """

    def __init__(self, count: int, folder: Path):
        context = multiprocessing.get_context("spawn")
        self._connections, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, folder / "rendezvous", theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of a process is the end of its pipe
            self._connections.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for connection in self._connections:
            connection.send((function, arguments))
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} has not answered in {SECONDS} s; the others may wait for it")
            result, error = pickle.loads(connection.recv_bytes())
            if error is not None:
                self.close()  # where one has failed, the others may stand in a collective
                raise RuntimeError(f"on rank {rank}:\n{error}")
            results.append(result)
        return results

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, count: int, rendezvous: Path, connection: Connection) -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # bench/, where tests put it first, has an engines.py too
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # the test has ended
            sys.exit()
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException:
            error = traceback.format_exc()
        connection.send_bytes(pickle.dumps((result, error)))  # by value: torch would share the memory of tensors
