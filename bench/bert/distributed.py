"""One process, DDP or FSDP2 behind one face, so that the training loop knows of none of them.

The loss of a large batch is a sum over samples divided by a number known beforehand. DDP and FSDP2 average gradients
over ranks; the loop multiplies by the number of ranks to make a sum of it, so the result does not depend on their
number beyond the order of additions. Mixed precision is autocast, and gradients are accumulated and reduced in the
parameters' dtype: float32, unless the run has bfloat16 parameters, which then wants large micro-batches.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from .model import MaskedLanguageModel

T = TypeVar("T")


class Engine:
    """Where this process stands among the ranks, and how a model is spread over them."""

    def __init__(self, parallel: str, device: str):
        self.parallel = parallel
        self.rank = int(os.environ.get("RANK", 0)) if parallel != "none" else 0
        self.ranks = int(os.environ.get("WORLD_SIZE", 1)) if parallel != "none" else 1
        self.device = torch.device(device)
        if self.device.type == "cuda":
            index = int(os.environ.get("LOCAL_RANK", 0)) if parallel != "none" else (self.device.index or 0)
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
        if parallel != "none":
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 prepares the text alone

    def close(self) -> None:
        if self.parallel != "none" and dist.is_initialized():
            dist.destroy_process_group()

    def wrap(self, model: "MaskedLanguageModel") -> nn.Module:
        """The model on this rank's device, replicated or sharded; every rank has built it from the same seed."""
        model = model.to(self.device)
        if self.parallel == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, ids, gradient_as_bucket_view=True)
        if self.parallel == "fsdp2":
            mesh = init_device_mesh(self.device.type, (self.ranks,))
            for layer in model.lm.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    @contextlib.contextmanager
    def accumulating(self, model: Any, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward: gradients go between ranks with the last one only."""
        if self.parallel == "fsdp2":
            model.set_requires_gradient_sync(last)
        with model.no_sync() if self.parallel == "ddp" and not last else contextlib.nullcontext():
            yield

    def sum(self, *values: float) -> list[float]:
        """Sums over the ranks, in double precision."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.parallel != "none":
            dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. The ranks' processes wait for each other, but not for their devices."""
        flags = torch.tensor(int(flag))
        if self.parallel != "none":
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank; so for its error."""
        if self.parallel == "none":
            return work()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = work()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def barrier(self) -> None:
        if self.parallel != "none":
            dist.barrier()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(gradients: list[torch.Tensor]) -> float:
    return _value(nn.utils.get_total_norm(gradients))


def clip(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Clips the gradients by their global norm and returns what it was."""
    return _value(nn.utils.clip_grad_norm_(parameters, max_norm))


def _value(norm: torch.Tensor) -> float:
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
