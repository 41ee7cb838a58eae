"""Stage "training": the optimizer's share of a training step of BERT-Base, with AMP and gradient accumulation.

float16 autocast and GradScaler, four batches to a step, clipping at norm 1, dropout off. Each optimizer trains a model
of its own, all begin alike; they take turns. Times are the device's, by events: the whole step, and in it from the last
batch's backward to the next step's begin, that is unscaling, overflow test, clip, step, and setting the gradients to
None. Random tokens: nothing is to be learned, and nothing of the time depends on them. Without transformers the model
is a torch.nn.TransformerEncoder of the same size. Not controlled: clock frequencies, and whether the host keeps ahead
of the device (the host's time of a step is told beside the device's).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_check import machine, stage
from gpu_check.stage import Stage
from maxva_kernels import MAdam

ACCUMULATE = 4
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.1}


class Encoder(nn.Module):
    """In place of transformers' BERT: the loss of each sequence from token ids, masked places, and their labels."""

    def __init__(self, vocabulary: int, layers: int, hidden: int, heads: int, positions: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, hidden), nn.Embedding(positions, hidden)
        layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, ids: Tensor, at: Tensor, labels: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.encoder(self.tokens(ids) + self.positions(places))
        hidden = hidden.take_along_dim(at.unsqueeze(-1), dim=1)
        logits = nn.functional.linear(hidden, self.tokens.weight, self.bias).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return loss.view_as(at).sum(1)


def run(stage: Stage) -> None:
    stage.check_package()
    gpu = machine.need()
    vocabulary, layers, hidden, heads, length, batch = 30522, 12, 768, 12, 128, 128
    if stage.rehearsal:
        vocabulary, layers, hidden, heads, length, batch = 50, 1, 16, 2, 8, 2
    try:
        from bert.model import MaskedLanguageModel

        make: Callable[[], nn.Module] = lambda: MaskedLanguageModel(vocabulary, layers, hidden, heads, length, 0.0)  # noqa: E731
        make()
        stage.record["model"] = "transformers.BertForMaskedLM"
    except ImportError as error:
        stage.record.lacks(f"transformers ({error}): torch.nn.TransformerEncoder of the same size in BERT's place")
        make = lambda: Encoder(vocabulary, layers, hidden, heads, length)  # noqa: E731
        stage.record["model"] = "torch.nn.TransformerEncoder"
    masked = max(1, length * 15 // 100)
    data = batches(gpu.device, vocabulary, batch, length, masked)
    runs = {name: Run(gpu, make, name, data) for name in ("AdamW (torch, fused)", "MAdam", "MAdam (reference, eager)")}
    parameters = sum(p.numel() for p in runs["MAdam"].model.parameters())
    stage.record["size"] = {
        "parameters": parameters, "layers": layers, "hidden": hidden, "tokens_per_step": ACCUMULATE * batch * length
    }  # fmt: skip
    rounds = 1 if stage.rehearsal else 12
    for turn in range(-3, rounds):
        for name, its in runs.items():
            if "eager" not in name or -2 < turn < 3:
                its.step(timed=turn >= 0)
        if turn >= 0:
            stage.record["results"] = [its.figures() for its in runs.values()]
    for name, its in runs.items():
        if not all(loss == loss and abs(loss) != float("inf") for loss in its.losses):
            stage.record.problem(f"{name}: the loss is no number: {its.losses}")


def batches(device: torch.device, vocabulary: int, batch: int, length: int, masked: int) -> list[tuple[Tensor, ...]]:
    """ACCUMULATE batches of random tokens: ids, masked places, labels."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(ACCUMULATE):
        ids, labels = (torch.randint(vocabulary, (batch, n), generator=generator) for n in (length, masked))
        at = torch.stack([torch.randperm(length, generator=generator)[:masked] for _ in range(batch)])
        made.append(tuple(tensor.to(device) for tensor in (ids, at, labels)))
    return made


class Run:
    """One optimizer's training."""

    def __init__(self, gpu: Any, make: Callable[[], nn.Module], name: str, data: list[tuple[Tensor, ...]]):
        torch.manual_seed(0)
        self.gpu, self.name, self.data = gpu, name, data
        self.model = make().to(gpu.device)
        self.clips_inside = name.startswith("MAdam")
        params = self.model.parameters()
        if self.clips_inside:
            backend = "reference" if "eager" in name else "cuda"
            self.optimizer: torch.optim.Optimizer = MAdam(params, **OPTIONS, max_grad_norm=1.0, backend=backend)
        else:
            self.optimizer = torch.optim.AdamW(params, **OPTIONS, fused=True)
        self.scaler = torch.amp.GradScaler(gpu.device.type, init_scale=2.0**12)
        self.times: list[tuple[float, float, float]] = []  # of the step, of the optimizer in it, of the host
        self.losses: list[float] = []

    def accumulate(self) -> None:
        dtype = torch.float16 if self.gpu.real else torch.bfloat16
        for ids, at, labels in self.data:
            with torch.autocast(self.gpu.device.type, dtype):
                self.loss = self.model(ids, at, labels).mean() / (ACCUMULATE * at.shape[1])
            self.scaler.scale(self.loss).backward()

    def update(self) -> None:
        if not self.clips_inside:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, *, timed: bool) -> None:
        self.gpu.synchronize()
        start = time.perf_counter()
        gradients, update = self.gpu.milliseconds_of(self.accumulate, self.update)
        if timed:
            self.times.append((gradients + update, update, 1e3 * (time.perf_counter() - start)))
            self.losses.append(ACCUMULATE * self.loss.item())

    def figures(self) -> dict[str, Any]:
        if not self.times:
            return {"name": self.name, "steps": 0}
        whole, update, host = (statistics.median(column) for column in zip(*self.times, strict=True))
        return {
            "name": self.name,
            "ms": whole,
            "optimizer_ms": update,
            "share": update / whole,
            "host_ms": host,
            "scale": self.scaler.get_scale(),
            "losses": self.losses,
            "turns": self.times,
            "steps": len(self.times),
        }


if __name__ == "__main__":
    stage.main(run)
