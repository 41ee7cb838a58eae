"""Checkpoints of distributed runs: saved by two ranks, continued by one, two or three, as if nothing had happened."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import ALGORITHMS, bits
from engines import alone, make_model, make_optimizer, my_rows, replicate, run, shard, train_step, whole
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer

import maxva_kernels
from maxva_kernels.checkpoint import place_steps
from maxva_kernels.gathering import gather

NAMES = [algorithm.__name__ for algorithm in ALGORITHMS]
OPTIONS: dict[str, Any] = {"amsgrad": True, "max_grad_norm": 0.1, "weight_decay": 0.1}
STOP, END = 3, 6

by_name = pytest.mark.parametrize("name", NAMES)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def start(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    distributed = dist.is_initialized()
    model = (shard if distributed else alone)(make_model(dtype))
    return model, make_optimizer(name, model, **OPTIONS)


def rows() -> slice:
    return my_rows() if dist.is_initialized() else slice(None)


def whole_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    """Every parameter and each entry of its state, whole."""
    found = []
    for key, param in model.named_parameters():
        found.append((key, whole(param)))
        found += [(f"{key}, {name}", value) for name, value in engines.state_of(optimizer, param).items()]
    return found


def save(name: str, dtype: torch.dtype, folder: Path) -> list[tuple[str, torch.Tensor]]:
    """Trains for some steps and saves in both ways; what was saved."""
    model, optimizer = start(name, dtype)
    for step in range(STOP):
        train_step(model, optimizer, step, rows())
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=str(folder / "sharded"))
    state = {
        "model": get_model_state_dict(model, options=FULL),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FULL),
    }
    if dist.get_rank() == 0:
        torch.save(state, folder / "full.pt")
    dist.barrier()
    return whole_state(model, optimizer)


def resume(name: str, dtype: torch.dtype, folder: Path, full: bool) -> tuple[list[Any], list[Any]]:
    """Loads into a new model; what is then there, and what is at the end of the run."""
    model, optimizer = start(name, dtype)
    if full:
        options = StateDictOptions(full_state_dict=True)
        state = torch.load(folder / "full.pt", weights_only=True)
    else:
        options = StateDictOptions()
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=str(folder / "sharded"))
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    loaded = whole_state(model, optimizer)
    for step in range(STOP, END):
        train_step(model, optimizer, step, rows())
    return loaded, whole_state(model, optimizer)


@by_name
@dtypes
@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full state dict"])
def test_checkpoint_continues_on_another_number_of_ranks(full, dtype, name, pools, tmp_path):
    """Guards against state cut elsewhere than its parameter, cast to its dtype, or left out: bits, and then the run.

    After the load all is bit for bit what was saved; the rest of the run adds up gradients in another order.
    """
    saved = pools(2)(save, name, dtype, tmp_path)[0]
    runs = [*pools(3)(resume, name, dtype, tmp_path, full), resume(name, dtype, tmp_path, full)]
    uninterrupted = run(name, alone, steps=END, dtype=dtype, **OPTIONS)
    for loaded, ended in runs:
        assert [key for key, _ in loaded] == [key for key, _ in saved]
        for (key, value), (_, expected) in zip(loaded, saved, strict=True):
            assert value.dtype == expected.dtype, key
            assert torch.equal(bits(value), bits(expected)), key
        if dtype == torch.float64:
            params = [value for key, value in ended if "," not in key]
            torch.testing.assert_close(params, uninterrupted[0], rtol=1e-10, atol=1e-12)
        assert {int(value) for key, value in ended if key.endswith("step")} == {END}


def step_after_loading(name: str) -> list[str]:
    """What changes of an optimizer as another steps that has loaded its state dict."""
    model, optimizer = start(name, torch.float64)
    train_step(model, optimizer, 0, rows())
    other, loaded = start(name, torch.float64)
    loaded.load_state_dict(optimizer.state_dict())
    before = whole_state(model, optimizer)
    train_step(other, loaded, 1, rows())
    after = dict(whole_state(model, optimizer))
    return [key for key, value in before if not torch.equal(after[key], value)]


@by_name
def test_loading_copies_shards(name, pools):
    """Guards against an optimizer that steps in the DTensors of the checkpoint that it has loaded."""
    assert pools(2)(step_after_loading, name) == [[], []]


def test_steps_on_the_cpu_are_brought_back():
    """Guards a run on a GPU that ZeroRedundancyOptimizer has resumed: it puts what has no dimensions on the CPU."""
    with FakeTensorMode():  # tensors without memory, so that a GPU is not needed
        params = [torch.empty(3, device="cuda") for _ in range(2)]
        state = {param: {"step": torch.zeros((), dtype=torch.int64), "exp_avg": param} for param in params}
        place_steps(state)
        assert [entries["step"].device.type for entries in state.values()] == ["cuda", "cuda"]
        optimizer = maxva_kernels.MAdam([torch.nn.Parameter(torch.empty(3))])
        (param,) = optimizer.param_groups[0]["params"] = [torch.nn.Parameter(params[0])]
        param.grad = torch.empty_like(param)
        gather(optimizer.param_groups, optimizer.state, [])
        optimizer.state[param]["step"] = torch.zeros((), dtype=torch.int64)
        (group,) = gather(optimizer.param_groups, optimizer.state, [])
        assert group.tensors.steps[0].device.type == "cuda", "a step asks for it"


# --- ZeRO -----------------------------------------------------------------------------------------------------------


def zero_in_two_groups(name: str, model: torch.nn.Module, **options: Any) -> ZeroRedundancyOptimizer:
    first, *others = model.parameters()
    optimizer = ZeroRedundancyOptimizer([first], getattr(maxva_kernels, name), lr=0.01, **options)
    optimizer.add_param_group({"params": others})
    return optimizer


ZERO = {
    "one group": (functools.partial(make_optimizer, zero=True), torch.float64, OPTIONS),
    "a group added": (zero_in_two_groups, torch.float32, {"state_dtype": torch.bfloat16}),
}


def zero_run(name: str, kind: str, stop: int | None) -> tuple[list[torch.Tensor], Any]:
    """With or without a stop; the parameters in the end, and rank 0's checkpoint of it."""
    make, dtype, options = ZERO[kind]
    model = replicate(make_model(dtype))
    optimizer = make(name, model, **options)
    for step in range(END):
        if step == stop:
            optimizer.consolidate_state_dict(to=0)
            box = [optimizer.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box, src=0)
            optimizer = make(name, model, **options)
            optimizer.load_state_dict(box[0])
        train_step(model, optimizer, step, my_rows())
    optimizer.consolidate_state_dict(to=0)
    return [whole(param) for param in model.parameters()], optimizer.state_dict() if dist.get_rank() == 0 else None


@by_name
@pytest.mark.parametrize("kind", ZERO)
def test_zero_checkpoint(kind, name, pools):
    """Guards the way of ZeroRedundancyOptimizer's checkpoints, which are whole: an optimizer alone takes them too. And
    its own groups, which it copies into ours before a step, as they were given: with a dtype, and not its name."""
    for (params, checkpoint), (resumed, _) in zip(
        pools(2)(zero_run, name, kind, None), pools(2)(zero_run, name, kind, STOP), strict=True
    ):
        for found, expected in zip(resumed, params, strict=True):
            assert torch.equal(bits(found), bits(expected))
        if checkpoint is not None and kind == "one group":
            model = make_model()
            optimizer = make_optimizer(name, model, **OPTIONS)
            optimizer.load_state_dict(checkpoint)
            expected_states = run(name, alone, steps=END, **OPTIONS)[1]
            for param, expected in zip(model.parameters(), expected_states, strict=True):
                torch.testing.assert_close(engines.state_of(optimizer, param), expected, rtol=1e-9, atol=1e-12)
