"""One training run: a BERT, an optimizer, a learning rate, a batch size, a seed; and the text they all read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bert import corpus, data, tokenizer
from bert.model import MaskedLanguageModel
from torch import Tensor, nn
from torch.optim import Optimizer

from maxva_kernels.recipe import Phase, PhasedLR, param_groups_weight_decay

from .contenders import Contender

POWER = 0.5  # the paper's decay is a square root
CLIP = 1.0


@dataclass(frozen=True)
class Setting:
    """What decides the result of a run, beside the optimizer, its learning rate, the seed and the text."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    length: int
    batch: int
    steps: int
    micro_batch: int
    held_out: int
    warmup: float = 0.1  # share of the steps
    device: str = "cpu"

    @property
    def cost(self) -> int:
        """In proportion to the time of a run, roughly."""
        return self.layers * self.length * self.batch * self.steps


class Source:
    """The documentation of the installed packages, so many characters of it, or files."""

    def __init__(self, paths: list[str] | None, characters: float, folder: Path):
        self.documents = corpus.FileCorpus(paths) if paths else corpus.InstalledCorpus(characters)
        self.folder = folder
        self.hash, *size = tokenizer.describe(self.documents)
        self.facts = dict(zip(("documents", "characters"), size, strict=True))

    @cache  # noqa: B019  there is one
    def tokens(self, vocab: int) -> tokenizer.Tokens:
        return tokenizer.prepare(self.documents, self.hash, vocab, self.folder, None)


class Text:
    """Token ids as a setting has them: one stream to train on, one held out."""

    def __init__(self, setting: Setting, source: Source):
        self.tokens = source.tokens(setting.vocab)
        self.vocab = self.tokens.vocab_size
        self.length = setting.length
        # The same sequences with the same masks whatever the seed of the run.
        self.held_out = data.MaskedSequences(self.tokens.held_out, self.length, self.vocab, 0)
        self.rows = np.linspace(0, self.held_out.count - 1, min(self.held_out.count, setting.held_out)).astype(np.int64)
        self.unigram = data.unigram_loss(self.tokens.train, self.held_out, self.rows)
        self.facts = {
            **source.facts,
            "training_tokens": len(self.tokens.train),
            "epochs": setting.batch * setting.steps / self.sequences(0).count,
            "held_out_sequences": len(self.rows),
        }

    @cache  # noqa: B019  one text a process, one entry a seed
    def sequences(self, seed: int) -> data.MaskedSequences:
        return data.MaskedSequences(self.tokens.train, self.length, self.vocab, seed)


def average_step(before: Iterable[Tensor], groups: list[dict[str, Any]], separate: bool) -> float:
    """Mean |change of a parameter by a step| without weight decay, over all coordinates.

    Args:
        before: copies of the parameters as they were, in the order of the groups.
        groups: the optimizer's, after the step and with the learning rate that it took.
        separate: lr * decay * parameter is what decay took off; False leaves it in.
    """
    copies = iter(before)
    total, count = 0.0, 0
    for group in groups:
        decay = group["lr"] * group["weight_decay"] if separate else 0.0
        for param in group["params"]:
            change = param.detach() - next(copies).mul_(1 - decay)
            total += change.abs().sum(dtype=torch.float64).item()
            count += change.numel()
    return total / count


def has_diverged(losses: list[float], warmup: int, window: int) -> bool:
    """The last loss is no number; or, warm-up over, the mean of the last is above the first of all."""
    if not math.isfinite(losses[-1]):
        return True
    return len(losses) >= warmup + window and sum(losses[-window:]) / window > losses[0]


def window(steps: int) -> int:
    """Over how many steps training losses are averaged."""
    return max(1, steps // 20)


def train(setting: Setting, text: Text, contender: Contender, lr: float, seed: int) -> dict[str, Any]:
    """The losses of each step, the average step sizes, and the loss on held-out text in the end, None if diverged."""
    begin = time.perf_counter()
    steps, device = setting.steps, setting.device
    torch.manual_seed(seed)
    model = MaskedLanguageModel(text.vocab, setting.layers, setting.hidden, setting.heads, setting.length, 0.0)
    model.to(device)
    optimizer = contender.make(param_groups_weight_decay(model, contender.decay))
    phase = Phase(steps, warmup=setting.warmup, power=POWER, scale=lr)
    schedule = PhasedLR(optimizer, [phase])
    losses: list[float] = []
    sizes: list[tuple[int, float]] = []
    for step in range(1, steps + 1):
        losses.append(_backward(setting, text.sequences(seed), model, step - 1))
        if has_diverged(losses, phase.warmup_steps, window(steps)):
            break
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if step % window(steps) and step != 1:
            optimizer.step()
        else:
            sizes.append((step, _measured_step(optimizer, contender.separate)))
        optimizer.zero_grad()
        schedule.step()
    else:
        validation = held_out_loss(setting, text, model)
        if math.isfinite(validation):
            return _result(losses, sizes, begin, validation)
    return _result(losses, sizes, begin, None)


def _result(losses: list[float], sizes: list[tuple[int, float]], begin: float, loss: float | None) -> dict[str, Any]:
    finite = [round(value, 5) for value in losses if math.isfinite(value)]  # JSON has no NaN
    return {
        "validation": loss,
        "diverged_at": None if loss is not None else len(losses),
        "losses": finite,
        "step_sizes": [[step, size] for step, size in sizes if math.isfinite(size)],
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _backward(setting: Setting, sequences: data.MaskedSequences, model: nn.Module, step: int) -> float:
    """The gradient of the mean loss over the batch, in micro-batches; returns that loss."""
    total = torch.zeros((), device=setting.device)
    batch, part = setting.batch, setting.micro_batch
    for samples in np.split(np.arange(step * batch, (step + 1) * batch), range(part, batch, part)):
        loss = _loss(setting, model, sequences.training(samples)) / (batch * sequences.masked)
        loss.backward()
        total += loss.detach()
    return total.item()


def _measured_step(optimizer: Optimizer, separate: bool) -> float:
    before = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    optimizer.step()
    return average_step(before, optimizer.param_groups, separate)


@torch.no_grad()
def held_out_loss(setting: Setting, text: Text, model: nn.Module) -> float:
    parts = [text.rows[at : at + setting.micro_batch] for at in range(0, len(text.rows), setting.micro_batch)]
    total = sum(_loss(setting, model, text.held_out.held_out(part)).item() for part in parts)
    return total / (len(text.rows) * text.held_out.masked)


def _loss(setting: Setting, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Summed over masked tokens."""
    cuda = setting.device == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
        return model(*(tensor.to(setting.device) for tensor in batch)).sum()
