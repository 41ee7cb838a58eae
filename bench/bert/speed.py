"""How fast the optimizers are on this model's tensors, measured in the run that used them."""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import nn

from . import optimizers
from .distributed import Engine, local

BUDGET = 20.0  # seconds, in all
LABELS = {
    "madam": "MAdam",
    "lamadam": "LaMAdam",
    "reference": "MAdam, eager",
    "adamw": "torch AdamW(fused)",
    "lamb": "LAMB, eager",
}


def compare(model: nn.Module, engine: Engine, settings: Namespace) -> dict[str, float]:
    """Median seconds of a step with clipping, steps interleaved, on copies of the parameters with one gradient."""
    names = dict.fromkeys(["madam", settings.optimizer, "reference", "adamw"])
    steps = {name: _stepper(name, model, settings) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for turn in range(12):
        for name, step in steps.items():
            engine.synchronize()
            start = time.perf_counter()
            step()
            engine.synchronize()
            if turn >= 2:  # the first make the state and warm up
                seconds[name].append(time.perf_counter() - start)
        if turn >= 4 and time.perf_counter() - begin > BUDGET:
            break
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(seconds: dict[str, float], settings: Namespace) -> str:
    tensors = "rank 0's shards, without communication" if settings.parallel == "fsdp2" else "this model's tensors"
    lines = [f"speed       one step with clipping on {tensors}, medians ({LABELS[settings.optimizer]} trained it)"]
    for name, value in seconds.items():
        lines.append(f"            {LABELS[name]:<20} {1e3 * value:8.2f} ms  {value / seconds['madam']:6.2f} x MAdam's")
    return "\n".join(lines)


def _stepper(name: str, model: nn.Module, settings: Namespace) -> Callable[[], None]:
    copy = nn.Module()
    for key, parameter in model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else 1e-3 * torch.randn_like(parameter)
        twin = nn.Parameter(local(parameter).detach().clone())
        twin.grad = local(grad).detach().clone()
        copy.register_parameter(key.replace(".", "/"), twin)
    clip = settings.max_grad_norm or None
    inside = clip if optimizers.clips(name) else None
    decay, bounds = settings.weight_decay, tuple(settings.beta2_range)
    dtype = settings.state_dtype if optimizers.clips(name) else "float32"
    optimizer = optimizers.build(
        name,
        copy,
        lr=settings.lr[-1],
        weight_decay=decay,
        beta2_range=bounds,
        max_grad_norm=inside,
        state_dtype=dtype,
        params=settings.params,
    )

    def step() -> None:
        if clip and not inside:
            nn.utils.clip_grad_norm_(copy.parameters(), clip)
        optimizer.step()

    return step
