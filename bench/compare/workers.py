"""Training runs of small models side by side, each in one thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import torch

Run = tuple[Any, float, int]  # what is tuned (an optimizer, perhaps among its circumstances), learning rate, seed
Train = Callable[[Any, float, int], dict[str, Any]]  # what came out: "validation" and more
Make = Callable[[list[Run]], Iterator[tuple[Run, dict[str, Any]]]]  # gives runs as they end


@contextmanager
def in_processes(train: Train, jobs: int) -> Iterator[Make]:
    """Makes runs in so many processes at a time, of one thread each; with one job, in this process.

    Args:
        train: Must be picklable with more jobs than one; with its data it is sent to each process once.
    """
    if jobs == 1:
        yield lambda wanted: ((run, train(*run)) for run in wanted)
        return
    # A fork would inherit torch's threads, of which it has none.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (train,))

    def make(wanted: list[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        futures = {pool.submit(_train, *run): run for run in wanted}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield make
    finally:
        pool.shutdown(cancel_futures=True)


_trains: Train | None = None  # in a worker


def _begin(train: Train) -> None:
    global _trains
    torch.set_num_threads(1)
    _trains = train


def _train(tuned: Any, lr: float, seed: int) -> dict[str, Any]:
    assert _trains is not None
    return _trains(tuned, lr, seed)
