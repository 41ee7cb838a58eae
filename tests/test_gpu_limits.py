"""Sizes, numbers of tensors and groups, and indices at which the GPU step kernels and their tables could go wrong."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from cases import BASE, assert_same_bits, bits, make_params, needs_cpu_kernels, set_grads
from twins import at_offset, step_both, with_twin

from maxva_kernels import LaMAdam, MAdam, functional, rounding
from maxva_kernels.groups import MOMENTS, Hyperparameters
from maxva_kernels.launch import DTYPE_CODES, StepLaunch, pack

pytestmark = needs_cpu_kernels

OPERANDS = ("param", "grad", *MOMENTS)
CHUNK = 8192


def test_chunk_is_what_these_tests_take_it_for(simulated):
    """Guards the sizes below."""
    assert simulated.STEP_CHUNK == CHUNK


EDGES = [
    *((torch.float32, offset) for offset in (0, 1, 3)),
    *((torch.bfloat16, offset) for offset in (0, 7)),
    (torch.float64, 1),
]


@pytest.mark.parametrize(("dtype", "offset"), EDGES, ids=str)
def test_chunk_edges(dtype, offset, simulate):
    """Guards the ends of chunks, which are cut where packets begin: a tensor that begins within one has a first chunk
    that is shorter, and a last one that is longer, than the others."""
    launcher = simulate(track=True, blocks=40)
    sizes = [k * CHUNK + around for k in (1, 2, 3) for around in (-8, -1, 0, 1, 8)]
    pair = with_twin(MAdam(make_params(tuple(sizes), dtype), backend=launcher.backend, **BASE))
    step_both(pair)
    step_both(pair, 1, offsets=[dict.fromkeys(OPERANDS, offset)] * len(sizes))
    for buffer in launcher.launches[-1].buffers_of("param"):
        assert (buffer.writes == 1).all(), buffer


def test_scratch_memory_is_as_large_as_the_launch_takes_it_for(simulated, monkeypatch):
    """Guards against kernels that write beyond what was allocated for them, which the simulator lets them: it maps what
    a launch says that it will touch."""
    owned, seen, simulate = {}, set(), simulated.simulate

    def check(name, module, entry, chunks, threads, arguments, ranges, **options):
        ranges = list(ranges)
        for what, address, nbytes in ranges:
            if address and what in ("squares", "norms", "statistics", "saturation", "sums", "norm"):
                assert owned[address].nbytes == nbytes, what
                seen.add(what)
        simulate(name, module, entry, chunks, threads, arguments, ranges, **options)

    monkeypatch.setattr(simulated, "simulate", check)
    for name in ("empty", "zeros"):
        make = getattr(torch, name)

        def made(*args, make=make, **kwargs):
            tensor = make(*args, **kwargs)
            owned[tensor.data_ptr()] = tensor  # kept, so that no address is given twice
            return tensor

        monkeypatch.setattr(torch, name, made)
    for dtype in (torch.float32, torch.float64):
        params = make_params((5, 3 * CHUNK + 1, 0, 700), dtype)
        optimizer = MAdam(params, backend=simulated.backend, **BASE, trust_ratio=True, max_grad_norm=1.0)
        optimizer.collect_statistics = True
        set_grads(params, 0)
        optimizer.step()
    assert seen == {"squares", "norms", "statistics", "saturation", "sums", "norm"}


@pytest.mark.parametrize(("tensors", "most", "launches"), [(5, 5, 1), (6, 5, 2), (13, 5, 3), (3, 1, 3), (1, 5, 1)])
def test_more_tensors_than_a_launch_takes(tensors, most, launches, simulated):
    """Guards the cut into launches: every tensor in one of them, with its own row, chunks and gradient."""
    simulated.MAX_TENSORS = most
    sizes = tuple((0, 700, 8193)[i % 3] + i for i in range(tensors))
    pair = with_twin(LaMAdam(make_params(sizes), backend=simulated.backend, **BASE, amsgrad=True, max_grad_norm=1.0))
    for step in range(2):
        step_both(pair, step)
    steps = [launch for launch in simulated.launches if launch.kernel.startswith("step")]
    assert len(steps) == 2 * launches
    assert sum(len(launch.buffers_of("step")) for launch in steps[:launches]) == tensors


@pytest.mark.parametrize(
    ("groups", "each", "most", "launches"), [(2, 2, 2, 1), (3, 1, 2, 2), (7, 2, 3, 3), (4, 1, 1, 4)]
)
def test_more_groups_than_a_launch_takes(groups, each, most, launches, simulated):
    """Guards the index of a group in its launch, where that does not begin with group 0."""
    simulated.MAX_GROUPS = most
    settings = [{"params": make_params((9,) * each, seed=g), "lr": 1 / (g + 1), "eps": g / 8} for g in range(groups)]
    pair = with_twin(MAdam(settings, backend=simulated.backend, **{**BASE, "weight_decay": 0.0}))
    for step in range(2):
        step_both(pair, step)
    assert len(simulated.launches) == 2 * launches


def test_groups_and_tensors_at_once(simulated):
    """Guards the two limits where they meet, in both orders, and dtypes that share groups."""
    simulated.MAX_TENSORS, simulated.MAX_GROUPS = 4, 2
    settings = []
    for g, sizes in enumerate([(3,), (5, 2, 9), (), (1, 1, 1, 1, 1, 1), (0,), (4, 4)]):
        params = [*make_params(sizes, seed=g), *make_params(sizes[:2], torch.bfloat16, seed=g)]
        settings += [{"params": params, "lr": 1 / (g + 1), "amsgrad": g % 2 == 0}] if params else []
    pair = with_twin(MAdam(settings, backend=simulated.backend, **BASE))
    for step in range(2):
        step_both(pair, step)


@pytest.mark.parametrize(("tensors", "launches"), [(2900, 1), (3000, 2)])
def test_as_many_tensors_as_there_is_room_for(tensors, launches, simulate_cuda):
    """Guards the arguments of a launch at their real size: the last address among them."""
    simulated = simulate_cuda()
    assert simulated.MAX_TENSORS == 2900
    simulated.blocks = 128  # together, which is faster
    pair = with_twin(MAdam(make_params((1,) * tensors), backend=simulated.backend, **BASE))
    step_both(pair)
    assert len(simulated.launches) == launches


@pytest.mark.parametrize(("groups", "launches"), [(64, 1), (65, 2)])
def test_as_many_groups_as_there_is_room_for(groups, launches, simulate_cuda):
    """Guards the arguments of a launch at their real size: the last group among them."""
    simulated = simulate_cuda()
    assert simulated.MAX_GROUPS == 64
    for dtype in (torch.float32, torch.float64):
        settings = [{"params": make_params((2,), dtype, seed=g), "lr": 1 / (g + 1)} for g in range(groups)]
        pair = with_twin(MAdam(settings, backend=simulated.backend, **BASE))
        step_both(pair)
        assert len(simulated.launches) == launches
        simulated.launches.clear()


def test_mixed_dtypes(simulated):
    """Guards the launch for each pair of dtypes: it must leave the other gradients' tensors alone."""
    params = [make_params((700, 5), dtype, seed=s)[s % 2] for dtype in DTYPE_CODES for s in range(4)]
    pair = with_twin(LaMAdam(params, backend=simulated.backend, **BASE, max_grad_norm=1.0))
    for step in range(2):
        for optimizer in pair:
            set_grads(optimizer.param_groups[0]["params"], step)
            for i, param in enumerate(optimizer.param_groups[0]["params"]):
                param.grad_dtype = None
                param.grad = None if i == 6 else param.grad.to(list(DTYPE_CODES)[i % 4])
            optimizer.step()
    assert_same_bits(*pair)
    kernels = [launch.kernel for launch in simulated.launches]
    assert len([name for name in kernels if name.startswith("step")]) == 2 * (3 * 3 + 1)
    if simulated.backend == "cuda":
        assert len(set(kernels[5:15])) == 3 * 3 + 1
    assert [name.split("_kernel")[0] for name in kernels[:5]] == ["norm_chunks"] * 4 + ["norm_total"]


KEY = -(2**62) - 12345  # of the state's rounding
FAR = [
    # parameter, gradient, state, beginning of the operands, the gradient's own, chunks
    (torch.float32, torch.float32, torch.float32, 0, 0, 1),
    (torch.float32, torch.float32, torch.float32, 3, 3, 2),
    (torch.float32, torch.float32, torch.float32, 0, 1, 2),
    (torch.bfloat16, torch.bfloat16, torch.float32, 5, 5, 1),
    (torch.float16, torch.float32, torch.float32, 2, 3, 1),
    (torch.float64, torch.float64, torch.float64, 1, 1, 2),
    (torch.float32, torch.float32, torch.bfloat16, 3, 3, 1),
    (torch.float32, torch.bfloat16, torch.bfloat16, 1, 2, 1),
]


@pytest.mark.parametrize("numel", [2**31 + 100, 2**32 - 1, 2**33 + 5000])
@pytest.mark.parametrize(("param_dtype", "grad_dtype", "state", "offset", "grad_offset", "chunks"), FAR, ids=str)
def test_indices_beyond_32_bits(param_dtype, grad_dtype, state, offset, grad_offset, chunks, numel, simulated):
    """Guards the arithmetic of indices and addresses: the last chunks of a tensor that is larger than memory, of which
    no more than them is there. Its row says that its chunks began long before this launch's."""
    before = -(-numel // CHUNK) - chunks
    packets = offset == grad_offset
    width = 16 // min(param_dtype.itemsize, grad_dtype.itemsize, state.itemsize)
    start = before * CHUNK - (offset % width if packets else 0)
    count = numel - start
    generator = torch.Generator().manual_seed(0)

    def values(dtype: torch.dtype) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64).add(0.1).to(dtype)

    wide = torch.float64 if param_dtype == torch.float64 else torch.float32
    near = {name: values({"param": param_dtype, "grad": grad_dtype}.get(name, state)) for name in OPERANDS}
    far = {name: at_offset(value, grad_offset if name == "grad" else offset) for name, value in near.items()}
    if packets:  # the chunk begins with a packet
        far = {name: at_offset(value, 0) for name, value in near.items()}
    # Where the tensor would begin, below 0 if need be: addresses are numbers of 64 bits.
    first = {name: value.data_ptr() - start * value.element_size() for name, value in far.items()}
    simulated.only = {f"{name}0": (value.data_ptr(), value.nbytes) for name, value in far.items()}

    steps = torch.tensor([4, 4])
    addresses = [first[name] for name in ("param", *MOMENTS)]
    row = torch.tensor([*addresses, 0, steps[:1].data_ptr(), numel, 0, -before, KEY, 0])
    chunk_rows, ticket = torch.zeros(chunks, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    packed, _ = pack([Hyperparameters(**BASE)], wide, torch.device("cpu"))
    launch = StepLaunch(
        0, 0, *(DTYPE_CODES[dtype] for dtype in (param_dtype, grad_dtype, state)), False, False, False,
        row.data_ptr(), chunk_rows.data_ptr(), chunks, ticket.data_ptr(),
        packed, array("Q", [first["grad"] % 2**64]).tobytes(), *[0] * 8, -1.0,
    )  # fmt: skip
    simulated.step(launch)
    for name in MOMENTS:
        near[name] = near[name].to(wide)
    lists = [[near[name]] for name in ("param", "grad", *MOMENTS)]
    functional.madam_(*lists, [steps[1]], **BASE, backend="cpu")
    if state == torch.bfloat16:
        numbers = rounding.random_bits(KEY, 5, start + torch.arange(count))
        for name, its in zip(MOMENTS, numbers, strict=False):
            near[name] = rounding.round_stochastically(near[name], its)
    assert steps.tolist() == [5, 5]
    for name in OPERANDS:
        assert torch.equal(bits(far[name]), bits(near[name])), name
    if simulated.backend == "cuda":
        assert (simulated.launches[0].stats.widths("st").get(16, 0) > 0) == packets


def test_any_chunk_may_come_from_any_row(simulated):
    """Guards the map from chunks to rows: a launch whose tensors have 0, 1 and many chunks, where the last row's comes
    right behind another's."""
    sizes = (0, 1, 0, 0, 3 * CHUNK + 1, 2, 0, CHUNK, 0)
    pair = with_twin(MAdam(make_params(sizes), backend=simulated.backend, **BASE))
    step_both(pair)
    launch = simulated.launches[0]
    rows = launch.buffers["chunk_rows"].array.view(np.int32)
    assert rows.tolist() == [1, 4, 4, 4, 4, 5, 7]
