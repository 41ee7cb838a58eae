"""State in bfloat16: a step in float32 whose moments are then rounded stochastically, by numbers to be repeated."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    ALGORITHMS,
    BASE,
    OPTIONS,
    SIZES,
    assert_same_bits,
    backend_params,
    bits,
    device_of,
    make_params,
    needs_cpu_kernels,
    params_of,
    run,
    set_grads,
    states,
    through_file,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import maxva_kernels.convert
from maxva_kernels import LaMAdam, MAdam, functional, rounding
from maxva_kernels.convert import to_state_dtype
from maxva_kernels.groups import MOMENTS, STATE_DTYPES

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import narrow_state

BF16 = torch.bfloat16
BACKENDS = backend_params()


def as_float32(optimizer):
    """A copy that keeps its state in float32: exactly the same values."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        group["state_dtype"] = None
    for entries in twin.state.values():
        for name in entries:
            if name != "step":
                entries[name] = entries[name].float()
    return twin


def rounded(optimizer, seed=0):
    """What the state of a float32 optimizer is in bfloat16, in memory's order: by name and parameter."""
    expected = {}
    for number, param in enumerate(params_of(optimizer)):
        entries = optimizer.state[param]
        key = rounding.tensor_key(seed, number)
        random = rounding.random_bits(key, int(entries["step"]), torch.arange(param.numel()))
        for name, its in zip(MOMENTS, random, strict=False):
            expected[name, number] = rounding.round_stochastically(flat(entries[name]), its)
        if "max_denom" in entries:
            expected["max_denom", number] = flat(entries["max_denom"]).bfloat16()
    return expected


def flat(tensor):
    """In memory's order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def assert_is_rounded_step(optimizer, step, dtype=None, **scaling):
    """One step of an optimizer with 16-bit state is one in float32 from the same values, rounded: bit for bit."""
    twin = as_float32(optimizer)
    for each in (optimizer, twin):
        set_grads(params_of(each), step, dtype=dtype)
        for name, value in scaling.items():
            setattr(each, name, value)
        each.step()
    expected = rounded(twin, optimizer.param_groups[0]["rounding_seed"])
    for number, (ours, theirs) in enumerate(zip(params_of(optimizer), params_of(twin), strict=True)):
        assert torch.equal(bits(ours.detach()), bits(theirs.detach())), number
        for name in (*MOMENTS, "max_denom")[: 4 + ("max_denom" in optimizer.state[ours])]:
            value = optimizer.state[ours][name]
            assert value.dtype == BF16
            assert torch.equal(bits(flat(value)), bits(expected[name, number])), (name, number)


# --- the step --------------------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize("grad_dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("param_dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_is_a_step_in_float32_rounded(algorithm, option, param_dtype, grad_dtype):
    """Guards the conversions in and out of the kernel's blocks, each moment's own random numbers, what is stored for
    which element, and that no option works on other values than these."""
    params = make_params(SIZES, dtype=param_dtype)
    optimizer = algorithm(params, **{**BASE, **OPTIONS[option]}, state_dtype=BF16, rounding_seed=7, backend="cpu")
    for step in range(4):
        assert_is_rounded_step(optimizer, step, dtype=grad_dtype)


@needs_cpu_kernels
def test_elements_are_numbered_in_memory():
    """Guards against numbers by another order than the kernel's walk, or than the tensor lies in."""
    base = torch.arange(60.0).reshape(3, 4, 5)
    params = [torch.nn.Parameter(base.permute(order).clone()) for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))]
    params += [torch.nn.Parameter(base.permute(2, 1, 0).contiguous().permute(2, 1, 0))]
    optimizer = MAdam(params, state_dtype=BF16, backend="cpu")
    reference = MAdam(copy.deepcopy(params), state_dtype=BF16, backend="reference")
    for step in range(3):
        assert_is_rounded_step(optimizer, step)
        set_grads(params_of(reference), step)
        reference.step()
    for ours, theirs in zip(params, params_of(reference), strict=True):
        mine, other = optimizer.state[ours], reference.state[theirs]
        assert (mine["exp_avg"] == other["exp_avg"]).float().mean() > 0.98


@needs_cpu_kernels
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reference_agrees(algorithm):
    """Guards the oracle's rounding: from one state both land on the same bfloat16, but where float32 and float64 lie on
    either side of the threshold, one in 2^16 / ulps times; there on the neighbour."""
    optimizer = run(algorithm(make_params((4097,)), **BASE, state_dtype=BF16, backend="cpu"), 0, 5)
    twin = copy.deepcopy(optimizer)
    twin.backend = "reference"
    for each in (optimizer, twin):
        run(each, 5, 6)
    for (name, value), (_, other) in zip(states(optimizer), states(twin), strict=True):
        if value.dtype == BF16:
            ulps = (bits(value).int() - bits(other).int()).abs()
            assert ulps.max() <= 1, name
            assert (ulps > 0).sum() <= 4, name  # expected: 0.3 of 4,097


@needs_cpu_kernels
def test_threads_and_views_change_nothing():
    """Guards against numbers that depend on who computes an element: one tensor by 1, 2, 3 and 7 threads."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            optimizer = MAdam(make_params((70_001, 300_000)), **BASE, state_dtype=BF16, collect_statistics=threads == 2)
            runs.append(run(optimizer, 0, 3))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert_same_bits(runs[0], other)


@needs_cpu_kernels
def test_special_values():
    """Guards infinities and NaNs, which random numbers added to their bits would turn into each other or into 0, and
    values below the smallest normal number, which are stored as 0: in the vectors of the CPU kernel and in what does
    not fill one."""
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1e-39, -1e-30, 3e38, 0.0, 1.0])
    values.view(torch.int32)[3] = -1  # a NaN too, and the one that a carry makes 0
    param = torch.nn.Parameter(torch.ones(5, 9))
    optimizer = MAdam([param], **BASE, state_dtype=BF16, backend="cpu")
    param.grad = values.repeat(5, 1)
    for _ in range(50):
        optimizer.step()
    state = optimizer.state[param]
    assert state["exp_avg"][:, :2].tolist() == [[torch.inf, -torch.inf]] * 5
    assert all(state[name][:, 2:4].isnan().all() for name in ("exp_avg", "grad_mean", "grad_var"))
    assert (state["grad_mean"][:, 4] == 0).all()
    assert (state["grad_mean"][:, 5] < 0).all()
    for name in MOMENTS:
        finite = state[name][:, 4:]
        assert ((finite.abs() >= torch.finfo(BF16).tiny) | (finite == 0)).all(), name


@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize("option", ["base", "all", "no_momentum", "wide_range"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_one(backend, algorithm, option, saturated):
    """Guards what the kernels take for granted, that a NaN in any one moment is one in the parameter's update: they
    look for it there, and random numbers added to a NaN's bits make 0 of it."""
    options = {**BASE, **OPTIONS[option], "trust_ratio": False, "max_grad_norm": None, "state_dtype": BF16}
    param = make_params((600,), device=device_of(backend))[0]
    optimizer = run(algorithm([param], **options, backend=backend), 0, 1)
    state = optimizer.state[param]
    if saturated:
        state["weight_sum"].fill_(1)
    places = {name: 16 * i + 3 for i, name in enumerate(MOMENTS)}
    for name, place in places.items():
        state[name].view(torch.int16)[place] = 0x7FFF
    run(optimizer, 1, 2)
    for name, place in places.items():
        assert state[name][place].isnan(), name
    assert param.isnan().nonzero().flatten().tolist() == list(places.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_leaves_everything(backend):
    """Guards against rounding a state again that no step has changed."""
    device = device_of(backend)
    optimizer = run(MAdam(make_params((600,), device=device), **BASE, state_dtype=BF16, backend=backend), 0, 2)
    before = {name: value.clone() for name, value in states(optimizer)}
    optimizer.found_inf, optimizer.grad_scale = (torch.ones((), device=device) for _ in range(2))
    run(optimizer, 2, 3)
    assert all(torch.equal(value, before[name]) for name, value in states(optimizer))


def test_nan_of_any_bits_stays():
    """Guards against a NaN that is rounded to -0, or cut to an infinity."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7F800001 - 2**31], dtype=torch.int32)
    for random in (0, 0xFFFF):
        assert rounding.round_stochastically(bits.view(torch.float32), torch.full_like(bits, random)).isnan().all()


@pytest.mark.parametrize("since", [0, 1], ids=lambda step: f"none since step {step}")
def test_no_gradient_keeps_the_key(since):
    """Guards against random numbers by a tensor's place among those that have a gradient, or have a state."""
    runs = []
    for without in (False, True):
        optimizer = MAdam(make_params((5, 500)), **BASE, state_dtype=BF16, rounding_seed=3)
        first, second = params_of(optimizer)
        for step in range(3):
            set_grads([first, second], step)
            if without and step >= since:
                first.grad = None
            optimizer.step()
        runs.append({**optimizer.state[second], "param": second.detach()})
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_both_kinds(backend):
    """Guards the keys where only some groups have 16-bit state, and that the others' stays exact."""
    sizes = ((5, 300), (40,), (3, 600))
    kinds = (None, BF16, None)
    params = [[make_params(size, device=device_of(backend)) for size in sizes] for _ in range(2)]
    together = MAdam(
        [{"params": its, "state_dtype": kind} for its, kind in zip(params[0], kinds, strict=True)],
        **BASE,
        backend=backend,
    )
    wide = MAdam([{"params": its} for its in params[1]], **BASE, backend=backend)
    for step in range(3):
        run(together, step, step + 1)
        run(wide, step, step + 1)
    for group, other, kind in zip(together.param_groups, wide.param_groups, kinds, strict=True):
        for ours, theirs in zip(group["params"], other["params"], strict=True):
            assert together.state[ours]["grad_var"].dtype == (kind or torch.float32)
            same = torch.equal(together.state[ours]["exp_avg"], wide.state[theirs]["exp_avg"].to(kind or torch.float32))
            assert same == (kind is None)
            assert kind is not None or torch.equal(ours, theirs)


def test_functional_form():
    """Guards the keys of the functional form: those of the optimizer with the same seed."""
    optimizer = run(MAdam(make_params((5, 700)), **BASE, state_dtype=BF16, rounding_seed=5), 0, 1)
    params = [param.detach().clone() for param in make_params((5, 700))]
    lists = [[torch.zeros_like(param, dtype=BF16) for param in params] for _ in range(4)]
    steps = [torch.tensor(0) for _ in params]
    grads = [param.grad for param in params_of(optimizer)]
    functional.madam_(params, grads, *lists, steps, **BASE, rounding_seed=5)
    for i, param in enumerate(params_of(optimizer)):
        assert torch.equal(param, params[i])
        for name, values in zip(MOMENTS, lists, strict=True):
            assert torch.equal(optimizer.state[param][name], values[i]), name


def test_a_group_may_say_the_dtype_itself():
    """Guards groups that others write, with the documented value and not its name."""
    optimizers = [MAdam(make_params((5,)), **BASE, state_dtype=BF16) for _ in range(2)]
    optimizers[0].param_groups[0]["state_dtype"] = BF16
    assert_same_bits(*(run(optimizer, 0, 2) for optimizer in optimizers))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    optimizers[0].param_groups[0]["state_dtype"] = torch.float16
    with pytest.raises(ValueError, match="state_dtype must be None or torch"):
        run(optimizers[0], 2, 3)


@pytest.mark.parametrize(
    ("state_dtype", "amsgrad", "expected"), [(None, False, 16), (None, True, 20), (BF16, False, 8), (BF16, True, 10)]
)
def test_bytes_of_the_state(state_dtype, amsgrad, expected):
    """Guards the table of bench/README.md, and so against an entry of the state that is there for nothing."""
    (param,) = make_params((1000,))
    optimizer = run(MAdam([param], state_dtype=state_dtype, amsgrad=amsgrad), 0, 1)
    assert sum(value.nbytes for name, value in optimizer.state[param].items() if name != "step") == expected * 1000


# --- the random numbers ----------------------------------------------------------------------------------------------


def test_random_numbers_are_uniform_and_uncorrelated():
    """Guards the hash: between moments, neighbours, steps and tensors there is no correlation beyond chance (5 standard
    errors), and each of 256 cells has its share."""
    count = 2**18
    elements = torch.arange(count)
    numbers = [
        torch.stack(rounding.random_bits(rounding.tensor_key(seed, tensor), step, elements)).double() / 65536 - 0.5
        for seed, tensor, step in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1))
    ]
    rows = torch.cat([*numbers, *(row.roll(1, 1) for row in numbers), *(row.roll(16, 1) for row in numbers[:1])])
    error = 1 / count**0.5
    assert (rows.mean(1).abs() < 5 * error * (1 / 12) ** 0.5).all()
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 * error
    for row in torch.cat(numbers):
        cells = torch.histc(row, 256, -0.5, 0.5)
        chi_square = ((cells - count / 256) ** 2 / (count / 256)).sum()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_rounding_is_right_on_average():
    """Guards the direction and the size of what is added: the mean over all 2^16 numbers is the value itself."""
    random = torch.arange(65536)
    for value in (1.0, -1.003, 3.14159, 1e-30, -(2.0**-126), 0.0):
        exact = torch.full((65536,), value)
        assert rounding.round_stochastically(exact, random).double().mean() == pytest.approx(float(exact[0]), rel=1e-9)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for number in (0, 1, 65535):
        result = rounding.round_stochastically(special, torch.full((3,), number)).float()
        assert torch.equal(result.nan_to_num(7), special.nan_to_num(7))


# --- how exact it is -------------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize("upper", narrow_state.UPPERS)
@pytest.mark.parametrize("kind", narrow_state.KINDS)
def test_root_v_is_unbiased(kind, upper):
    """Guards the purpose: over 2,000 steps sqrt(v) has a bias of at most 0.1 % (rounded to nearest it is off by tens of
    percents) and a spread of at most 2 %."""
    bias, spread = narrow_state.error_of_root_v(kind, upper)
    assert abs(bias) <= 1e-3
    assert 1e-3 < spread <= 2e-2  # it is rounded at all


@needs_cpu_kernels
def test_each_bit_halves_the_error():
    """Guards against an error that is not the rounding's: with each bit more it must fall to a half."""
    spreads = [
        narrow_state.error_of_root_v("Gaussian", 0.98, narrow_state.rounded(kept), count=4096, steps=400)[1]
        for kept in (6, 7, 8, 9, 10)
    ]
    for wide, narrow in zip(spreads[1:], spreads[:-1], strict=True):
        assert 0.45 < wide / narrow < 0.55
    ours = narrow_state.error_of_root_v("Gaussian", 0.98, count=4096, steps=400)[1]
    assert ours == pytest.approx(spreads[1], rel=0.1)  # bfloat16 has 7


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_resumed_run_is_the_run(dtype, backend):
    """Guards against random numbers that a checkpoint does not bring back, and against state cast when it is loaded."""
    options = {**BASE, "amsgrad": True, "state_dtype": BF16, "rounding_seed": 11, "backend": backend}
    through, first = (MAdam(make_params(dtype=dtype, device=device_of(backend)), **options) for _ in range(2))
    run(through, 0, 6)
    run(first, 0, 3)
    params = [torch.nn.Parameter(param.detach().clone()) for param in params_of(first)]
    second = MAdam(params, **{**options, "rounding_seed": 0})
    second.load_state_dict(through_file(first.state_dict()))
    assert_same_bits(through, run(second, 3, 6))
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    for other in copies:
        assert_same_bits(through, run(other, 3, 6))


def test_full_state_dict_of_a_distributed_checkpoint():
    """Guards against a group's entry that torch.distributed.checkpoint does not take, as a dtype is."""
    model, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    optimizer, loaded = (MAdam(each.parameters(), **BASE, state_dtype=BF16) for each in (model, other))
    run(optimizer, 0, 2)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    set_optimizer_state_dict(other, loaded, get_optimizer_state_dict(model, optimizer, options=options))
    other.load_state_dict(model.state_dict())
    assert_same_bits(optimizer, loaded)


def test_state_of_another_dtype_is_converted_when_asked():
    """Guards against a silent cast, and a message without the way out: in both directions."""
    narrow, wide = (run(MAdam(make_params((40,)), **BASE, state_dtype=dtype), 0, 3) for dtype in (BF16, None))
    for source, target in ((narrow, wide), (wide, narrow)):
        dtype = STATE_DTYPES[target.param_groups[0]["state_dtype"]]
        before = {name: value.clone() for name, value in states(target)}
        with pytest.raises(ValueError, match=r"state_dtype=.*to_state_dtype\(state_dict, optimizer\)"):
            target.load_state_dict(source.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in states(target))
        target.load_state_dict(to_state_dtype(source.state_dict(), dtype))
        for (name, value), (_, other) in zip(states(source), states(target), strict=True):
            if not name.startswith(("params", "step")):
                assert other.dtype == (dtype or torch.float32)
                assert torch.equal(other, value.to(other.dtype)), name
        run(target, 3, 4)


# Groups, each the dtypes of its parameters and its state_dtype: of a checkpoint, and of the optimizer that loads it.
F32, F64 = torch.float32, torch.float64
MOVES = {
    "float64 to float32": ([((F64,), None)], [((F32,), None)]),
    "float64 to 16-bit state": ([((F64,), None)], [((F32,), BF16)]),
    "float32 to float64": ([((F32,), None)], [((F64,), None)]),
    "16-bit state to float64": ([((F32,), BF16)], [((F64,), None)]),
    "one group to 16-bit state": ([((F32,), None), ((F64,), None)], [((F32,), BF16), ((F64,), None)]),
    "one group from 16-bit state": ([((F32,), None), ((F32,), BF16)], [((F32,), None), ((F32,), None)]),
    "groups change places": ([((F32,), None), ((F32,), BF16)], [((F32,), BF16), ((F32,), None)]),
    "mixed group": ([((F32, F32), BF16)], [((F32, F64), None)]),
}


@pytest.mark.parametrize("case", MOVES)
def test_advice_of_a_refused_checkpoint_works(case):
    """Guards against advice that leads to the next refusal, and from there back: for float64 parameters, and where not
    all groups have the same state_dtype."""

    def make(dtypes_of_groups, state_dtypes):
        groups = [
            {"params": [make_params((40,), dtype)[0] for dtype in dtypes], "state_dtype": state_dtype}
            for dtypes, state_dtype in zip(dtypes_of_groups, state_dtypes, strict=True)
        ]
        return MAdam(groups, **BASE, amsgrad=True)

    (dtypes, saved), (wanted_dtypes, wanted) = (zip(*groups, strict=True) for groups in MOVES[case])
    source, target = make(dtypes, saved), make(wanted_dtypes, wanted)
    state_dict = run(source, 0, 3).state_dict()
    with pytest.raises(ValueError, match="to_state_dtype") as raised:
        target.load_state_dict(state_dict)
    if "make the group with that" in str(raised.value):
        make(wanted_dtypes, saved)
    advice = re.search(r"load (maxva_kernels\.convert\.to_state_dtype\(.*?\))", str(raised.value))[1]
    names = {"maxva_kernels": maxva_kernels, "torch": torch, "state_dict": state_dict, "optimizer": target}
    target.load_state_dict(eval(advice, names))
    kept = [state_dtype or dtype for dtypes, state_dtype in MOVES[case][1] for dtype in dtypes]
    for param, other, dtype in zip(params_of(source), params_of(target), kept, strict=True):
        for name in (*MOMENTS, "max_denom"):
            assert target.state[other][name].dtype == dtype
            assert torch.equal(target.state[other][name], source.state[param][name].to(dtype)), name
    run(target, 3, 4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "words"),
    [
        (torch.float32, torch.float16, r"state_dtype must be None or torch.bfloat16, got torch.float16"),
        (torch.float32, "int8", r"state_dtype must be None or torch.bfloat16, got 'int8'"),
        (torch.float64, BF16, r"state_dtype=torch.bfloat16 is too narrow for params\[0\] .*torch.float64.*use None"),
    ],
    ids=str,
)
def test_pairs_that_do_not_fit(dtype, state_dtype, words):
    """Guards against an option accepted and ignored, and against float64 parameters with a state of 8 bits."""
    with pytest.raises(ValueError, match=words):
        MAdam(make_params((2,), dtype=dtype), state_dtype=state_dtype)
    optimizer = LaMAdam(make_params((2,)))
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": make_params((2,), dtype=dtype), "state_dtype": state_dtype})
    assert len(optimizer.param_groups) == 1


def test_another_optimizer_is_named():
    """Guards against a KeyError, where the optimizer that is to load a converted state is not ours."""
    state_dict = run(MAdam(make_params((2,))), 0, 1).state_dict()
    with pytest.raises(TypeError, match="must be the MAdam or LaMAdam that is to load it, got AdamW"):
        to_state_dtype(state_dict, torch.optim.AdamW(make_params((2,))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_state_is_named(backend):
    """Guards against reading a moment in the dtype of another, and rounding without a key."""
    device = device_of(backend)
    given = {name: [torch.zeros(3, dtype=BF16, device=device)] for name in (f"{moment}s" for moment in MOMENTS)}
    given["grad_vars"] = [torch.zeros(3, device=device)]
    given |= {name: [torch.ones(3, device=device)] for name in ("params", "grads")}
    steps = [torch.tensor(0, device=device)]
    with pytest.raises(RuntimeError, match=r"grad_vars\[0\] .*torch.float32.* must be torch.bfloat16"):
        functional.madam_(**given, steps=steps, lr=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 is float64.* too narrow; pass the optimizer"):
        to_state_dtype(run(MAdam(make_params((2,), dtype=torch.float64)), 0, 1).state_dict(), BF16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cast_state_is_no_state_to_round(backend):
    """Guards an optimizer with float32 state, which another tool has cast, against rounding it from then on."""
    optimizer = run(MAdam(make_params((20,), device=device_of(backend)), backend=backend), 0, 1)
    (param,) = params_of(optimizer)
    for name in MOMENTS:
        optimizer.state[param][name] = optimizer.state[param][name].bfloat16()
    with pytest.raises(RuntimeError, match=r"exp_avgs\[0\] .* must be torch.float32 as the state of params\[0\]"):
        run(optimizer, 1, 2)


@pytest.mark.parametrize("name", ["a whole checkpoint", "nothing", "Adam's before its first step", "no steps"])
def test_conversion_of_what_is_not_ours(name):
    """Guards the one error that the docstring promises."""
    ours, adam = run(MAdam(make_params((2,))), 0, 1).state_dict(), torch.optim.Adam(make_params((2,))).state_dict()
    del ours["state"][0]["step"]
    given = {"a whole checkpoint": {"model": {}, "optimizer": ours}, "nothing": None, "no steps": ours}
    with pytest.raises(ValueError, match=r"'state'|state dict of this package"):
        to_state_dtype(given.get(name, adam), None)
