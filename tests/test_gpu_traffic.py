"""What the GPU step kernels read and write, byte by byte, in a simulated memory: each operand once, in accesses of 16
bytes, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cases import BASE, assert_same_bits, make_params, needs_cpu_kernels, run, set_grads
from simulated import Launch
from simulated_cuda import constant
from twins import step_both, with_twin

from maxva_kernels import LaMAdam, MAdam

pytestmark = needs_cpu_kernels

STATE = ("exp_avg", "grad_mean", "grad_var", "weight_sum")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Of parameter, gradient and state; None: the arithmetic's.
DTYPES = [*((param, grad, None) for param in FLOATS for grad in FLOATS), (torch.float64, torch.float64, None)]
DTYPES += [(torch.float32, grad, torch.bfloat16) for grad in FLOATS[:2]]
DTYPES += [(torch.bfloat16, torch.bfloat16, torch.bfloat16)]
EACH_DTYPE = pytest.mark.parametrize(("param_dtype", "grad_dtype", "state_dtype"), DTYPES, ids=str)
EACH_KERNEL = pytest.mark.parametrize(("algorithm", "amsgrad"), [(MAdam, True), (LaMAdam, False)])


@pytest.fixture
def tracking(simulate):
    """Each GPU backend by simulation, with the accesses of each byte counted."""
    return simulate(track=True, blocks=12)


@pytest.fixture
def tracking_cuda(simulate_cuda):
    return simulate_cuda(track=True, blocks=12)


def stored(amsgrad: bool, master: bool = False) -> tuple[str, ...]:
    """The operands that a step reads and writes."""
    return ("param", *STATE, *(("max_denom",) if amsgrad else ()), *(("master",) if master else ()))


def assert_each_byte_once(launch: Launch, numels: list[int], amsgrad: bool, master: bool = False) -> None:
    """Of the tensors with these sizes all is read once and written once, the gradient only read."""
    for name in (*stored(amsgrad, master), "grad"):
        buffers = launch.buffers_of(name)
        assert len(buffers) == sum(numel > 0 for numel in numels), name
        for buffer in buffers:
            assert (buffer.reads == 1).all(), buffer
            assert (buffer.writes == (name != "grad")).all(), buffer
    assert len(launch.buffers_of("step")) == len(numels)
    for buffer in launch.buffers_of("step"):
        assert (buffer.writes == 1).all(), buffer
    for name in ("rows", "chunk_rows", "grad_scale", "found_inf", "grad_norm", "sent"):
        if name in launch.buffers:
            assert not launch.buffers[name].writes.any(), name
    ticket = launch.buffers["ticket"]
    assert (ticket.writes == launch.stats.grid[0] + 1).all()  # each block adds to it, the last one resets it
    assert (ticket.array == 0).all()
    allowed = {*stored(True, master), "grad", "step", "rows", "chunk_rows", "ticket", "saturation", "sent"}
    assert {name.rstrip("0123456789") for name, _ in launch.stats.buffer_bytes} <= allowed


@EACH_DTYPE
@EACH_KERNEL
def test_each_byte_once(algorithm, amsgrad, param_dtype, grad_dtype, state_dtype, tracking):
    """Guards against an element that is skipped, or stepped twice with the same result, at the edges of packets, of
    turns of a block and of chunks, in packets as without."""
    sizes = (0, 1, 7, 33, 513, 2049, 0, 8193, 1025, 8200)
    ours = [{}] * 6 + [dict.fromkeys((*stored(True), "grad"), i) for i in (0, 3, 1)] + [{"grad": 1, "exp_avg": 1}]
    options = {**BASE, "amsgrad": amsgrad, "state_dtype": state_dtype}
    pair = with_twin(algorithm(make_params(sizes, param_dtype), backend=tracking.backend, **options))
    for step in range(2):
        step_both(pair, step, grad_dtype, offsets=ours)
    for launch in tracking.launches:
        assert_each_byte_once(launch, list(sizes), amsgrad)


BYTES = [
    (torch.float32, torch.float32, None, False, 44),
    (torch.float32, torch.float32, None, True, 52),
    (torch.bfloat16, torch.bfloat16, None, False, 38),
    (torch.float16, torch.float16, None, True, 46),
    (torch.float32, torch.bfloat16, None, False, 42),
    (torch.float64, torch.float64, None, False, 88),
    (torch.float32, torch.float32, torch.bfloat16, False, 28),
    (torch.float32, torch.float32, torch.bfloat16, True, 32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, False, 22),
]
BYTES = [(*each, False) for each in BYTES]
BYTES += [(torch.bfloat16, torch.bfloat16, None, False, 42, True)]
BYTES += [(torch.bfloat16, torch.bfloat16, torch.bfloat16, True, 30, True)]


@pytest.mark.parametrize(("param_dtype", "grad_dtype", "state_dtype", "amsgrad", "expected", "master"), BYTES, ids=str)
def test_bytes_of_an_element(param_dtype, grad_dtype, state_dtype, amsgrad, expected, master, tracking):
    """Guards what the speed of the step rests on: the bytes that it moves, besides a table that is small."""
    sizes = (8192 * 2, 100)
    options = {**BASE, "amsgrad": amsgrad, "state_dtype": state_dtype, "master_weights": master}
    optimizer = LaMAdam(make_params(sizes, param_dtype), backend=tracking.backend, **options)
    set_grads(optimizer.param_groups[0]["params"], 0, dtype=grad_dtype)
    optimizer.step()
    (launch,) = tracking.launches
    body = sum(launch.bytes_of(kind, name) for kind in ("ld", "st") for name in (*stored(amsgrad, master), "grad"))
    assert body == expected * sum(sizes)
    if tracking.backend == "triton":
        return
    # The table, besides: of the CUDA kernels this is known to the byte.
    chunks, threads = 3, launch.stats.block[0]
    assert launch.bytes_of("ld", "chunk_rows") == 4 * chunks * threads
    # Each thread reads a chunk's row, of which a warp is served at once; the last block the addresses of step counts.
    assert launch.bytes_of("ld", "rows") <= constant("step_row_bytes") * chunks * threads + 8 * len(sizes)
    assert launch.bytes_of("ld", "step") == 8 * (chunks + len(sizes))
    assert launch.bytes_of("st", "step") == 8 * len(sizes)
    assert launch.bytes_of("atom", "ticket") == 4 * launch.stats.grid[0]
    assert launch.bytes_of("ld", "saturation") == launch.bytes_of("st", "saturation") == 4 * chunks
    named = ("rows", "chunk_rows", "step", "ticket", "saturation")
    table = sum(launch.bytes_of(kind, name) for kind in ("ld", "st", "atom") for name in named)
    assert sum(launch.stats.bytes(kind) for kind in ("ld", "st", "atom")) == body + table


@pytest.mark.parametrize(("state_dtype", "expected"), [(None, 40), (torch.bfloat16, 26)], ids=str)
def test_saturated_weights_are_not_written(state_dtype, expected, tracking_cuda):
    """Guards what is saved once w is 1, and that a packet in which it is not is written whole."""
    sizes = (8192 * 2, 96)
    optimizer = MAdam(make_params(sizes), backend=tracking_cuda.backend, **BASE, state_dtype=state_dtype)
    params = optimizer.param_groups[0]["params"]
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
        for param in params:
            optimizer.state[param]["weight_sum"].fill_(1)
        if step == 1:
            optimizer.state[params[0]]["weight_sum"][77] = 0.75
    of_one, of_all = tracking_cuda.launches[1], tracking_cuda.launches[2]
    body = sum(of_one.bytes_of(kind, name) for kind in ("ld", "st") for name in (*stored(False), "grad"))
    assert body == expected * sum(sizes)
    assert of_one.bytes_of("st", "weight_sum") == 0
    assert of_all.bytes_of("st", "weight_sum") == 16


@pytest.mark.parametrize(
    ("state_dtype", "amsgrad", "expected"), [(None, False, 36), (torch.bfloat16, False, 24), (None, True, 44)], ids=str
)
def test_saturated_chunks_are_neither_read_nor_written(state_dtype, amsgrad, expected, tracking):
    """Guards what is saved once all w of a chunk have been found to be 1, and that no more than its stamp is moved for
    it; the other chunk's w are still read and written."""
    sizes = (8192 * 2, 96)
    options = {**BASE, "amsgrad": amsgrad, "state_dtype": state_dtype}
    optimizer = MAdam(make_params(sizes), backend=tracking.backend, **options)
    params = optimizer.param_groups[0]["params"]
    run(optimizer, 0, 1)
    for state in optimizer.state.values():
        state["weight_sum"].fill_(1)
        state["step"].fill_(15)  # Triton's kernels look in one step of 16
    run(optimizer, 1, 3)
    launch = tracking.launches[-1]
    body = sum(launch.bytes_of(kind, name) for kind in ("ld", "st") for name in (*stored(amsgrad), "grad"))
    assert body == expected * sum(sizes)
    assert not any(launch.bytes_of(kind, "weight_sum") for kind in ("ld", "st"))
    assert (launch.buffers["saturation"].writes == 1).all()

    optimizer.state[params[0]]["weight_sum"][8192 + 77] = 0.75
    for state in optimizer.state.values():
        state["step"].fill_(15)
    run(optimizer, 3, 5)
    weight_sum = tracking.launches[-1].buffers["weight_sum0"]
    second = weight_sum.nbytes // 2
    assert not weight_sum.reads[:second].any()
    assert (weight_sum.reads[second:] == 1).all()


@pytest.mark.parametrize("absent", [{0}, {5}, {1, 2}, {0, 3, 4, 5}], ids=str)
def test_absent_gradient(absent, tracking):
    """Guards tensors without a gradient this time: nothing of theirs is mapped, so that a touch would raise, and their
    neighbours step as ever."""
    sizes = (9000, 5, 0, 8193, 700, 1)
    pair = with_twin(MAdam(make_params(sizes), backend=tracking.backend, **BASE, amsgrad=True))
    step_both(pair)
    for optimizer in pair:
        set_grads(optimizer.param_groups[0]["params"], 1)
        for i in absent:
            optimizer.param_groups[0]["params"][i].grad = None
        optimizer.step()
    assert_same_bits(*pair)
    launch = tracking.launches[-1]
    assert_each_byte_once(launch, [size for i, size in enumerate(sizes) if i not in absent], True)
    assert not {f"{name}{i}" for name in (*stored(True), "grad", "step") for i in absent} & launch.buffers.keys()
    assert [int(state["step"]) for state in pair[0].state.values()] == [2 - (i in absent) for i in range(len(sizes))]
    step_both(pair, 2)


def expected_widths(
    tensors: list[tuple[int, int]],
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    amsgrad: bool,
    master: bool = False,
) -> tuple[Counter[int], Counter[int]]:
    """{bytes of an access: number}, for loads and for stores, of tensors of (size, elements before the first packet's
    end); the latter -1: no packets."""
    loads, stores = Counter(), Counter()
    of_state = (state_dtype or (torch.float64 if param_dtype == torch.float64 else torch.float32)).itemsize
    width = 16 // min(param_dtype.itemsize, grad_dtype.itemsize, of_state)
    for numel, offset in tensors:
        shift = offset % width
        whole = max((shift + numel) // width - -(-shift // width), 0) if offset >= 0 else 0
        operands = [(param_dtype.itemsize, True), (grad_dtype.itemsize, False)] + [(of_state, True)] * (4 + amsgrad)
        operands += [(2, True)] * master
        for size, written in operands:
            for count in (loads, stores) if written else (loads,):
                count[16] += whole * width * size // 16
                count[size] += numel - whole * width
        stores[8] += 1  # the step count
    stores[4] += 1  # the ticket
    return +loads, +stores


def assert_widths(launch: Launch, tensors: list[tuple[int, int]], *variant) -> None:
    loads, stores = expected_widths(tensors, *variant)
    done = Counter(launch.stats.widths("ld"))
    done[4] -= (launch.bytes_of("ld", "chunk_rows") + launch.bytes_of("ld", "saturation")) // 4
    done[8] -= (launch.bytes_of("ld", "rows") + launch.bytes_of("ld", "step")) // 8
    assert +done == loads
    assert written(launch) == stores


def written(launch: Launch) -> Counter[int]:
    """{bytes of a store: number}, but for the chunks' stamps."""
    stores = Counter(launch.stats.widths("st"))
    stores[4] -= launch.bytes_of("st", "saturation") // 4
    return +stores


@EACH_DTYPE
@EACH_KERNEL
def test_aligned_tensors_move_in_packets_alone(algorithm, amsgrad, param_dtype, grad_dtype, state_dtype, tracking_cuda):
    """Guards the speed of what is common: with whole packets, not one narrow access."""
    sizes = (8, 2048, 8192, 8192 + 16, 3 * 8192)
    params = make_params(sizes, param_dtype)
    options = {**BASE, "amsgrad": amsgrad, "state_dtype": state_dtype}
    optimizer = algorithm(params, backend=tracking_cuda.backend, **options)
    set_grads(params, 0, dtype=grad_dtype)
    optimizer.step()
    variant = (param_dtype, grad_dtype, state_dtype, amsgrad)
    assert_widths(tracking_cuda.launches[0], [(size, 0) for size in sizes], *variant)
    size = max(param_dtype.itemsize, grad_dtype.itemsize)
    assert tracking_cuda.launches[0].stats.widths("st").keys() == {16, 8, 4}
    assert tracking_cuda.launches[0].stats.widths("st")[16] >= sum(sizes) * size // 16


@EACH_DTYPE
def test_views_of_flat_buffers_move_in_packets(param_dtype, grad_dtype, state_dtype, tracking_cuda):
    """Guards the shift: operands that begin at the same place of a packet, as views of flat buffers do (4, 8, 12 bytes
    behind it; for 16 bits 2, 4 ...), use packets for all but their two ends."""
    tensors = [(size, offset) for offset in (1, 2, 3, 9) for size in (1, 7, 8, 9, 700, 8191, 8192, 8193, 8192 + 15)]
    sizes = [size for size, _ in tensors]
    tracking_cuda.blocks = 48
    options = {**BASE, "state_dtype": state_dtype}
    pair = with_twin(MAdam(make_params(tuple(sizes), param_dtype), backend=tracking_cuda.backend, **options))
    for step in range(2):
        offsets = [dict.fromkeys((*stored(False), "grad"), offset) for _, offset in tensors]
        step_both(pair, step, grad_dtype, offsets=offsets)
    launch = tracking_cuda.launches[-1]  # the state of the first is not shifted yet
    assert_each_byte_once(launch, sizes, False)
    assert_widths(launch, tensors, param_dtype, grad_dtype, state_dtype, False)


MISALIGNED = [
    (torch.float32, torch.float32, None, (1, 2, 3)),
    (torch.bfloat16, torch.bfloat16, None, (1, 2, 3)),
    (torch.float16, torch.float32, None, (1, 2, 3)),
    (torch.bfloat16, torch.float16, None, (1, 6)),
    (torch.float64, torch.float64, None, (1,)),
    (torch.float32, torch.float32, torch.bfloat16, (1, 2)),
]


@pytest.mark.parametrize(("param_dtype", "grad_dtype", "state_dtype", "offsets"), MISALIGNED, ids=str)
def test_operands_that_differ_in_alignment(param_dtype, grad_dtype, state_dtype, offsets, tracking_cuda):
    """Guards each operand's part in the choice of packets: one that is alone out of step makes the tensor go element by
    element, with the same result; on a device, a packet there would be a fault."""
    each = [{name: offset} for name in (*stored(True), "grad") for offset in offsets]
    each += [{**dict.fromkeys((*stored(True), "grad"), 3), name: 4} for name in (*stored(True), "grad")]
    sizes = [(8193, 700, 1300)[i % 3] for i in range(len(each))]
    options = {**BASE, "amsgrad": True, "state_dtype": state_dtype}
    pair = with_twin(MAdam(make_params(tuple(sizes), param_dtype), backend=tracking_cuda.backend, **options))
    for step in range(2):
        step_both(pair, step, grad_dtype, offsets=each)
    launch = tracking_cuda.launches[-1]
    assert_each_byte_once(launch, sizes, True)
    assert_widths(launch, [(size, -1) for size in sizes], param_dtype, grad_dtype, state_dtype, True)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_masters_move_in_packets(state_dtype, tracking_cuda):
    """Guards the masters' accesses, wide where all operands agree on where packets begin, also if that is not where
    the tensor begins, and narrow where the master alone, or another, is out of step; each byte once."""
    names = (*stored(False, True), "grad")
    tensors = [(8192 + 16, 0), (8193, 1), (700, 5), (8193, -1), (700, -1), (9, 7)]
    offsets = [dict.fromkeys(names, offset) for _, offset in tensors]
    offsets[3:5] = [{"master": 1}, {"param": 1}]
    sizes = [size for size, _ in tensors]
    options = {**BASE, "state_dtype": state_dtype, "master_weights": True}
    pair = with_twin(MAdam(make_params(tuple(sizes), torch.bfloat16), backend=tracking_cuda.backend, **options))
    for step in range(2):
        step_both(pair, step, offsets=offsets)
    launch = tracking_cuda.launches[-1]
    assert_each_byte_once(launch, sizes, False, True)
    assert_widths(launch, tensors, torch.bfloat16, torch.bfloat16, state_dtype, False, True)


def test_what_has_no_maximum_may_lie_anywhere(tracking_cuda):
    """Guards a tensor without AMSGrad, whose null pointer has no say in the alignment, and which has no maximum to
    touch, among others with it."""
    groups = [{"params": make_params((700, 900), seed=g), "amsgrad": g == 1} for g in range(3)]
    pair = with_twin(MAdam(groups, backend=tracking_cuda.backend, **BASE))
    for step in range(2):
        step_both(pair, step, offsets=[dict.fromkeys((*stored(True), "grad"), 3)] * 6)
    launch = tracking_cuda.launches[-1]
    assert {name for name in launch.buffers if name.startswith("max_denom")} == {"max_denom2", "max_denom3"}
    stores = expected_widths([(700, 3), (900, 3)], *[torch.float32] * 2, None, True)[1]
    for _ in range(2):
        stores += expected_widths([(700, 3), (900, 3)], *[torch.float32] * 2, None, False)[1]
    stores[4] -= 2  # one ticket, not three
    assert written(launch) == stores
