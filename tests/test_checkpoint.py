"""Saving and loading: a resumed run is the run itself, bit for bit, and what does not fit is refused as a whole."""

import copy

import pytest
import torch
from cases import (
    ALGORITHMS,
    BASE,
    OPTIONS,
    assert_same_bits,
    backend_params,
    device_of,
    make_params,
    run,
    set_grads,
    states,
    through_file,
)

from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.checkpoint import ADDED_SINCE
from maxva_kernels.convert import from_adam, to_state_dtype

SIZES = (3, (2, 5), 33)


def make(algorithm, backend, *, sizes=SIZES, dtype=torch.float32, **options):
    params = make_params(sizes, dtype, device_of(backend))
    return algorithm(params, backend=backend, **{**BASE, **options})


def adopt_params(target, source):
    """The parameters' values, which the model's checkpoint brings."""
    with torch.no_grad():
        for ours, theirs in zip(target.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
            ours.copy_(theirs)


def snapshot(optimizer):
    values = {name: value.clone() for name, value in states(optimizer)}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return values, copy.deepcopy(groups)


def assert_unchanged(optimizer, before):
    values, groups = snapshot(optimizer)
    assert groups == before[1]
    assert values.keys() == before[0].keys()
    for name, value in values.items():
        assert torch.equal(value, before[0][name]), name


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resumed_run_is_the_run(algorithm, option, dtype, backend):
    """Guards against anything a step needs and a checkpoint lacks. max_grad_norm, being the optimizer's own, is the
    constructor's; all else comes from the file, whatever the new optimizer was made with."""
    options = OPTIONS[option]
    clip = options.get("max_grad_norm")
    straight = run(make(algorithm, backend, dtype=dtype, **options), 0, 6)
    saved = run(make(algorithm, backend, dtype=dtype, **options), 0, 3)
    resumed = make(algorithm, backend, dtype=dtype, max_grad_norm=clip, lr=9.0, eps=1.0, beta1=0.1)
    adopt_params(resumed, saved)
    resumed.load_state_dict(through_file(saved.state_dict()))
    assert_same_bits(saved, resumed)
    assert_same_bits(straight, run(resumed, 3, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", backend_params())
def test_state_keeps_its_dtype(backend, dtype):
    """Guards against torch's default, which casts loaded state to the parameter's dtype and rounds it to 16 bits."""
    saved = run(make(MAdam, backend, dtype=dtype, amsgrad=True), 0, 3)
    loaded = make(MAdam, backend, dtype=dtype)
    loaded.load_state_dict(through_file(saved.state_dict()))
    for param in loaded.param_groups[0]["params"]:
        for name, value in loaded.state[param].items():
            expected = torch.float64 if dtype == torch.float64 else torch.float32
            assert value.dtype == (torch.int64 if name == "step" else expected), name


@pytest.mark.parametrize("backend", backend_params(oracle=False))
def test_checkpoint_moves_between_backends(backend):
    """Guards against state that only its own backend understands."""
    saved = run(make(LaMAdam, backend), 0, 3)
    loaded = make(LaMAdam, "reference")
    adopt_params(loaded, saved)
    loaded.load_state_dict(through_file(saved.state_dict()))
    assert_same_bits(saved, loaded)
    run(loaded, 3, 4)
    back = make(LaMAdam, backend)
    adopt_params(back, loaded)
    back.load_state_dict(through_file(loaded.state_dict()))
    assert_same_bits(loaded, back)
    run(back, 4, 5)


def test_checkpoint_of_a_scheduled_lr_tensor():
    """Guards against an lr tensor shared with the dict, or lost in the file."""
    saved = run(make(MAdam, "auto", lr=torch.tensor(0.5)), 0, 2)
    loaded = make(MAdam, "auto")
    loaded.load_state_dict(saved.state_dict())
    saved.param_groups[0]["lr"].fill_(0.25)
    assert loaded.param_groups[0]["lr"].item() == 0.5
    loaded.load_state_dict(through_file(saved.state_dict()))
    assert loaded.param_groups[0]["lr"].item() == 0.25


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5), torch.tensor([0.5])], ids=str)
def test_capturable_rate_stays_where_it_is(rate):
    """Guards against a checkpoint that puts another tensor in the place of the one that schedulers and graphs know."""
    saved, loaded = run(make(MAdam, "auto", lr=rate), 0, 2), make(MAdam, "auto", capturable=True)
    known = loaded.param_groups[0]["lr"]
    loaded.load_state_dict(through_file(saved.state_dict()))
    assert loaded.param_groups[0]["lr"] is known
    assert known == torch.tensor(0.5)


def test_capturable_rate_that_was_set_by_hand():
    """Guards against a failure after half of a checkpoint was loaded: a loop had put a number in the tensor's place."""
    saved = run(make(MAdam, "auto", lr=0.5, capturable=True), 0, 2)
    loaded = run(make(MAdam, "auto", capturable=True), 0, 1)
    loaded.param_groups[0]["lr"] = 0.125
    adopt_params(run(loaded, 1, 3), saved)
    loaded.load_state_dict(through_file(saved.state_dict()))
    assert loaded.param_groups[0]["lr"] == torch.tensor(0.5)
    assert_same_bits(run(saved, 2, 4), run(loaded, 2, 4))


def test_checkpoint_before_the_first_step():
    """Guards against a dict without state refused, or old state kept beside it."""
    fresh = make(MAdam, "auto", lr=0.3)
    loaded = run(make(MAdam, "auto"), 0, 2)
    loaded.load_state_dict(through_file(fresh.state_dict()))
    assert not loaded.state
    assert loaded.param_groups[0]["lr"] == 0.3
    adopt_params(loaded, fresh)
    assert_same_bits(run(fresh, 0, 2), run(loaded, 0, 2))


def test_partial_state():
    """Guards against state given to the wrong parameter where some have none: those start afresh after loading."""
    optimizers = [make(MAdam, "auto") for _ in range(2)]
    for optimizer in optimizers:
        params = optimizer.param_groups[0]["params"]
        for step in range(3):
            set_grads([params[0], params[2]], step)
            optimizer.step()
    straight, saved = optimizers
    resumed = make(MAdam, "auto")
    adopt_params(resumed, saved)
    resumed.load_state_dict(through_file(saved.state_dict()))
    assert resumed.param_groups[0]["params"][1] not in resumed.state
    assert_same_bits(straight, resumed)
    assert_same_bits(run(straight, 3, 5), run(resumed, 3, 5))
    assert resumed.state[resumed.param_groups[0]["params"][1]]["step"].item() == 2


def test_groups_are_matched_in_order():
    """Guards against state crossing groups; each keeps its own saved hyperparameters."""
    optimizers = []
    for rates in ((0.1, 0.2), (0.1, 0.2), (0.7, 0.9)):
        a, b = make_params((4, 4), seed=1), make_params((5,), seed=2)
        optimizers.append(MAdam([{"params": a, "lr": rates[0]}, {"params": b, "lr": rates[1], "amsgrad": True}]))
    straight, saved, loaded = optimizers
    run(straight, 0, 4)
    run(saved, 0, 2)
    with torch.no_grad():
        for ours, theirs in zip(loaded.param_groups, saved.param_groups, strict=True):
            for a, b in zip(ours["params"], theirs["params"], strict=True):
                a.copy_(b)
    loaded.load_state_dict(through_file(saved.state_dict()))
    assert [group["lr"] for group in loaded.param_groups] == [0.1, 0.2]
    assert_same_bits(straight, run(loaded, 2, 4))


def test_loaded_parameters_take_another_group():
    """Guards against a loaded optimizer that lost what add_param_group needs."""
    loaded = make(MAdam, "auto")
    loaded.load_state_dict(run(make(MAdam, "auto"), 0, 2).state_dict())
    loaded.add_param_group({"params": make_params((3,))})
    run(loaded, 2, 3)


def test_state_follows_the_parameters_layout():
    """Guards against loaded state left contiguous beside a channels-last parameter, a copy in every step from then."""
    shape = (2, 3, 4, 5)
    saved = run(make(MAdam, "auto", sizes=(shape,)), 0, 2)
    param = torch.nn.Parameter(torch.zeros(shape).to(memory_format=torch.channels_last))
    loaded = MAdam([param])
    loaded.load_state_dict(saved.state_dict())
    for name, value in loaded.state[param].items():
        assert torch.equal(value, saved.state[saved.param_groups[0]["params"][0]][name])
        if name != "step":
            assert value.stride() == param.stride()


# --- the dict is the caller's ----------------------------------------------------------------------------------------


def test_loading_copies():
    """Guards against an optimizer that steps in the checkpoint's tensors: one dict loaded twice would train both."""
    saved = run(make(MAdam, "auto", amsgrad=True), 0, 2)
    state_dict = saved.state_dict()
    before = copy.deepcopy(state_dict)
    first, second = make(MAdam, "auto"), make(MAdam, "auto")
    first.load_state_dict(state_dict)
    second.load_state_dict(state_dict)
    run(first, 2, 4)
    for index, entries in before["state"].items():
        assert type(state_dict["state"][index]) is dict
        for name, value in entries.items():
            assert torch.equal(value, state_dict["state"][index][name]), name
            assert torch.equal(value, second.state[second.param_groups[0]["params"][index]][name]), name
    assert state_dict["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0), torch.tensor([3]), torch.tensor(3, dtype=torch.int32)])
def test_step_of_other_types(step):
    """Guards against a step count refused that another tool wrote as a number or in floating point."""
    saved = run(make(MAdam, "auto"), 0, 3)
    state_dict = saved.state_dict()
    for entries in state_dict["state"].values():
        entries["step"] = step
    loaded = make(MAdam, "auto")
    loaded.load_state_dict(state_dict)
    adopt_params(loaded, saved)
    for param in loaded.param_groups[0]["params"]:
        assert loaded.state[param]["step"].dtype == torch.int64
        assert loaded.state[param]["step"].shape == ()
    assert_same_bits(run(loaded, 3, 5), run(make(MAdam, "auto"), 0, 5))


def test_other_entries_pass():
    """Guards against entries dropped that a user keeps in the state or in a group, and tensors among them that are made
    to fit the parameter or stay the checkpoint's."""
    saved = run(make(MAdam, "auto"), 0, 1)
    first = saved.param_groups[0]["params"][0]
    saved.state[first] |= {"mine": [1, "two"], "seen": torch.tensor([7.0])}
    saved.param_groups[0]["tag"] = "encoder"
    loaded = make(MAdam, "auto")
    for state_dict in (through_file(saved.state_dict()), saved.state_dict()):
        loaded.load_state_dict(state_dict)
        its = loaded.state[loaded.param_groups[0]["params"][0]]
        assert its["mine"] == [1, "two"]
        assert its["seen"].tolist() == [7.0]
        assert loaded.param_groups[0]["tag"] == "encoder"
    its["seen"].zero_()
    assert saved.state[first]["seen"].tolist() == [7.0]
    run(loaded, 1, 2)


def test_checkpoint_of_an_older_version():
    """Guards against refusing, or breaking on, a checkpoint from before an option was there."""
    saved, loaded = run(make(MAdam, "auto"), 0, 2), make(MAdam, "auto")
    state_dict = saved.state_dict()
    for group in state_dict["param_groups"]:
        for option in ADDED_SINCE:
            del group[option]
    loaded.load_state_dict(state_dict)
    adopt_params(loaded, saved)
    assert_same_bits(run(loaded, 2, 4), run(make(MAdam, "auto"), 0, 4))


def test_options_that_a_checkpoint_does_not_say():
    """Guards against options of this optimizer turned off by a checkpoint that knows nothing of them: parameters in
    bfloat16 that were to be rounded stochastically would no longer move."""
    params = make_params((64,), torch.bfloat16)
    theirs = torch.optim.AdamW(params, lr=1e-3)
    set_grads(params, 0)
    theirs.step()
    options = {"stochastic_rounding": True, "rounding_seed": 3, "trust_ratio": True}
    loaded = MAdam(params, **options)
    loaded.load_state_dict(from_adam(theirs.state_dict()))
    assert {name: loaded.param_groups[0][name] for name in options} == options
    said = MAdam(params).state_dict()  # our own says that it has none, which then holds, as a learning rate does
    loaded.load_state_dict(said)
    assert not any(loaded.param_groups[0][name] for name in options)


def test_state_that_was_only_looked_at():
    """Guards a checkpoint with the empty entry that `optimizer.state[param]` leaves."""
    saved, loaded = make(MAdam, "auto"), make(MAdam, "auto")
    assert saved.state[saved.param_groups[0]["params"][0]] == {}
    loaded.load_state_dict(through_file(saved.state_dict()))
    loaded.load_state_dict(to_state_dtype(saved.state_dict(), None))
    assert_same_bits(run(loaded, 0, 2), run(saved, 0, 2))


@pytest.mark.parametrize("step", [2, torch.tensor(2.0)], ids=repr)
def test_default_device_while_loading(step):
    """Guards a count of steps put where torch.set_default_device says."""
    state_dict = run(make(MAdam, "auto"), 0, 2).state_dict()
    for entries in state_dict["state"].values():
        entries["step"] = step
    loaded = make(MAdam, "auto")
    with torch.device("meta"):
        loaded.load_state_dict(state_dict)
    assert all(entries["step"].item() == 2 for entries in loaded.state.values())


def test_hooks_see_plain_state():
    """Guards against hooks that meet the wrapper in which state passes through torch: a pre-hook sees, and may replace,
    the user's dict; a post-hook sees the loaded state; state_dict's hooks theirs."""
    saved, other = run(make(MAdam, "auto"), 0, 2), run(make(MAdam, "auto"), 0, 5)
    loaded, seen = make(MAdam, "auto"), []

    def before_load(optimizer, state_dict):
        assert all(torch.is_tensor(value) for entries in state_dict["state"].values() for value in entries.values())
        seen.append("before load")
        return other.state_dict()

    def after_load(optimizer):
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].item() == 5
        seen.append("after load")

    loaded.register_load_state_dict_pre_hook(before_load)
    loaded.register_load_state_dict_post_hook(after_load)
    loaded.register_state_dict_pre_hook(lambda optimizer: seen.append("before save"))
    loaded.register_state_dict_post_hook(lambda optimizer, state_dict: seen.append("after save"))
    loaded.load_state_dict(saved.state_dict())
    loaded.load_state_dict(saved.state_dict())
    loaded.state_dict()
    assert seen == ["before load", "after load"] * 2 + ["before save", "after save"]


# --- what is refused -------------------------------------------------------------------------------------------------


def without(key):
    def edit(state_dict):
        for entries in state_dict["state"].values():
            del entries[key]

    return edit


def with_entry(key, make_value):
    def edit(state_dict):
        last = state_dict["state"][max(state_dict["state"])]  # the ones before it are right
        last[key] = make_value(last[key])

    return edit


def torch_adam(_):
    params = make_params(SIZES)
    return run(torch.optim.Adam(params), 0, 2).state_dict()


def another_model(_):
    return run(make(MAdam, "auto", sizes=(3, (5, 2), 33)), 0, 2).state_dict()


def fewer_parameters(_):
    return run(make(MAdam, "auto", sizes=SIZES[:2]), 0, 2).state_dict()


def first_parameter_left_out(_):
    return run(make(MAdam, "auto", sizes=SIZES[1:]), 0, 2).state_dict()


def more_groups(_):
    optimizer = MAdam([{"params": make_params(SIZES)}, {"params": make_params((2,))}])
    return run(optimizer, 0, 2).state_dict()


# What is loaded, and the words that must be in the error.
REFUSED = {
    "torch's Adam": (torch_adam, ["MAdam", "beta1"]),
    "LaMAdam": (lambda _: run(make(LaMAdam, "auto"), 0, 2).state_dict(), ["LaMAdam", "MAdam"]),
    "another model": (another_model, ["parameter 1", "[5, 2]", "[2, 5]"]),
    "fewer parameters": (fewer_parameters, ["param_groups[0] is 2", "3 in this optimizer", "add_param_group"]),
    "first left out": (first_parameter_left_out, ["param_groups[0] is 2", "3 in this optimizer", "add_param_group"]),
    "more groups": (more_groups, ["number of parameter groups is 2", "(of [3, 1] ", "1 in this optimizer (of [3])"]),
    "the whole checkpoint": (lambda state_dict: {"optimizer": state_dict, "epoch": 3}, ["param_groups", "optimizer"]),
    "missing entry": (without("grad_var"), ["parameter 0", "grad_var"]),
    "missing step": (without("step"), ["parameter 0", "step"]),
    "rounded state": (with_entry("grad_mean", torch.Tensor.bfloat16), ["parameter 2", "grad_mean", "bfloat16"]),
    "double state": (with_entry("max_denom", torch.Tensor.double), ["parameter 2", "max_denom", "float64"]),
    "shape": (with_entry("weight_sum", lambda value: value[:1]), ["parameter 2", "weight_sum", "[1]", "[33]"]),
    "number for tensor": (with_entry("exp_avg", lambda _: 0.0), ["parameter 2", "exp_avg", "float"]),
    "many steps": (with_entry("step", lambda _: torch.ones(33)), ["parameter 2", "step", "[33]"]),
    "no step count": (with_entry("step", lambda _: "three"), ["parameter 2", "step", "three"]),
    "no state": (lambda state_dict: {"param_groups": state_dict["param_groups"]}, ["state"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_nothing_changed(case):
    """Guards against half-loaded state, and against errors that do not say what does not fit."""
    make_dict, words = REFUSED[case]
    state_dict = run(make(MAdam, "auto", amsgrad=True), 0, 2).state_dict()
    state_dict = make_dict(state_dict) or state_dict
    optimizer = run(make(MAdam, "auto", amsgrad=True), 0, 3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 -- the words are checked below
        optimizer.load_state_dict(state_dict)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert_unchanged(optimizer, before)
    run(optimizer, 3, 4)
    optimizer.load_state_dict(run(make(MAdam, "auto"), 0, 1).state_dict())  # a refusal leaves nothing behind


@pytest.mark.parametrize("sizes", [SIZES, (4, 4, 4)], ids=["shapes", "one shape"])
def test_group_of_another_size_is_named(sizes):
    """Guards against a parameter that moved to another group, or was left out, taken for another model's, and against
    an error that does not say where to look."""

    def grouped(*counts):
        params = iter(make_params(sizes))
        return run(MAdam([{"params": [next(params) for _ in range(count)]} for count in counts]), 0, 1)

    with pytest.raises(ValueError, match=r"param_groups\[1\] is 2 in this checkpoint, but 1 in .*; .*the same groups"):
        grouped(1, 1).load_state_dict(grouped(1, 2).state_dict())
    with pytest.raises(ValueError, match=r"param_groups\[0\] is 1 in this checkpoint, but 2 in .*; .*the same groups"):
        grouped(2, 1).load_state_dict(grouped(1, 2).state_dict())
    with pytest.raises(ValueError, match=r"param_groups\[0\] is 1 in this checkpoint, but 2 in .*; .*the same groups"):
        to_state_dtype(grouped(1, 2).state_dict(), grouped(2, 1))
