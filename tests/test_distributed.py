"""Several processes: every engine gives what one process does, every rank clips by the norm of the whole gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import engines
import pytest
import torch
import torch.distributed as dist
from cases import ALGORITHMS, bits
from engines import alone, make_model, replicate, run, shard, shard_and_replicate, split_layers, spread, whole
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import maxva_kernels
from maxva_kernels import MAdam, functional
from maxva_kernels.gathering import gather

NAMES = [algorithm.__name__ for algorithm in ALGORITHMS]
by_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(params=[2, 3], ids=lambda count: f"{count} ranks")
def ranks(request, pools):
    return pools(request.param)


# --- engines --------------------------------------------------------------------------------------------------------

ENGINES = {
    "DDP": {"wrap": replicate},
    "FSDP2": {"wrap": shard},
    "HSDP": {"wrap": shard_and_replicate},
    "tensor parallel": {"wrap": split_layers},
    "ZeRO": {"wrap": replicate, "zero": True},
}
OPTIONS = {
    "plain": {},
    "clip": {"max_grad_norm": 0.1},
    "AMSGrad, clip, decay": {"amsgrad": True, "max_grad_norm": 0.1, "weight_decay": 0.1},
    "trust ratio": {"trust_ratio": True, "weight_decay": 0.1},
}


@functools.cache
def on_one_process(name: str, option: str):
    return run(name, alone, **OPTIONS[option])


@by_name
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_does_what_one_process_does(engine, option, name, ranks):
    """Guards against a norm over the local shard, averaged or doubled gradients, and empty shards left behind.

    In float64 all that differs is the order in which the loss's gradient is added up, an error of some 1e-16 a step;
    a norm over one rank's part would be wrong in the first digit, as the clip is always at work.
    """
    expected, expected_states = on_one_process(name, option)
    for params, states in ranks(functools.partial(run, name, **ENGINES[engine], **OPTIONS[option])):
        torch.testing.assert_close(params, expected, rtol=1e-11, atol=1e-13)
        if states:
            torch.testing.assert_close(states, expected_states, rtol=1e-10, atol=1e-13)


def zero_on_some_ranks(name: str) -> list[torch.Tensor]:
    """The parameters after steps of ZeroRedundancyOptimizer on ranks 0 and 1, and of another on rank 2, whose gradients
    are larger."""
    both, own = dist.new_group([0, 1]), dist.new_group([2])
    alone_here = dist.get_rank() == 2
    params = [torch.nn.Parameter(tensor) for tensor in random(0, torch.float64)]
    options = {"process_group": own if alone_here else both, "lr": 0.1, "max_grad_norm": 0.5}
    optimizer = ZeroRedundancyOptimizer(params, getattr(maxva_kernels, name), **options)
    for step in range(4):
        for param, grad in zip(params, random(1 + step, torch.float64), strict=True):
            param.grad = 16 * grad if alone_here else grad
        optimizer.step()
    return [param.detach() for param in params]


@by_name
def test_zero_on_some_ranks(name, pools):
    """Guards against a norm over all ranks where the parameters are divided among some: a wrong clip, or a hang."""
    expected, _ = step_alone(name, torch.float64, {"max_grad_norm": 0.5})
    for params in pools(3)(zero_on_some_ranks, name):
        torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-14)


def test_the_clip_is_at_work():
    """Guards the test above against an option without effect."""
    plain, clipped = (run("MAdam", alone, steps=2, **OPTIONS[option])[1] for option in ("plain", "clip"))
    for state, other in zip(plain, clipped, strict=True):
        assert not torch.allclose(state["exp_avg"], other["exp_avg"], rtol=0.5)


# --- shards of given tensors ----------------------------------------------------------------------------------------

SHAPES = [(5, 4), (1,), (2, 3), (7,), (4, 4), ()]


def random(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def placements_of(kind: str) -> tuple[Any, list[Any]]:
    """A mesh, and for each of SHAPES the placements on it."""
    if kind == "two dimensions":
        b = 2 if dist.get_world_size() == 4 else 1
        mesh = init_device_mesh("cpu", (dist.get_world_size() // b, b), mesh_dim_names=("a", "b"))
        options = [(Shard(0), Replicate()), (Replicate(), Shard(0)), (Shard(0), Shard(1)), (Replicate(), Replicate())]
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        options = {"rows": [(Shard(0),)], "mixed": [(Shard(1),), (Replicate(),), (Shard(0),)]}[kind]
    chosen = []
    for i, shape in enumerate(SHAPES):
        placement = options[i % len(options)]
        fits = all(not isinstance(p, Shard) or p.dim < len(shape) for p in placement)
        chosen.append(placement if fits else (Replicate(),) * mesh.ndim)
    return mesh, chosen


def step_on_shards(name: str, kind: str, dtype: torch.dtype, options: dict[str, Any], steps: int = 4):
    """Parameters and state, whole, of DTensors whose gradients are given."""
    mesh, placements = placements_of(kind)
    return steps_on(name, lambda seed: spread(random(seed, dtype), mesh, placements), options, steps)


def step_alone(name: str, dtype: torch.dtype, options: dict[str, Any], steps: int = 4):
    return steps_on(name, lambda seed: random(seed, dtype), options, steps)


def steps_on(
    name: str, tensors: Callable[[int], list[Any]], options: dict[str, Any], steps: int, without: Iterable[int] = ()
):
    """Parameters are tensors(0), the gradients of the steps tensors(1), tensors(2), ...; those `without` have one in
    the first step alone."""
    params = [torch.nn.Parameter(tensor) for tensor in tensors(0)]
    optimizer = getattr(maxva_kernels, name)(params, lr=0.1, **options)
    for step in range(steps):
        for param, grad in zip(params, tensors(1 + step), strict=True):
            param.grad = grad
        for i in without if step > 0 else ():
            params[i].grad = None
        optimizer.step()
    return [whole(param) for param in params], [engines.state_of(optimizer, param) for param in params]


def same_bits(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


@by_name
@pytest.mark.parametrize("kind", ["rows", "mixed", "two dimensions"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((dtype, {}) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        *((dtype, {"master_weights": True}) for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_shards_give_the_bits_of_the_whole(dtype, options, kind, name, ranks):
    """Guards against an element that a shard's bounds lose or step twice on, in any placement; without clip, bits."""
    for params, states in ranks(step_on_shards, name, kind, dtype, options):
        expected, expected_states = step_alone(name, dtype, options)
        assert same_bits(params, expected)
        for state, expected_state in zip(states, expected_states, strict=True):
            assert state.keys() == expected_state.keys()
            assert same_bits(state.values(), expected_state.values())


@pytest.mark.parametrize("kind", ["rows", "mixed", "two dimensions"])
def test_replicas_count_once_in_the_norm_and_agree(kind, ranks):
    """Guards against a replicated tensor counted by every rank, and against ranks whose clips differ by a rounding."""
    options = {"max_grad_norm": 0.5}
    everyone = ranks(step_on_shards, "MAdam", kind, torch.float64, options)
    expected, _ = step_alone("MAdam", torch.float64, options)
    for params, _ in everyone:
        torch.testing.assert_close(params, expected, rtol=1e-13, atol=1e-15)
        assert same_bits(params, everyone[0][0])


def trust_on_shards(name: str, kind: str) -> list[torch.Tensor]:
    """The parameters after steps by trust ratios in which the first two have a gradient only at first."""
    mesh, placements = placements_of(kind)
    tensors = functools.partial(spread, mesh=mesh, placements=placements)
    options = {"trust_ratio": True, "weight_decay": 0.1}
    return steps_on(name, lambda seed: tensors(random(seed, torch.float64)), options, 4, without=(0, 1))[0]


@by_name
@pytest.mark.parametrize("kind", ["rows", "mixed", "two dimensions"])
def test_trust_ratios_where_some_have_no_gradient(kind, name, ranks):
    """Guards against the ratio of another parameter, or of a part of one, beside those that are left out."""
    options = {"trust_ratio": True, "weight_decay": 0.1}
    expected, _ = steps_on(name, lambda seed: random(seed, torch.float64), options, 4, without=(0, 1))
    for params in ranks(trust_on_shards, name, kind):
        torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-14)


@by_name
def test_tensors_cut_along_two_dimensions(name, pools):
    """Guards against a norm over one dimension of the mesh, where a tensor's quarters are on four ranks."""
    options = {"max_grad_norm": 0.5}
    everyone = pools(4)(step_on_shards, name, "two dimensions", torch.float64, options)
    expected, expected_states = step_alone(name, torch.float64, options)
    for params, states in everyone:
        torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(states, expected_states, rtol=1e-12, atol=1e-15)
        assert same_bits(params, everyone[0][0])


# --- the norm -------------------------------------------------------------------------------------------------------


def norm_of_shards(kind: str, dtype: torch.dtype) -> torch.Tensor:
    mesh, placements = placements_of(kind)
    return functional.grad_norm(spread(random(7, dtype), mesh, placements))


@pytest.mark.parametrize("kind", ["rows", "mixed", "two dimensions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norm_of_shards(dtype, kind, ranks):
    """Guards the public norm; each of some partial norms is rounded once, to float32 or float64, as the whole is."""
    expected = functional.grad_norm(random(7, dtype))
    norms = ranks(norm_of_shards, kind, dtype)
    epsilon = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for norm in norms:
        assert abs(norm.item() / expected.item() - 1) <= 2 * epsilon
        assert norm.item() == norms[0].item()


def step_with_gradients_on_one_rank(name: str, dtype: torch.dtype):
    """Rank 0 alone has gradients; and a second optimizer is stepped after it, whose collectives must meet too."""
    mesh, placements = placements_of("rows")
    params = [torch.nn.Parameter(p) for p in spread(random(0, dtype), mesh, placements)]
    other = [torch.nn.Parameter(p) for p in spread(random(5, dtype), mesh, placements)]
    before = [whole(param) for param in params]
    optimizers = [getattr(maxva_kernels, name)(group, max_grad_norm=0.1) for group in (params, other)]
    grads = spread(random(1, dtype), mesh, placements)
    for param, second, grad in zip(params, other, grads, strict=True):
        second.grad = grad
        if dist.get_rank() == 0:
            param.grad = grad
    for optimizer in optimizers:
        optimizer.step()
    return [bool((whole(param) != old).any()) for param, old in zip(params, before, strict=True)]


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_without_gradients_joins_the_norm(dtype, name, ranks):
    """Guards against a hang: a rank that has nothing to step on, or not yet, must still be met by the others, with a
    number of the type that theirs are of."""
    for moved in ranks(step_with_gradients_on_one_rank, name, dtype):
        assert moved[0]


def norm_over_several_meshes() -> torch.Tensor:
    """The norm of tensors on meshes of the same ranks: a second of two dimensions, and one with the ranks turned round.
    A clip by it can be taken too."""
    first = init_device_mesh("cpu", (2,))
    second = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    third = DeviceMesh("cpu", [1, 0])
    grads = random(7, torch.float64)[4:5] * 3
    where = [(first, [Shard(0)]), (second, [Replicate(), Shard(1)]), (third, [Shard(0)])]
    parts = [distribute_tensor(grad, *place) for grad, place in zip(grads, where, strict=True)]
    params = [torch.nn.Parameter(part.clone()) for part in parts]
    for param, part in zip(params, parts, strict=True):
        param.grad = part
    MAdam(params, max_grad_norm=1.0).step()
    return functional.grad_norm(parts)


def test_norm_over_several_meshes_of_the_same_ranks(pools):
    """Guards against refusing, or a wrong norm, where tensor parallelism has a mesh and FSDP another of its ranks."""
    expected = functional.grad_norm(random(7, torch.float64)[4:5] * 3)
    for norm in pools(2)(norm_over_several_meshes):
        torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)


def redistributed_gradients() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same gradients, as halves to be added up by ranks and sharded along another dimension."""
    mesh, count = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size()
    results = []
    for changed in (False, True):
        params = [torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [p])) for p in (Replicate(), Shard(0))]
        grad = torch.arange(24.0).reshape(4, 6)
        parts = DTensor.from_local(grad / count, mesh, [Partial()]), distribute_tensor(grad, mesh, [Shard(1)])
        for param, part in zip(params, parts, strict=True):
            param.grad = part if changed else distribute_tensor(grad, mesh, param.placements)
        MAdam(params, lr=0.1, max_grad_norm=1.0).step()
        results.append([whole(param) for param in params])
    return results[0], results[1]


def test_gradients_follow_their_parameters_placement(pools):
    """Guards against a gradient that tensor parallelism leaves as a sum to be made, taken for the sum."""
    for expected, found in pools(2)(redistributed_gradients):
        assert same_bits(found, expected)


# --- AMP ------------------------------------------------------------------------------------------------------------


def train_with_overflow(name: str) -> list[tuple[bool, set[int], float]]:
    """FSDP2 under a gradient scaler, with an inf in rank 1's gradient at step 2: whether each step moved anything, the
    steps that the state counts, and the scale."""
    model = shard(make_model(torch.float32))
    optimizer = engines.make_optimizer(name, model, max_grad_norm=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    history = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(engines.loss_of(model, step, engines.my_rows())).backward()
        if step == 2 and dist.get_rank() == 1:
            model.first.weight.grad.to_local()[0, 0] = torch.inf
        before = [whole(param) for param in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        moved = any(bool((whole(p) != old).any()) for p, old in zip(model.parameters(), before, strict=True))
        steps = {int(optimizer.state[param]["step"]) for param in model.parameters()}
        history.append((moved, steps, scaler.get_scale()))
    return history


@by_name
def test_overflow_on_one_rank_skips_the_step_on_all(name, pools):
    """Guards against ranks that part: one skips, the others step."""
    for history in pools(2)(train_with_overflow, name):
        assert history == [(True, {1}, 64.0), (True, {2}, 64.0), (False, {2}, 32.0), (True, {3}, 32.0)]


def train_with_nan(name: str) -> tuple[list[bool], int]:
    """FSDP2 with a NaN in the last rank's gradient at step 1: whether each step moved anything, and the count."""
    model = shard(make_model(torch.float32))
    optimizer = engines.make_optimizer(name, model, skip_nonfinite=True)
    moved = []
    for step in range(3):
        before = [whole(param) for param in model.parameters()]
        optimizer.zero_grad()
        engines.loss_of(model, step, engines.my_rows()).backward()
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            model.norm.weight.grad.to_local()[0] = torch.nan
        optimizer.step()
        moved.append(any(bool((whole(p) != old).any()) for p, old in zip(model.parameters(), before, strict=True)))
    return moved, optimizer.skipped_steps


@by_name
def test_nan_on_one_rank_skips_the_step_on_all(name, ranks):
    """Guards `skip_nonfinite` against ranks that part."""
    assert ranks(train_with_nan, name) == [([True, False, True], 1)] * len(ranks)


def compiled_steps(engine: str) -> tuple[list[torch.Tensor], int]:
    """The parameters after some compiled steps, and how many graphs were made."""
    torch._dynamo.reset()
    counters.clear()
    model = shard(make_model()) if engine == "FSDP2" else replicate(make_model())
    optimizer = engines.make_optimizer("MAdam", model, engine == "ZeRO", max_grad_norm=0.1)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=engine == "DDP")
    for number in range(engines.STEPS):
        optimizer.zero_grad()
        engines.loss_of(model, number, engines.my_rows()).backward()
        step()
    return [whole(param) for param in model.parameters()], counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("engine", ["DDP", "ZeRO", "FSDP2"])
def test_compiled_step_among_ranks(engine, pools):
    """Guards a compiled step against a graph break under DDP, under ZeRO against a norm of this rank's part, and under
    FSDP2 against a call of DTensor's of which no graph can be made."""
    for params, graphs in pools(2)(compiled_steps, engine):
        torch.testing.assert_close(params, on_one_process("MAdam", "clip")[0], rtol=1e-11, atol=1e-13)
        assert engine != "DDP" or graphs == 2


def trusted_steps(compiled: bool) -> list[torch.Tensor]:
    """The parameters after steps with clip and trust ratios under FSDP2, in some of which one has no gradient."""
    torch._dynamo.reset()
    model = shard(make_model())
    optimizer = engines.make_optimizer("MAdam", model, max_grad_norm=0.1, trust_ratio=True)
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    for number in range(engines.STEPS):
        optimizer.zero_grad()
        engines.loss_of(model, number, engines.my_rows()).backward()
        if number % 2:
            next(iter(model.parameters())).grad = None
        step()
    return [whole(param) for param in model.parameters()]


def test_compiled_step_with_trust_ratios_on_shards(pools):
    """Guards what a step has composed when its graph breaks, for the norms of whole tensors: torch 2.11's compiler gave
    back empty tuples."""
    for compiled, eager in zip(pools(2)(trusted_steps, True), pools(2)(trusted_steps, False), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-11, atol=1e-13)


# --- refusals -------------------------------------------------------------------------------------------------------


def saturate_shards() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model under FSDP2 whose optimizer has stamps."""
    model = engines.shard(engines.make_model(torch.float32))
    optimizer = engines.make_optimizer("MAdam", model)
    for step in range(4):
        engines.train_step(model, optimizer, step, engines.my_rows())
        for state in optimizer.state.values() if step == 1 else ():
            state["weight_sum"].to_local().fill_(1)
    return model, optimizer


def saturated_shards() -> tuple[torch.Tensor, list[int]]:
    """The stamps of a rank's chunks, and the step that they are good for."""
    _, optimizer = saturate_shards()
    (part,) = optimizer._saturation._parts
    return part.stamps, [8 * (int(state["step"]) + 1) for state in optimizer.state.values()]


def test_shards_keep_their_stamps(pools):
    """Guards what tells that w need not be read: it is about the tensors in DTensors, which must stay the same ones."""
    for stamps, expected in pools(2)(saturated_shards):
        assert len(set(expected)) == 1
        assert set(stamps.tolist()) == set(expected)


def written(weight_sum: Any) -> None:
    weight_sum.mul_(0.5)


def local_written(weight_sum: Any) -> None:
    weight_sum.to_local().mul_(0.5)


def local_written_invisibly(weight_sum: Any) -> None:
    """And said so, as the optimizers' docstring has it."""
    weight_sum.to_local().data.mul_(0.5)
    torch.autograd.graph.increment_version(weight_sum)


def rewritten_shards(write: Callable[[Any], None]) -> list[bool]:
    """For each parameter whether a step has moved all the w of this rank that were written."""
    model, optimizer = saturate_shards()
    for state in optimizer.state.values():
        write(state["weight_sum"])
    engines.train_step(model, optimizer, 4, engines.my_rows())
    return [bool((state["weight_sum"].to_local() > 0.5).all()) for state in optimizer.state.values()]


@pytest.mark.parametrize("write", [written, local_written, local_written_invisibly], ids=lambda write: write.__name__)
def test_stamps_of_shards_end_when_they_are_written(write, pools):
    """Guards a w that is written as a DTensor, whose counter of versions is not its local tensor's, against stamps."""
    for moved in pools(2)(rewritten_shards, write):
        assert all(moved)


def refusal(kind: str) -> str:
    """The message of a step, or of what leads to it, that cannot be right."""
    mesh = init_device_mesh("cpu", (2,))
    first, second = (torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])) for _ in range(2))
    plain = torch.nn.Parameter(torch.ones(3))
    names: list[tuple[str, torch.Tensor]] = [("first", first), ("second", second)]
    if kind in ("plain beside sharded", "plain beside sharded, no clip", "sharded gradient of a plain one"):
        names.append(("plain", plain))
    if kind == "ranks of the third differ":
        turned = DeviceMesh("cpu", [1, 0])
        names.append(("turned", torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), turned, [Shard(0)]))))
    if kind in ("ranks differ", "ranks of the third differ"):
        own = init_device_mesh("cpu", (2, 1), mesh_dim_names=("x", "y"))["y"]
        names.append(("expert", torch.nn.Parameter(distribute_tensor(torch.ones(4), own, [Shard(0)]))))
    optimizer = MAdam(names, max_grad_norm=None if kind.endswith("no clip") else 1.0)
    for _, param in names[1:] if kind == "plain beside sharded" else names:  # an index may count what has no gradient
        param.grad = torch.ones_like(param)
    if kind == "norm of what is to be added up":
        parts = [first.grad, DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])]
        return _message(lambda: functional.grad_norm(parts))
    if kind == "sharded gradient of a plain one":
        return _step_with(optimizer, 2, distribute_tensor(torch.ones(3), mesh, [Shard(0)]))
    if kind == "plain gradient":
        return _step_with(optimizer, 1, torch.ones(2, 4))
    if kind == "plain gradient behind none":
        return _step_with(optimizer, 1, torch.ones(2, 4), without=0)
    if kind == "gradient on another mesh":
        other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("x", "y"))
        return _step_with(optimizer, 1, distribute_tensor(torch.ones(4, 4), other, [Shard(0), Replicate()]))
    if kind.startswith("loaded"):
        optimizer.step()
        saved = optimizer.state_dict()
        for name in ("exp_avg", "grad_mean", "grad_var", "weight_sum"):
            value = saved["state"][1][name].full_tensor()
            if kind == "loaded, of other placement":
                value = distribute_tensor(value, mesh, [Shard(1)])
            saved["state"][1][name] = value
        return _message(lambda: optimizer.load_state_dict(saved))
    return _message(optimizer.step)


def _step_with(optimizer: torch.optim.Optimizer, index: int, grad: torch.Tensor, without: int | None = None) -> str:
    """Autograd refuses to set such gradients; the functional form is not asked."""
    groups = gather(optimizer.param_groups, optimizer.state, [])
    groups[0].tensors.grads[index] = grad
    if without is not None:
        groups[0].tensors.grads[without] = None
    with torch.no_grad():
        return _message(lambda: functional.step_groups(groups, laprop=False, backend="cpu"))


def _message(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


REFUSALS = {
    "plain beside sharded": ("params[2] is a plain tensor beside DTensors", "'plain'", "distribute_tensor"),
    "plain beside sharded, no clip": (),
    "ranks differ": ("same ranks", "params[2]", "'expert'", "clip before the step"),
    "ranks of the third differ": ("same ranks", "params[3]", "'expert'", "clip before the step"),
    "norm of what is to be added up": ("grads[1] is still to be added up", "Partial", "redistribute"),
    "plain gradient": ("grads[1] is a plain tensor, but its parameter is a DTensor",),
    "plain gradient behind none": ("grads[0] is a plain tensor, but its parameter is a DTensor",),
    "sharded gradient of a plain one": ("grads[2] is a DTensor, but its parameter is a plain tensor", "to_local"),
    "gradient on another mesh": ("grads[1] is on another device mesh", "redistribute"),
    "loaded, whole": ("state of parameter 1", "exp_avg", "plain tensor", "set_optimizer_state_dict"),
    "loaded, of other placement": ("state of parameter 1", "exp_avg", "Shard(dim=1)", "set_optimizer_state_dict"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_cannot_be_right_is_refused(kind, pools):
    """Guards against a silently wrong norm or state; the last is about plain parameters, which step well unclipped."""
    for message in pools(2)(refusal, kind):
        for part in REFUSALS[kind]:
            assert part in message
        assert bool(message) == bool(REFUSALS[kind])


def wrapped(engine: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = make_model(dtype)
    if engine == "FSDP2":
        model = shard(model)
    else:
        original = engine == "FSDP1, use_orig_params"
        model = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    return model, engines.make_optimizer("MAdam", model, **options)


def norm_under_fsdp1(engine: str, options: dict[str, Any]) -> str:
    model, optimizer = wrapped(engine, torch.float32, options)
    engines.loss_of(model, 0, engines.my_rows()).backward()
    return _message(optimizer.step)


fsdp1 = pytest.mark.parametrize("engine", ["FSDP1", "FSDP1, use_orig_params"])


@fsdp1
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {"trust_ratio": True}], ids=str)
def test_engine_whose_partition_is_its_own_clips_itself(options, engine, pools):
    """Guards against a clip, or a ratio, by the norm of one rank's part, which nothing in the parameters tells, and
    against ranks that skip a step by themselves."""
    for message in pools(2)(norm_under_fsdp1, engine, options):
        assert "clip_grad_norm_" in message


@fsdp1
def test_one_rank_has_the_whole(engine, pools):
    """Guards against refusing a clip under an engine that has divided nothing, in a run tried out on one GPU."""
    assert pools(1)(norm_under_fsdp1, engine, {"max_grad_norm": 1.0}) == [""]


def overflow_under_fsdp1(engine: str) -> list[tuple[int, float]]:
    """Steps with an infinite gradient on rank 1 in the second; the step count and the scale after each."""
    model, optimizer = wrapped(engine, torch.float32, {})
    scaler = ShardedGradScaler(device="cpu", init_scale=8.0, growth_interval=100)
    told = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(engines.loss_of(model, step, engines.my_rows())).backward()
        mine = next(param for param in model.parameters() if param.grad is not None and param.numel() > 0)
        if step == 1 and dist.get_rank() == 1:
            mine.grad.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        told.append((int(optimizer.state[mine]["step"]), scaler.get_scale()))
    return told


@fsdp1
def test_overflow_on_one_rank_of_fsdp1_is_everybodys(engine, pools):
    """Guards against ranks that part: one skips the step, the others go on, and their scales differ from then on."""
    for told in pools(2)(overflow_under_fsdp1, engine):
        assert told == [(1, 8.0), (1, 4.0), (2, 4.0), (3, 4.0)]


def save_and_resume(engine: str, dtype: torch.dtype, options: dict[str, Any]) -> str:
    """The message of a first step that is refused; "resumed" where the run goes on from its checkpoint, bit for bit."""
    model, optimizer = wrapped(engine, dtype, options)
    message = _message(lambda: engines.train_step(model, optimizer, 0, engines.my_rows()))
    if message:
        return message if not any(optimizer.state.values()) else "refused with state"
    full = StateDictOptions(full_state_dict=True)
    saved = [get_model_state_dict(model, options=full), get_optimizer_state_dict(model, optimizer, options=full)]
    dist.broadcast_object_list(saved, src=0)
    resumed, its_optimizer = wrapped(engine, dtype, options)
    set_model_state_dict(resumed, saved[0], options=full)
    set_optimizer_state_dict(resumed, its_optimizer, saved[1], options=full)
    engines.train_step(model, optimizer, 1, engines.my_rows())
    engines.train_step(resumed, its_optimizer, 1, engines.my_rows())
    for param, its in zip(model.parameters(), resumed.parameters(), strict=True):
        expected, found = engines.state_of(optimizer, param), engines.state_of(its_optimizer, its)
        assert found.keys() == expected.keys()
        assert same_bits([whole(its), *map(found.get, expected)], [whole(param), *expected.values()])
    return "resumed"


MASTERS = {"master_weights": True}
NARROW = {**MASTERS, "state_dtype": torch.bfloat16}
REMEDIES = ("use_orig_params=True", "fully_shard", "use_orig_params=False", "master_weights=False")
KEPT_BY_ENGINES = {
    "bfloat16": ("FSDP1, use_orig_params", torch.bfloat16, {}, ("resumed",)),
    "masters": ("FSDP1, use_orig_params", torch.bfloat16, MASTERS, (*REMEDIES, "state_dtype=torch.bfloat16")),
    "masters, 16-bit state": ("FSDP1, use_orig_params", torch.bfloat16, NARROW, ("resumed",)),
    "masters, flat": ("FSDP1", torch.bfloat16, MASTERS, ("resumed",)),
    "masters, FSDP2": ("FSDP2", torch.bfloat16, MASTERS, ("resumed",)),
    "whole masters": ("FSDP1, use_orig_params", torch.float16, MASTERS, ("resumed",)),
    "whole masters, 16-bit state": ("FSDP1, use_orig_params", torch.float16, NARROW, (*REMEDIES, "state_dtype=None")),
}


@pytest.mark.parametrize("kind", KEPT_BY_ENGINES)
def test_state_that_an_engine_cannot_save_is_refused(kind, pools):
    """Guards against a run under FSDP1 whose first checkpoint fails, and the ways out that the message names."""
    engine, dtype, options, expected = KEPT_BY_ENGINES[kind]
    for message in pools(2)(save_and_resume, engine, dtype, options):
        for part in expected:
            assert part in message
    assert pools(1)(save_and_resume, engine, dtype, options) == ["resumed"]
