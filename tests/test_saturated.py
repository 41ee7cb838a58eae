"""Where w is 1 the kernels take short cuts (csrc/cpu/kernels.inc, Note [Saturated blocks], and csrc/saturation.h, Note
[Saturated chunks]) that must change no bit."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    ALGORITHMS,
    BASE,
    OPTIONS,
    assert_same_bits,
    backend_params,
    bits,
    device_of,
    make_params,
    needs_cpu_kernels,
    no_number,
    params_of,
    run,
    set_grads,
    through_file,
)
from twins import at_offset, step_both, with_twin

from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.groups import MOMENTS
from maxva_kernels.saturation import Saturation

pytestmark = needs_cpu_kernels

COUNT = 9000  # two whole blocks of the largest kind, and a part
SPECIAL = (torch.nan, torch.inf, -torch.inf, 3e38, 1e-42, 0.0)
# A trust ratio and a clip look at all elements, and so at those in which the runs differ.
LOCAL = {
    name: {**option, "trust_ratio": False, "max_grad_norm": None}
    for name, option in OPTIONS.items()
    if name not in ("trust_ratio", "clip")
}
KINDS = [
    (torch.float32, None, {}),
    (torch.float64, None, {}),
    (torch.float16, None, {}),
    (torch.float32, torch.bfloat16, {}),
    (torch.bfloat16, torch.bfloat16, {}),
    (torch.bfloat16, None, {"master_weights": True}),
    (torch.bfloat16, torch.bfloat16, {"stochastic_rounding": True}),
]


def ran(algorithm, dtype, options, different):
    """Parameter and state after two steps from a state in which w is 1, but not at the places ``different``."""
    (param,) = make_params((COUNT,), dtype)
    optimizer = algorithm([param], **{**BASE, **options}, backend="cpu")
    set_grads([param], 0)
    optimizer.step()
    optimizer.state[param]["weight_sum"].fill_(1)
    optimizer.state[param]["weight_sum"][different] = 0.75
    for step in (1, 2):
        set_grads([param], step)
        param.grad[7 : 7 + len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64).to(param.dtype)
        optimizer.step()
    return {"param": param.detach(), **optimizer.state[param]}


@pytest.mark.parametrize(("dtype", "state_dtype", "extra"), KINDS, ids=str)
@pytest.mark.parametrize("option", LOCAL)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_bits_in_any_company(algorithm, option, dtype, state_dtype, extra):
    """Guards the loop that has 1 in place of w: an element's step is the same in a block that is saturated, in one
    that is not, and in one that is but for its first or last element."""
    options = {**LOCAL[option], "state_dtype": state_dtype, **extra}
    everywhere = ran(algorithm, dtype, options, slice(0, 0))
    assert (everywhere["weight_sum"] == 1).all()
    for different in (slice(100, None, 300), slice(0, None, 512), slice(511, None, 512), slice(4095, None, 4096)):
        among = ran(algorithm, dtype, options, different)
        same = torch.ones(COUNT, dtype=torch.bool)
        same[different] = False
        assert (among["weight_sum"][~same] != 1).all()
        for name, value in everywhere.items():
            if name != "step":
                ours, theirs = (bits(no_number(name, each))[same] for each in (value, among[name]))
                assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("dtype", "state_dtype", "extra"), KINDS[:2] + KINDS[3:], ids=str)
def test_on_gpus(dtype, state_dtype, extra, simulated):
    """Guards the stores that are left out there: with w at 1 everywhere, nowhere, in parts of packets and of chunks."""
    params = make_params((8193, 700, 8, 33), dtype)
    pair = with_twin(MAdam(params, **BASE, backend=simulated.backend, state_dtype=state_dtype, **extra))
    step_both(pair)
    for optimizer in pair:
        for i, state in enumerate(optimizer.state.values()):
            w = state["weight_sum"]
            w[w.numel() // 3 :] = 1
            w[(w.numel() + i) // 2 :: 13 + i] = 0.75
    for step in (1, 2):
        step_both(pair, step)


class Reading(Saturation):
    """Has every w read."""

    def stamps(self, weight_sums):
        return None


def saturated(algorithm=MAdam, backend="cpu", sizes=(8193, 700, 0, 3 * 8192), **options):
    """An optimizer whose w are 1, and whose stamps say so."""
    optimizer = algorithm(make_params(sizes, device=device_of(backend)), **{**BASE, **options}, backend=backend)
    run(optimizer, 0, 1)
    saturate(optimizer)
    return run(optimizer, 1, 2)


def saturate(optimizer):
    """Sets all w to 1, before a step in which the Triton kernels, too, look for others: those look in one of 16."""
    for state in optimizer.state.values():
        state["weight_sum"].fill_(1)
        state["step"].fill_(15)


def reading(optimizer):
    """A copy that reads every w."""
    twin = copy.deepcopy(optimizer)
    twin._saturation = Reading()
    return twin


def assert_steps_alike(optimizer, twin, first=2, last=4):
    for step in range(first, last):
        run(optimizer, step, step + 1)
        run(twin, step, step + 1)
        assert_same_bits(optimizer, twin)


def assert_unread(optimizer, place):
    """A step neither reads nor writes that element of the first w, which was 1: nothing tells it of a change."""
    twin = copy.deepcopy(optimizer)
    w = next(iter(optimizer.state.values()))["weight_sum"]
    w.data[place] = 0.25
    run(optimizer, 2, 3)
    run(twin, 2, 3)
    assert w[place] == 0.25
    w.data[place] = 1
    assert_same_bits(optimizer, twin)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_saturated_weights_are_not_read(algorithm, state_dtype):
    """Guards that the stamps do what they are for: an element that changes behind everybody's back goes unnoticed, in
    the first chunk and in the last, which is a part."""
    assert_unread(saturated(algorithm, state_dtype=state_dtype), 77)
    assert_unread(saturated(algorithm, state_dtype=state_dtype), 8192)


def test_stamps_survive_absent_gradients_and_overflows():
    """Guards what does not step, and so must neither make a stamp nor need one anew."""
    optimizer = saturated()
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    run(optimizer, 2, 3)
    del optimizer.grad_scale, optimizer.found_inf
    assert_unread(optimizer, 8192)


def changed_visibly(optimizer):
    for state in optimizer.state.values():
        state["weight_sum"][1::50] = 0.75


def changed_through_a_view(optimizer):
    for state in optimizer.state.values():
        state["weight_sum"].view(-1)[1::50].mul_(0.5)


def replaced(optimizer):
    """By a tensor that was written as often as the one before, which lives on."""
    optimizer.kept = [state["weight_sum"] for state in optimizer.state.values()]
    for state, old in zip(optimizer.state.values(), optimizer.kept, strict=True):
        state["weight_sum"] = torch.full_like(old, 0.5).add_(0.25)
        assert state["weight_sum"]._version == old._version


def replaced_where_it_was(optimizer):
    """By a tensor that was written as often and has the identity of the one before, which is gone."""
    for state in optimizer.state.values():
        like, version, identity = torch.empty_like(state["weight_sum"]), state["weight_sum"]._version, None
        wanted = id(state.pop("weight_sum"))
        others = []
        while identity != wanted and len(others) < 1000:
            made = torch.full_like(like, 0.5).add_(0.25)
            identity = id(made)
            others.append(made)
        assert identity == wanted
        assert made._version == version
        state["weight_sum"] = made


def rewound_invisibly(optimizer):
    """As tools do that copy a checkpoint into what is there: through `.data`, which no counter tells."""
    for state in optimizer.state.values():
        state["weight_sum"].data[1::50] = 0.75
        state["step"].data -= 1


def went_on_elsewhere(optimizer):
    """As a graph that is replayed: the count has moved, and what it was about as well."""
    for state in optimizer.state.values():
        state["weight_sum"].data[1::50] = 0.75
        state["step"].data += 1


def said(write):
    """An invisible write, after which the optimizer is told by the call that its docstring has for that."""

    def intervene(optimizer):
        for state in optimizer.state.values():
            write(state["weight_sum"])
            torch.autograd.graph.increment_version(state["weight_sum"])

    intervene.__name__ = write.__name__
    return intervene


def written_through_data_and_said(weight_sum):
    weight_sum.data[1::50] = 0.75


def written_through_dlpack_and_said(weight_sum):
    torch.from_dlpack(weight_sum)[1::50] = 0.75


def loaded(optimizer):
    saved = through_file(optimizer.state_dict())
    for state in saved["state"].values():
        state["weight_sum"][1::50] = 0.75
    optimizer.load_state_dict(saved)


def stepped_by_another_backend(optimizer):
    """Which has w as it finds it, and writes it by other means."""
    changed_visibly(optimizer)
    before, optimizer.backend = optimizer.backend, "reference"
    run(optimizer, 5, 6)
    optimizer.backend = before


def resized(optimizer):
    """By assignment, which neither counters nor identity tell."""
    for param, state in optimizer.state.items():
        for tensor in (param, *(state[name] for name in MOMENTS)):
            tensor.data = tensor.data.repeat(3)


def joined_by_another(optimizer):
    optimizer.add_param_group({"params": make_params((9000,), device=params_of(optimizer)[0].device, seed=1)})


INTERVENTIONS = [
    changed_visibly,
    changed_through_a_view,
    replaced,
    replaced_where_it_was,
    rewound_invisibly,
    went_on_elsewhere,
    *map(said, (written_through_data_and_said, written_through_dlpack_and_said)),
    loaded,
    stepped_by_another_backend,
    resized,
    joined_by_another,
]


@pytest.mark.parametrize("intervention", INTERVENTIONS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("backend", backend_params(oracle=False))
def test_stamps_end_with_what_they_are_about(backend, intervention):
    """Guards against the w of another state taken for 1: whatever changes it, the steps that follow are those of an
    optimizer that reads them all."""
    optimizer = saturated(backend=backend, sizes=(8193, 700))
    intervention(optimizer)
    assert_steps_alike(optimizer, reading(optimizer), 2, 5)


@pytest.mark.parametrize("backend", backend_params(oracle=False))
def test_every_step_has_a_stamp_of_its_own(backend):
    """Guards against a step whose number, cut to a stamp's bits, is that of a chunk of which nothing is known: step
    2^29 took every w for 1."""
    for count in (2**29 - 1, 2**31 - 1, 2**32 - 1):
        optimizer = run(MAdam(make_params((700,), device=device_of(backend)), **BASE, backend=backend), 0, 1)
        next(iter(optimizer.state.values()))["step"].fill_(count)
        assert_steps_alike(optimizer, reading(optimizer), 1, 3)


@pytest.mark.parametrize("backend", backend_params(oracle=False))
def test_each_chunk_saturates_by_itself(backend):
    """Guards the stamps' places: among groups, dtypes, sizes, absent gradients, and chunks in which one w is not 1,
    each is its own chunk's."""
    groups = [
        {"params": make_params((3 * 8192, 5), device=device_of(backend)), "lr": 0.2},
        {"params": make_params((0, 8193, 2 * 8192 + 1), torch.bfloat16, device_of(backend), seed=1)},
    ]
    optimizer = LaMAdam(groups, **{**BASE, "beta2_range": (0.5, 0.6)}, backend=backend)
    run(optimizer, 0, 1)
    saturate(optimizer)
    params = params_of(optimizer)
    for param, place in ((params[0], 8192), (params[0], 3 * 8192 - 1), (params[3], 0), (params[4], 8191)):
        optimizer.state[param]["weight_sum"][place] = 0.75
    twin = reading(optimizer)
    for step in range(1, 5):
        for each in (optimizer, twin):
            set_grads(params_of(each), step)
            if step == 3:
                params_of(each)[0].grad = params_of(each)[3].grad = None
            each.step()
        assert_same_bits(optimizer, twin)


def test_chunks_are_cut_where_packets_begin(simulated):
    """Guards the shift in a stamp: operands that begin elsewhere in a packet move the chunks' ends, and with them an
    element that is not saturated into a chunk that was."""
    optimizer = saturated(backend=simulated.backend, sizes=(2 * 8192,))
    (param,) = params_of(optimizer)
    state = optimizer.state[param]
    state["weight_sum"][8190] = 0.75
    state["step"].fill_(15)
    twin = reading(optimizer)
    twin.backend = "cpu"
    for step, shift in enumerate((0, 3, 0, 2, 1)):
        for each in (optimizer, twin):
            set_grads(params_of(each), step)
        for tensor in (param, param.grad, *(state[name] for name in MOMENTS)):
            tensor.data = at_offset(tensor, shift)
        optimizer.step()
        twin.step()
        assert_same_bits(optimizer, twin)


def test_strided_weights(simulated):
    """Guards operands that are copied into their parameter's order for a step: their chunks are not the copy's."""
    for backend in ("cpu", simulated.backend):
        param = torch.nn.Parameter(make_params((150 * 150,))[0].detach().view(150, 150))
        optimizer = MAdam([param], **BASE, backend=backend)
        run(optimizer, 0, 1)
        saturate(optimizer)
        w = optimizer.state[param]["weight_sum"]
        optimizer.state[param]["weight_sum"] = w.t().contiguous().t()
        run(optimizer, 1, 3)
        optimizer.state[param]["weight_sum"].data[3, 4] = 0.75
        assert_steps_alike(optimizer, reading(optimizer), 3, 5)
