"""The host's part of a step on a GPU: when its table is made anew, and what a launch is given.

On the simulator the tensors' memory is the device's, so all of it runs as on a GPU: only the launch itself is another.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from cases import ALGORITHMS, BASE, OPTIONS, assert_same_bits, make_params, run, set_grads, states
from torch.nn import Parameter

from maxva_kernels import MAdam, _ops, functional, gpu, gpu_ops
from maxva_kernels.backends.registry import select
from maxva_kernels.groups import MOMENTS, Group, Hyperparameters, Scaling, TensorLists
from maxva_kernels.launch import DTYPE_CODES, PACKED_GROUP
from maxva_kernels.tensor_table import StepTable

SHAPES = ((3, 5), 70, (2, 2, 2, 2))


@pytest.fixture(autouse=True)
def launcher(simulated):
    return simulated


class Pair:
    """The same run by the simulated GPU and by the CPU kernels, which must agree after every step."""

    def __init__(self, launcher, dtype=torch.float32, **options):
        options = {**BASE, **options}
        self.ours = MAdam(make_params(SHAPES, dtype), backend=launcher.backend, **options)
        self.theirs = MAdam(make_params(SHAPES, dtype), backend="cpu", **options)
        self.count = 0

    def both(self, change):
        for optimizer in (self.ours, self.theirs):
            change(optimizer)

    def step(self, without=()):
        """Steps, parameters whose index is in `without` having no gradient; gives how many tables that took."""
        made = gpu.step_tables.made
        for optimizer in (self.ours, self.theirs):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            set_grads(params, self.count)
            for i in without:
                params[i].grad = None
            optimizer.step()
        self.count += 1
        assert_same_bits(self.ours, self.theirs)
        return gpu.step_tables.made - made


@pytest.fixture
def pair(launcher):
    pair = Pair(launcher)
    assert pair.step() == 1
    return pair


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def test_one_table_for_a_run(pair, launcher):
    """Guards against a table per step, though gradients are allocated anew for each."""
    assert [pair.step() for _ in range(3)] == [0, 0, 0]
    assert len(launcher.launches) == 4


def test_gradients_come_and_go(pair):
    """Guards against a table that holds which parameters have gradients, and against steps of those that have none."""
    assert [pair.step(without) for without in ([0], [1, 2], [], [2])] == [0, 0, 0, 0]
    assert [state["step"].item() for state in pair.ours.state.values()] == [4, 4, 3]


def test_gradients_of_another_layout_come_and_go(launcher):
    """Guards against a gradient copied to the layout of another parameter, where one before it has none."""
    shapes = ((3, 5), (5, 4), (2, 3, 4))
    pair = [[Parameter(param.mT.contiguous().mT) for param in make_params(shapes)] for _ in range(2)]
    ours, theirs = (
        MAdam(params, **BASE, backend=backend) for params, backend in zip(pair, (launcher.backend, "cpu"), strict=True)
    )
    for step, without in enumerate(((), (0,), (1,))):
        for optimizer in (ours, theirs):
            set_grads(params_of(optimizer), step)
            for i, param in enumerate(params_of(optimizer)):
                param.grad = None if i in without else param.grad.contiguous()
            optimizer.step()
        assert_same_bits(ours, theirs)


def test_no_gradient_at_all(pair, launcher):
    """Guards against a launch, or a norm, of nothing."""
    launches = len(launcher.launches)
    pair.both(lambda optimizer: optimizer.zero_grad())
    pair.ours.max_grad_norm = 1.0
    pair.ours.step()
    assert len(launcher.launches) == launches


def test_parameter_that_joins_late(launcher):
    """Guards against a table that misses a parameter whose first gradient comes later; one new table, then none."""
    pair = Pair(launcher)
    assert [pair.step([1]), pair.step([1]), pair.step(), pair.step(), pair.step([1])] == [1, 0, 1, 0, 0]


def swap_storage(optimizer):
    param = params_of(optimizer)[1]
    param.data = param.data.clone()


def swap_state(optimizer):
    state = optimizer.state[params_of(optimizer)[2]]
    state["grad_var"] = state["grad_var"].clone()


def swap_step(optimizer):
    state = optimizer.state[params_of(optimizer)[2]]
    state["step"] = state["step"].clone()


def channels_last(optimizer):
    param = params_of(optimizer)[2]
    param.data = param.data.to(memory_format=torch.channels_last)


def reload(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def to_bfloat16(optimizer):
    param = params_of(optimizer)[0]
    param.data = param.data.to(torch.bfloat16)


def add_group(optimizer):
    optimizer.add_param_group({"params": make_params((9,), seed=3), "lr": 0.3})


def amsgrad(optimizer):
    optimizer.param_groups[0]["amsgrad"] = True


def view_of_the_same_memory(optimizer):
    """The address stays, the size does not."""
    param = params_of(optimizer)[1]
    param.data = param.data[:33]
    state = optimizer.state[param]
    for name, value in state.items():
        state[name] = value[:33] if value.dim() else value


def transposed_in_place(optimizer):
    """Address, size and dtype stay; the order of the elements does not."""
    param = params_of(optimizer)[0]
    param.data = param.data.t()
    state = optimizer.state[param]
    for name, value in state.items():
        state[name] = value.t() if value.dim() else value


CHANGES = [swap_storage, swap_state, swap_step, channels_last, reload, to_bfloat16, add_group, amsgrad]
CHANGES += [view_of_the_same_memory, transposed_in_place]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_the_table_holds_changes(pair, change):
    """Guards against a step on memory that is no longer the parameter's or the state's: one new table, then none."""
    pair.both(change)
    assert [pair.step(), pair.step()] == [1, 0]


def test_state_that_became_smaller(pair):
    """Guards against a kernel that reads beyond a state whose address has stayed."""
    state = pair.ours.state[params_of(pair.ours)[1]]
    state["grad_var"] = state["grad_var"][:33]
    set_grads(params_of(pair.ours), 9)
    with pytest.raises(RuntimeError, match=r"grad_vars\[1\] .*must have the shape"):
        pair.ours.step()


@pytest.mark.parametrize("trust_ratio", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_two_dtypes(dtypes, trust_ratio, launcher):
    """Guards float64 parameters, whose gradients are to be float64, among others; and trust ratios and norms of two
    launches, which each have a part of them."""
    runs = []
    for backend in (launcher.backend, "cpu"):
        params = [param for dtype in dtypes for param in make_params((70, 5), dtype)]
        optimizer = MAdam(params, **BASE, trust_ratio=trust_ratio, backend=backend)
        for step in range(2):
            set_grads(params, step, dtype=torch.float32)
            optimizer.step()
        runs.append(optimizer)
    assert_same_bits(*runs)


def test_parameters_change_groups(pair):
    """Guards against the hyperparameters of the group that a parameter has left."""

    def move_to_the_first_group(optimizer):
        first, second = optimizer.param_groups
        first["params"].append(second["params"].pop(0))

    def second_group(optimizer):
        optimizer.add_param_group({"params": make_params((9, 4), seed=3), "lr": 0.3, "beta1": 0.2})

    pair.both(second_group)
    pair.step()
    pair.both(move_to_the_first_group)
    assert [pair.step(), pair.step()] == [1, 0]


def swap_max(optimizer):
    state = optimizer.state[params_of(optimizer)[1]]
    optimizer.old = state["max_denom"]  # kept, so that a failure is no crash
    state["max_denom"] = optimizer.old.clone()


def swap_master(optimizer):
    state = optimizer.state[params_of(optimizer)[1]]
    optimizer.old = state["master"]
    state["master"] = optimizer.old.clone()


def other_seed(optimizer):
    optimizer.param_groups[0]["rounding_seed"] = 7


def float16_at_the_same_address(optimizer):
    """As where an allocator gives a new model the memory of one that is gone."""
    for param in params_of(optimizer):
        param.data = param.data.view(torch.float16)


def narrow_state_at_the_same_address(optimizer):
    optimizer.param_groups[0]["state_dtype"] = "bfloat16"
    for param in params_of(optimizer):
        state = optimizer.state[param]
        for name in MOMENTS:
            state[name] = state[name].flatten().view(torch.bfloat16)[: param.numel()].zero_().view(param.shape)


OF_OPTIONS = [
    (swap_max, {"amsgrad": True}),
    (swap_master, {"master_weights": True}),
    (other_seed, {"stochastic_rounding": True}),
    (float16_at_the_same_address, {}),
    (narrow_state_at_the_same_address, {"stochastic_rounding": True}),
]


@pytest.mark.parametrize(("change", "options"), OF_OPTIONS, ids=lambda value: getattr(value, "__name__", None))
def test_what_the_table_holds_with_options_changes(change, options, launcher):
    """Guards against a step on freed memory, by another dtype or by other random numbers: of what a table holds only
    with an option, or knows only by an address that stays."""
    pair = Pair(launcher, torch.bfloat16, **options)
    assert pair.step() == 1
    pair.both(change)
    assert [pair.step(), pair.step()] == [1, 0]


def test_changes_that_need_no_table(pair):
    """Guards against tables made for what travels with the launch."""

    def change(optimizer):
        optimizer.param_groups[0].update(lr=0.5, beta1=0.2, weight_decay=0.3, maximize=True, eps_mode="adam")
        optimizer.max_grad_norm = 2.0

    pair.both(change)
    assert pair.step() == 0


def test_known_tensors_are_not_checked_again(monkeypatch, launcher):
    """Guards the host's time: a table is checked once, also where a rank's part of a gradient has no elements."""
    params = make_params((3, 0, 5))
    optimizer = MAdam(params, backend=launcher.backend, max_grad_norm=1.0, **BASE)
    run(optimizer, 0, 1)
    monkeypatch.setattr(gpu.checks, "check_groups", lambda groups: pytest.fail("checked again"))
    run(optimizer, 1, 3)
    params[0].grad = None
    optimizer.step()


def test_optimizers_take_turns(launcher):
    """Guards against one optimizer's table driving out another's, as with two networks trained in turns."""
    pairs = [Pair(launcher), Pair(launcher)]
    assert [pair.step() for pair in pairs * 3] == [1, 1, 0, 0, 0, 0]


def test_room_is_limited(monkeypatch, launcher):
    """Guards against tables kept for ever, against a table that is gone and not made again, and against the loss of one
    that was used a moment ago, which a kernel may be about to read."""
    pairs = [Pair(launcher), Pair(launcher), Pair(launcher)]
    assert pairs[0].step() == 1
    monkeypatch.setattr(gpu, "step_tables", type(gpu.step_tables)(room=2 * gpu.step_tables._taken))
    assert [pair.step() for pair in pairs + pairs] == [1] * 6
    assert [pairs[2].step(), pairs[1].step(), pairs[2].step(), pairs[0].step(), pairs[2].step()] == [0, 0, 0, 1, 0]
    assert [pairs[1].step(), pairs[2].step()] == [1, 0]


def test_new_addresses_in_each_step(launcher, monkeypatch):
    """Guards against a table kept for each step of a run whose state goes to the host and back in between, and with it
    the memory that stands in for an operand of other strides."""
    moved = []  # and kept, so that each has an address of its own

    def move(optimizer):
        state = optimizer.state[params_of(optimizer)[0]]
        state["exp_avg"] = state["exp_avg"].t().clone(memory_format=torch.contiguous_format).t()
        moved.append(state["exp_avg"])

    pair = Pair(launcher)
    pair.step()
    monkeypatch.setattr(gpu, "step_tables", type(gpu.step_tables)())
    pair.both(move)
    assert pair.step() == 1
    room = 5 * gpu.step_tables._taken // 2
    monkeypatch.setattr(gpu, "step_tables", type(gpu.step_tables)(room))
    for _ in range(5):
        pair.both(move)
        assert pair.step() == 1
        assert gpu.step_tables._taken <= room
    assert len(gpu.step_tables._tables) == 2


def test_largest_table_is_kept(launcher, monkeypatch):
    """Guards against a table made anew in each step because it alone is larger than the room for all."""
    monkeypatch.setattr(gpu, "step_tables", type(gpu.step_tables)(room=0))
    pairs = [Pair(launcher), Pair(launcher)]
    assert [pair.step() for pair in (pairs[0], pairs[0], pairs[1], pairs[1])] == [1, 0, 1, 0]
    assert len(gpu.step_tables._tables) == 1


def test_table_holds_no_tensors(pair):
    """Guards against a cache that keeps a dead model's memory."""
    import weakref

    watched = [weakref.ref(param) for param in params_of(pair.ours)]
    watched += [weakref.ref(value) for state in pair.ours.state.values() for value in state.values()]
    pair.ours = None
    gc.collect()
    assert not any(reference() for reference in watched)


def test_norm_tables_depend_on_sizes_only(launcher):
    """Guards against a table of the norm for each set of gradients."""
    grads = [torch.randn(n) for n in (70, 40_000, 3)]
    first = gpu.norm_tables.made
    optimizer = MAdam([Parameter(torch.randn(n)) for n in (70, 40_000, 3)], backend=launcher.backend, max_grad_norm=1.0)
    run(optimizer, last=3)
    assert gpu.norm_tables.made == first + 1
    assert torch.equal(
        functional.grad_norm(grads, backend=launcher.backend), functional.grad_norm(grads, backend="cpu")
    )
    assert gpu.norm_tables.made == first + 1


def test_launches(launcher):
    """Guards against a launch for each tensor or group: one for the step, two for the norm, whatever the modes."""
    params = make_params(range(1, 30))
    groups = [{"params": params[i::3], **extra} for i, extra in enumerate(({}, {"amsgrad": True}, OPTIONS["l2"]))]
    optimizer = MAdam(groups, **BASE, backend=launcher.backend, max_grad_norm=1.0)
    run(optimizer, last=1)
    assert [launch.kernel.split("<")[0] for launch in launcher.launches] == [
        "norm_chunks_kernel",
        "norm_total_kernel",
        "step_kernel",
    ]


def test_launches_tell_of_maxima_and_masters(launcher, monkeypatch):
    """Guards against kernels that have registers for what no tensor of theirs has, or none for what one has."""
    told = {}
    step = type(launcher).step

    def watch(self, launch):
        told[launch.param_dtype, launch.state_dtype] = launch.amsgrad, launch.masters
        step(self, launch)

    monkeypatch.setattr(type(launcher), "step", watch)
    float32, bfloat16, float16 = (
        make_params((3, 40), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
    groups = [
        *({"params": float32[:1]}, {"params": float32[1:], "amsgrad": True}),
        *({"params": bfloat16[:1]}, {"params": bfloat16[1:], "master_weights": True}),
        {"params": float16, "master_weights": True},  # whole ones, which are the parameters here
    ]
    run(MAdam(groups, **BASE, backend=launcher.backend), last=1)
    codes = {dtype: DTYPE_CODES[dtype] for dtype in (torch.float32, torch.bfloat16)}
    assert told == {
        (codes[torch.float32], codes[torch.float32]): (True, False),
        (codes[torch.bfloat16], codes[torch.float32]): (False, True),
    }


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_default_device_makes_no_difference(max_grad_norm, launcher):
    """Guards host tensors made where torch.set_default_device says."""
    pair = Pair(launcher, max_grad_norm=max_grad_norm)
    for optimizer in (pair.ours, pair.theirs):
        set_grads(params_of(optimizer), 0)
        with torch.device("meta"):
            optimizer.step()
    assert_same_bits(pair.ours, pair.theirs)


def test_norm_tables_and_streams(launcher, monkeypatch):
    """Guards against a norm that reads a table whose copy another stream has yet to make, against a table for each
    stream, and against a capture refused, or broken by a wait, because its stream is not that of the steps before it:
    torch.cuda.graph captures on a stream of its own."""
    streams, waits = [11], []
    monkeypatch.setattr(gpu, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(gpu, "record_event", lambda device: f"table of {streams[-1]}")
    monkeypatch.setattr(gpu, "wait_event", lambda event, device: waits.append((streams[-1], event)))
    monkeypatch.setattr(gpu, "record_use", lambda memory: None)
    pair = Pair(launcher, max_grad_norm=1.0, skip_nonfinite=True)
    pair.step()
    pair.step()
    assert waits == []
    streams.append(22)
    pair.step()
    assert waits == [(22, "table of 11")]
    streams.append(33)
    monkeypatch.setattr(gpu, "is_capturing", lambda: True)
    pair.step()
    assert len(waits) == 1
    assert gpu.norm_tables.made == 1


def test_tables_and_their_last_use(launcher, monkeypatch):
    """Guards against a table whose memory, once it is dropped, PyTorch gives to somebody else while a launch on another
    stream has yet to read it; on the stream that it was made on, one comes after the other anyway."""
    streams, used = [11], []
    monkeypatch.setattr(gpu, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(gpu, "wait_event", lambda event, device: None)
    monkeypatch.setattr(gpu, "record_use", lambda memory: used.append(memory.data_ptr()))
    params = make_params(((3, 5), 70)) + make_params((9,), torch.float64)
    optimizer = MAdam(params, **BASE, backend=launcher.backend, max_grad_norm=1.0)
    run(optimizer, last=1)
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].t().contiguous().t()
    run(optimizer, first=1, last=3)
    assert used == []
    streams.append(22)
    run(optimizer, first=3, last=4)
    (step, norm) = (cache._latest[1] for cache in (gpu.step_tables, gpu.norm_tables))
    held = [tensor.data_ptr() for table in (norm, step) for tensor in table.memory()]
    assert used == held
    assert len(held) == 2 + 2 * 2 + 1  # two segments each, the step's with their indices, and the stand-in
    streams.append(33)
    monkeypatch.setattr(gpu, "is_capturing", lambda: True)
    run(optimizer, first=4, last=5)
    assert len(used) == len(held)


# --- CUDA graphs: what can be tested without one --------------------------------------------------------------------


def test_new_tensors_in_a_capture_are_refused(pair, monkeypatch):
    """Guards against a copy from host memory captured in a graph, which would read it at every replay."""
    before = {name: value.clone() for name, value in states(pair.ours)}
    swap_storage(pair.ours)
    monkeypatch.setattr(gpu, "is_capturing", lambda: True)
    set_grads(params_of(pair.ours), 9)
    with pytest.raises(RuntimeError, match="side stream before the capture"):
        pair.ours.step()
    assert all(torch.equal(before[name], value) for name, value in states(pair.ours))


def test_norm_of_new_gradients_in_a_capture_is_refused(launcher, monkeypatch):
    """Guards against the same copy for a norm, and against a norm's table dropped while a graph still reads it."""
    grads = [torch.randn(70), torch.randn(3)]
    functional.grad_norm(grads, backend=launcher.backend)
    monkeypatch.setattr(gpu, "is_capturing", lambda: True)
    functional.grad_norm(grads, backend=launcher.backend)
    (table,) = gpu.norm_tables._kept.values()
    assert [table] == list(gpu.norm_tables._tables.values())
    with pytest.raises(RuntimeError, match="side stream before the capture"):
        functional.grad_norm(grads[:1], backend=launcher.backend)


def test_captured_tables_are_kept(pair, monkeypatch):
    """Guards against a table dropped while a graph still reads it."""
    cache = gpu.step_tables
    monkeypatch.setattr(gpu, "is_capturing", lambda: True)
    pair.step()
    ((_, table),) = cache._tables.items()
    monkeypatch.setattr(gpu, "is_capturing", lambda: False)
    for i in range(3):
        cache._room = 1
        cache.find((i,), StepTable, False)
    assert table not in cache._tables.values()
    assert table in cache._kept.values()


def test_every_captured_table_is_kept(launcher, monkeypatch):
    """Guards against a second graph's table kept in place of the first one's."""
    pairs = [Pair(launcher), Pair(launcher)]
    assert [pair.step() for pair in pairs] == [1, 1]
    monkeypatch.setattr(gpu, "is_capturing", lambda: True)
    assert [pair.step() for pair in pairs] == [0, 0]
    kept = {id(table) for table in gpu.step_tables._kept.values()}
    assert kept == {id(table) for table in gpu.step_tables._tables.values()}
    assert len(kept) == 2


def test_what_captured_launches_read_is_kept(launcher, monkeypatch):
    """Guards against replays that read freed memory: the learning rate that was the group's at the capture, and the
    stamps of an optimizer that is gone."""
    optimizer = run(MAdam(make_params(SHAPES), **BASE, capturable=True, backend=launcher.backend))
    launches, step = [], launcher.step
    monkeypatch.setattr(launcher, "step", lambda launch: (launches.append(launch), step(launch)))
    monkeypatch.setattr(gpu, "is_capturing", lambda: True)
    monkeypatch.setattr(gpu, "_captured", [])
    run(optimizer, 4, 5)
    kept = {tensor.data_ptr() for tensor in gpu._captured}
    for launch in launches:
        assert launch.saturation in kept
        assert {rate for _, rate, *_ in PACKED_GROUP.iter_unpack(launch.groups)} <= kept


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_capturable_gives_the_same_bits(algorithm, dtype, launcher):
    """Guards against a learning rate on the device that is rounded otherwise, or not followed by its schedule."""
    runs = []
    for capturable in (False, True):
        params = make_params(SHAPES, dtype=dtype)
        optimizer = algorithm(params, **BASE, capturable=capturable, backend=launcher.backend)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        rate = optimizer.param_groups[0]["lr"]
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            schedule.step()
        if capturable:
            assert optimizer.param_groups[0]["lr"] is rate, "a graph reads it where it was"
        runs.append(optimizer)
    assert_same_bits(*runs)


def test_capturable_and_checkpoints(launcher):
    """Guards against a learning rate left as a float by a checkpoint where a graph reads a tensor, or the reverse."""
    plain = run(MAdam(make_params(SHAPES), **BASE, backend=launcher.backend))
    capturable = run(MAdam(make_params(SHAPES), **BASE, capturable=True, backend=launcher.backend))
    saved = copy.deepcopy(plain.state_dict()), copy.deepcopy(capturable.state_dict())
    plain.load_state_dict(saved[1])
    capturable.load_state_dict(saved[0])
    assert isinstance(capturable.param_groups[0]["lr"], torch.Tensor)
    run(plain, 4, 6)
    run(capturable, 4, 6)
    assert_same_bits(plain, capturable)


# --- operators -------------------------------------------------------------------------------------------------------


def test_operator_on_gpu_tensors(launcher):
    """Guards against groups, maxima or modes mixed up where the operator's lists are divided again."""
    from test_ops import step_arguments

    results = []
    for call in (gpu_ops.step_, torch.ops.maxva.step_.default):
        lists, options = step_arguments(amsgrad=True)
        call(*lists, **options)
        results.append([tensor for tensors in lists for tensor in tensors])
    assert len(launcher.launches) == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    grads = [torch.randn(30), torch.randn(4, 4)]
    assert torch.equal(gpu_ops.grad_norm(grads), torch.ops.maxva.grad_norm.default(grads))


def test_operator_tells_norms_and_takes_ratios(launcher, monkeypatch):
    """Guards a compiled step by trust ratios: norms that are not handed back would make every ratio 1."""
    runs = []
    for call in (gpu_ops.step_, _ops.step_):
        monkeypatch.setattr(_ops, "step_", call)
        optimizer = MAdam(make_params(SHAPES), **BASE, trust_ratio=True, max_grad_norm=1.0, backend="cpu")
        runs.append(run(optimizer, last=2))
    assert {launch.kernel.split("<")[0] for launch in launcher.launches} >= {"step_kernel", "update_total_kernel"}
    assert_same_bits(*runs)


def test_operator_divides_keys_and_records(launcher, monkeypatch):
    """Guards against the random numbers of another group's parameters, and records that one launch writes over those
    of the one before."""
    runs = []
    for call in (gpu_ops.step_, _ops.step_):
        monkeypatch.setattr(_ops, "step_", call)
        groups = [{"params": make_params((70, 9000), dtype)} for dtype in (torch.float32, torch.bfloat16)]
        optimizer = MAdam(groups, **BASE, state_dtype=torch.bfloat16, collect_statistics=True, backend="cpu")
        runs.append(run(optimizer, last=2))
    assert len(launcher.launches) == 4
    assert_same_bits(*runs)
    ours, theirs = (optimizer.statistics().groups for optimizer in runs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"trust_ratio": True}, {"collect_statistics": True}], ids=str
)
def test_compiled_step_is_one_graph(options, launcher):
    """Guards against addresses taken while a graph is traced: a compiled step must be the operator's call, whole, also
    where a parameter has no gradient this time and where the step is asked what it did."""
    runs = []
    for compiled in (True, False):
        params = make_params(SHAPES)
        optimizer = MAdam(params, **BASE, **options, backend=launcher.backend)
        run(optimizer, last=1)
        launches = len(launcher.launches)
        set_grads(params, 1)
        params[1].grad = None
        (torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step)()
        assert (len(launcher.launches) > launches) != compiled  # on CPU tensors the operator is the CPU's
        runs.append(optimizer)
    assert_same_bits(*runs)
    if "collect_statistics" in options:
        ours, theirs = (optimizer.statistics().overall for optimizer in runs)
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_gradients_on_another_device(launcher):
    """Guards against an address of other memory given to a kernel."""
    params = [torch.zeros(3) for _ in range(2)]
    zeros = [[torch.zeros(3) for _ in range(2)] for _ in range(4)]
    lists = TensorLists(params, [torch.ones(3), torch.ones(3, device="meta")], *zeros)
    lists.steps = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    group = Group(Hyperparameters(lr=0.1, beta1=0.9, beta2_range=(0.5, 0.9), eps=1e-8, weight_decay=0.0), lists)
    with pytest.raises(RuntimeError, match=r"grads\[1\] .*meta.* must be on the device"):
        select(launcher.backend, torch.device("cpu")).step([group], False, Scaling())
    assert all((tensor == 0).all() for tensor in [*params, *lists.steps])
