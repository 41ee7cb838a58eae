"""Parameters of 16 bits that lose no update: master weights, which make the step a float32 one, bit for bit, and
stochastic rounding, which is right on average."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import (
    ALGORITHMS,
    BASE,
    BFLOAT16_OPTIONS,
    OPTIONS,
    SIZES,
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
    states,
    through_file,
)

from maxva_kernels import LaMAdam, MAdam, functional, join_master, rounding, split_master
from maxva_kernels.groups import MOMENTS

BF16 = torch.bfloat16
BACKENDS = backend_params()
KINDS = ["master_weights", "stochastic_rounding"]


def masters(optimizer):
    """The float32 weights of an optimizer with master weights."""
    for param in params_of(optimizer):
        master = optimizer.state[param]["master"]
        yield join_master(param, master) if param.dtype == BF16 else master


def float32_copy(params):
    return [torch.nn.Parameter(param.detach().float()) for param in params]


# --- the two halves --------------------------------------------------------------------------------------------------


def test_halves_make_the_whole():
    """Guards exactness: every upper half with lower halves on both sides of ties, of the neighbours' and of 0; the
    parameter is the nearest bfloat16; infinities and one kind of NaN come back."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    weights = (upper | lower).view(torch.float32).flatten()
    param, master = split_master(weights)
    assert torch.equal(bits(join_master(param, master)), bits(weights))
    finite = weights.isfinite() & param.isfinite()
    ties = (weights.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(param[finite & ~ties], weights[finite & ~ties].bfloat16())
    assert (param[finite & ties].float().abs() > weights[finite & ties].abs()).all()  # away from 0


def test_halves_of_other_dtypes_are_refused():
    """Guards against halves put together that do not belong together."""
    with pytest.raises(ValueError, match=r"float32 weight can be split, got torch.bfloat16"):
        split_master(torch.zeros(2, dtype=BF16))
    for param, master in (
        (torch.zeros(2), torch.zeros(2, dtype=BF16)),
        (torch.zeros(2, dtype=BF16), torch.zeros(2)),
        (torch.zeros(2, dtype=BF16), torch.zeros(1, dtype=BF16)),
    ):
        with pytest.raises(ValueError, match=r"a bfloat16 parameter and a bfloat16 master of its shape"):
            join_master(param, master)


# --- master weights --------------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize("grad_dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("param_dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_is_training_in_float32(algorithm, option, param_dtype, grad_dtype):
    """Guards the purpose: with masters a run is that of float32 parameters with the same gradients, bit for bit in
    weights and state, also where the update looks at the parameter (decay, trust ratio); and the parameter is its
    master, rounded."""
    options = {**BASE, **OPTIONS[option], "backend": "cpu"}
    optimizer = algorithm(make_params(SIZES, dtype=param_dtype), **options, master_weights=True)
    wide = algorithm(float32_copy(params_of(optimizer)), **options)
    for step in range(4):
        for each in (optimizer, wide):
            set_grads(params_of(each), step, dtype=grad_dtype)
            each.step()
    for param, weight, master in zip(params_of(optimizer), params_of(wide), masters(optimizer), strict=True):
        assert torch.equal(bits(master), bits(weight.detach()))
        assert torch.equal(param, split_master(master)[0] if param_dtype == BF16 else master.to(param_dtype))
        for name in MOMENTS:
            assert torch.equal(bits(optimizer.state[param][name]), bits(wide.state[weight][name])), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("param_dtype", [BF16, torch.float16], ids=str)
def test_small_updates_add_up(param_dtype, backend):
    """Guards against updates that vanish: 50 of 1e-4, below half a unit in the last place of 1 even in float16. With
    masters nothing is lost, at random the mean is right (within 5 standard errors), to nearest nothing moves."""
    means = {}
    for kind in (*KINDS, None):
        if kind == "stochastic_rounding" and param_dtype != BF16:
            continue
        (param,) = params = [torch.nn.Parameter(torch.ones(500, dtype=param_dtype, device=device_of(backend)))]
        optimizer = MAdam(params, lr=1e-4, beta1=0.0, backend=backend, **({kind: True} if kind else {}))
        for _ in range(50):
            param.grad = torch.ones_like(param)
            optimizer.step()
        means[kind] = (next(masters(optimizer)) if kind == "master_weights" else param).double().mean().item()
    assert means["master_weights"] == pytest.approx(1 - 50e-4, abs=1e-5)
    assert means[None] == 1
    if param_dtype == BF16:  # a step rounds down with p = 1e-4 / 2^-8 (below 1), and by 2^-8: a variance of 4e-7 a step
        assert means["stochastic_rounding"] == pytest.approx(1 - 50e-4, abs=5 * (50 * 4e-7 / 500) ** 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_parameters_of_the_group(backend):
    """Guards groups of several dtypes: what is as wide as its arithmetic has no master, and each its own."""
    device = device_of(backend)
    for kind in KINDS:
        dtypes = (torch.float32, BF16, torch.float64, BF16, torch.float32)
        params = [make_params((40,), dtype=dtype, device=device)[0] for dtype in dtypes]
        plain = copy.deepcopy(params)
        optimizer, other = MAdam(params, **BASE, backend=backend, **{kind: True}), MAdam(plain, **BASE, backend=backend)
        for each in (optimizer, other):
            run(each, 0, 3)
        for param, its in zip(params, plain, strict=True):
            assert ("master" in optimizer.state[param]) == (kind == "master_weights" and param.dtype == BF16)
            assert torch.equal(param, its) == (param.dtype != BF16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_and_without(backend):
    """Guards which tensor a master belongs to where only some groups have masters, and maxima."""
    device = device_of(backend)
    extras = ({}, {"master_weights": True, "amsgrad": True}, {"stochastic_rounding": True}, {"amsgrad": True})
    groups = [{"params": make_params((5, 70), BF16, device, seed=g), **extra} for g, extra in enumerate(extras)]
    together = MAdam(copy.deepcopy(groups), **BASE, backend=backend)
    run(together, 0, 3)
    number = 0
    for group, settings in zip(together.param_groups, groups, strict=True):
        settings = dict(settings)
        alone = MAdam(settings.pop("params"), **{**BASE, **settings}, backend=backend)
        for step in range(3):
            placeholders = copy.deepcopy(params_of(together))
            set_grads(placeholders, step)
            for param, other in zip(params_of(alone), placeholders[number:], strict=False):
                param.grad = other.grad
            alone.step()
        number += len(group["params"])
        if group["stochastic_rounding"]:
            continue  # whose numbers depend on the place among all
        for ours, theirs in zip(group["params"], params_of(alone), strict=True):
            assert torch.equal(ours, theirs)
            for name, value in alone.state[theirs].items():
                assert torch.equal(no_number(name, together.state[ours][name]), no_number(name, value)), name


@needs_cpu_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_reference_agrees(kind):
    """Guards the oracle: from one state both come to the same parameters, but where float32 and float64 lie on either
    side of a threshold, or in a last place of the master."""
    optimizer = run(MAdam(make_params((4097,), dtype=BF16), **BASE, backend="cpu", **{kind: True}), 0, 5)
    twin = copy.deepcopy(optimizer)
    twin.backend = "reference"
    for each in (optimizer, twin):
        run(each, 5, 6)
    (ours,), (theirs,) = params_of(optimizer), params_of(twin)
    if kind == "master_weights":
        torch.testing.assert_close(next(masters(optimizer)), next(masters(twin)), rtol=1e-6, atol=1e-6)
    else:
        ulps = (bits(ours.detach()).int() - bits(theirs.detach()).int()).abs()
        assert ulps.max() <= 1
        assert (ulps > 0).sum() <= 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [3.0, 0.0, -0.0, torch.inf, -torch.inf])
def test_weights_set_by_others_stay(value, backend):
    """Guards against a master that overwrites what was loaded into a bfloat16 parameter, or beside a zero, as masks of
    pruning write it, makes a NaN of it."""
    device = device_of(backend)
    (param,) = params = make_params((600,), BF16, device)
    optimizer = run(MAdam(params, **BASE, master_weights=True, backend=backend), 0, 3)
    with torch.no_grad():
        param.fill_(value)
    (master,) = masters(optimizer)
    assert not master.isnan().any()
    off = bits(master).long() - bits(torch.tensor(value, device=device)).long()
    assert off.abs().max() <= 2**15  # half a unit in the last place
    twin = copy.deepcopy(optimizer)
    for ours, its in zip(params_of(twin), twin.state.values(), strict=True):
        for tensor, part in zip((ours.detach(), its["master"].view(torch.int16)), split_master(master), strict=True):
            tensor.copy_(part.view(tensor.dtype))
    assert_same_bits(run(optimizer, 3, 4), run(twin, 3, 4))
    assert param.isfinite().all() or abs(value) == torch.inf


def written_in_place(optimizer):
    for param in params_of(optimizer):
        param.detach()[::3] = 3.0


def written_through_data(optimizer):
    """As averages of weights are swapped in: no counter of versions tells."""
    for param in params_of(optimizer):
        param.data[::3] = 3.0


def stepped_without_masters(optimizer):
    (group,) = optimizer.param_groups
    group["master_weights"] = False
    for param in group["params"]:
        param.grad = torch.zeros_like(param)
        param.grad[::3] = 1.0
    group["lr"], group["weight_decay"] = 1.0, 0.0
    optimizer.step()
    group["lr"], group["weight_decay"], group["master_weights"] = BASE["lr"], BASE["weight_decay"], True


WRITES = [written_in_place, written_through_data, stepped_without_masters]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_whole_masters_follow_their_parameters(write, backend):
    """Guards against an old master that overwrites, in silence, what others wrote into a float16 parameter, and against
    a new one where nobody wrote, which would lose the bits that it is for."""
    params = make_params((600, 5), torch.float16, device_of(backend))
    optimizer = run(MAdam(params, **{**BASE, "beta1": 0.0}, master_weights=True, backend=backend), 0, 3)
    write(optimizer)
    twin = copy.deepcopy(optimizer)
    for param in params_of(twin):
        master = twin.state[param]["master"]
        written = master.half() != param
        assert written.any()
        assert not written.all()
        master[written] = param.detach()[written].float()
    assert_same_bits(run(optimizer, 4, 5), run(twin, 4, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skips", ["found_inf", "skip_nonfinite"])
def test_skipped_step_leaves_what_others_wrote(skips, backend):
    """Guards float16 parameters against their masters in a step that is none; and masters that overflow, underflow or
    are NaN in float16, of parameters that nobody wrote, against their roundings."""
    device = device_of(backend)
    nan, inf = torch.nan, torch.inf
    untouched = torch.tensor([7e4, -7e4, 1.0001, -1e-9, 1e-9, nan, inf], device=device)
    before, after = [0.5, 0.5, 0.5, -1e-9, 1e-9, nan, 7e4, inf], [3.0, nan, -inf, 0.0, -0.0, 1.0, 2.0, 1.0]
    master = torch.cat([untouched, torch.tensor(before, device=device)])
    param = torch.nn.Parameter(master.half())
    optimizer = MAdam([param], **BASE, master_weights=True, skip_nonfinite=skips == "skip_nonfinite", backend=backend)
    run(optimizer, 0, 1)
    optimizer.state[param]["master"].copy_(master)
    with torch.no_grad():
        param.copy_(torch.cat([untouched, torch.tensor(after, device=device)]))
    expected = torch.cat([untouched, torch.tensor(after, device=device)])
    given = param.detach().clone()
    if skips == "found_inf":
        optimizer.found_inf, optimizer.grad_scale = (torch.ones((), device=device) for _ in range(2))
    param.grad = torch.full_like(param, inf)
    for _ in range(2):
        optimizer.step()
        assert torch.equal(bits(param.detach()), bits(given))
        assert torch.equal(bits(optimizer.state[param]["master"]), bits(expected))
    assert optimizer.state[param]["step"] == 1


# --- stochastic rounding ---------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize("state_dtype", [None, BF16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_is_a_step_in_float32_rounded(algorithm, option, state_dtype):
    """Guards the parameter's own random numbers, for which element and which step, with and without 16-bit state."""
    options = {**BASE, **OPTIONS[option], "state_dtype": state_dtype, "rounding_seed": 7, "backend": "cpu"}
    optimizer = algorithm(make_params(SIZES, dtype=BF16), **options, stochastic_rounding=True)
    for step in range(4):
        wide = algorithm(float32_copy(params_of(optimizer)), **options)
        for ours, theirs in zip(params_of(optimizer), params_of(wide), strict=True):
            wide.state[theirs] = copy.deepcopy(optimizer.state[ours])
        for each in (optimizer, wide):
            set_grads(params_of(each), step, dtype=BF16)
            each.step()
        for number, (ours, theirs) in enumerate(zip(params_of(optimizer), params_of(wide), strict=True)):
            key = rounding.tensor_key(7, number)
            random = rounding.random_bits(key, step + 1, torch.arange(ours.numel()))[-1]
            expected = rounding.round_stochastically(theirs.detach(), random)
            assert torch.equal(bits(ours.detach()), bits(expected)), number
            for name in MOMENTS:
                assert torch.equal(bits(optimizer.state[ours][name]), bits(wide.state[theirs][name])), name


@needs_cpu_kernels
def test_elements_are_numbered_in_memory():
    """Guards against numbers by another order than the kernel's walk, or than the tensor lies in: the reference's."""
    base = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    params = [torch.nn.Parameter(base.permute(order).clone()) for order in ((0, 1, 2), (2, 0, 1))]
    params += [torch.nn.Parameter(base.permute(2, 1, 0).contiguous().permute(2, 1, 0))]
    pair = [MAdam(copy.deepcopy(params), **BASE, stochastic_rounding=True, backend=b) for b in ("cpu", "reference")]
    for optimizer in pair:
        run(optimizer, 0, 2)
    for ours, theirs in zip(*map(params_of, pair), strict=True):
        assert (ours == theirs).float().mean() > 0.98


# --- around the step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_the_run(kind, dtype, backend):
    """Guards against masters and numbers that a checkpoint does not bring back."""
    if kind == "stochastic_rounding" and dtype != BF16:
        return
    options = {**BASE, kind: True, "rounding_seed": 5, "backend": backend}
    through, first = (MAdam(make_params(dtype=dtype, device=device_of(backend)), **options) for _ in range(2))
    run(through, 0, 6)
    run(first, 0, 3)
    second = MAdam([torch.nn.Parameter(param.detach().clone()) for param in params_of(first)], **options)
    second.load_state_dict(through_file(first.state_dict()))
    assert_same_bits(through, run(second, 3, 6))
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert_same_bits(through, run(other, 3, 6))


def test_checkpoint_of_the_other_kind():
    """Guards against masters that a checkpoint silently drops or brings, and the way out that the message names."""
    without, with_masters = (MAdam(make_params((40,), BF16), **BASE, master_weights=m) for m in (False, True))
    for source, target in ((without, with_masters), (with_masters, without)):
        run(source, 0, 2)
        wanted = target.param_groups[0]["master_weights"]
        with pytest.raises(ValueError, match=rf"master_weights={not wanted}, but this optimizer has {wanted}"):
            target.load_state_dict(source.state_dict())
        other = MAdam(copy.deepcopy(params_of(source)), **BASE, master_weights=not wanted)
        other.load_state_dict(source.state_dict())
        other.param_groups[0]["master_weights"] = wanted
        run(other, 2, 4)
        (param,) = params_of(other)
        assert not wanted or no_number("master", other.state[param]["master"]).any()
    state = with_masters.state_dict()
    state["state"][0]["master"] = state["state"][0]["master"].float()
    with pytest.raises(ValueError, match=r"master in torch.float32, but that of a torch.bfloat16 .*bfloat16"):
        with_masters.load_state_dict(state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_overflow_and_missing_gradients_leave_everything(dtype, backend):
    """Guards masters and parameters that nothing has stepped."""
    device = device_of(backend)
    optimizer = run(MAdam(make_params((600, 5), dtype, device), **BASE, master_weights=True, backend=backend), 0, 2)
    before = {name: value.clone() for name, value in states(optimizer)}
    optimizer.found_inf, optimizer.grad_scale = (torch.ones((), device=device) for _ in range(2))
    run(optimizer, 2, 3)
    assert all(torch.equal(value, before[name]) for name, value in states(optimizer))
    optimizer.found_inf.zero_()
    params_of(optimizer)[0].grad = None
    optimizer.step()
    for name, value in states(optimizer):
        assert torch.equal(value, before[name]) == name.endswith("[0]"), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_parameter_that_never_has_a_gradient(dtype, backend):
    """Guards against asking for the master of a parameter that has no state, as one that is frozen or not yet used."""
    optimizer = MAdam(make_params((600, 5), dtype, device_of(backend)), **BASE, master_weights=True, backend=backend)
    frozen, param = params_of(optimizer)
    before = frozen.clone(), param.clone()
    for step in range(2):
        set_grads([param], step)
        optimizer.step()
    assert list(optimizer.state) == [param]
    assert torch.equal(frozen, before[0])
    assert not torch.equal(param, before[1])


def test_functional_form():
    """Guards the functional form's masters and keys: those of the optimizer with the same seed."""
    for kind in KINDS:
        optimizer = run(MAdam(make_params((5, 700), BF16), **BASE, **{kind: True}, rounding_seed=5), 0, 1)
        params = [param.detach().clone() for param in make_params((5, 700), BF16)]
        lists = [[torch.zeros_like(param, dtype=torch.float32) for param in params] for _ in range(4)]
        extra = {"stochastic_rounding": True}
        if kind == "master_weights":
            extra = {"masters": [torch.zeros_like(param, dtype=BF16) for param in params]}
        steps, grads = [torch.tensor(0) for _ in params], [param.grad for param in params_of(optimizer)]
        functional.madam_(params, grads, *lists, steps, **BASE, rounding_seed=5, **extra)
        for i, param in enumerate(params_of(optimizer)):
            assert torch.equal(param, params[i])
            if kind == "master_weights":
                master = optimizer.state[param]["master"]
                assert torch.equal(extra["masters"][i].view(torch.int16), master.view(torch.int16))


def test_bytes():
    """Guards the README's figures: 2 bytes of state beside bfloat16, 4 beside float16."""
    for dtype, expected in ((BF16, 2), (torch.float16, 4)):
        (param,) = params = make_params((100,), dtype)
        optimizer = run(MAdam(params, master_weights=True), 0, 1)
        assert optimizer.state[param]["master"].nbytes == expected * 100


# --- what is refused -------------------------------------------------------------------------------------------------


def test_pairs_that_do_not_fit():
    """Guards against an option accepted and ignored."""
    with pytest.raises(ValueError, match=r"exclude each other"):
        MAdam(make_params((2,), BF16), master_weights=True, stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"stochastic_rounding is for bfloat16, which params\[0\] .*torch.float16"):
        LaMAdam(make_params((2,), torch.float16), stochastic_rounding=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_that_do_not_fit_are_named(backend):
    """Guards the kernels against masters of another shape or dtype, or of a parameter that cannot have any."""
    device = device_of(backend)

    def step(master, dtype=BF16, masters=None):
        given = {f"{name}s": [torch.zeros(3, device=device)] for name in MOMENTS}
        given |= {name: [torch.ones(3, dtype=dtype, device=device)] for name in ("params", "grads")}
        masters = [master.to(device)] if masters is None else masters
        functional.madam_(**given, masters=masters, steps=[torch.tensor(0, device=device)], lr=0.1, backend=backend)

    step(torch.zeros(3, dtype=BF16))
    step(torch.zeros(0, dtype=BF16), torch.float32)
    with pytest.raises(
        RuntimeError, match=r"masters\[0\] .* must be dense and torch.bfloat16 as the master of params\[0\]"
    ):
        step(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"masters\[0\] .* must have the shape of params\[0\]"):
        step(torch.zeros(4, dtype=BF16))
    with pytest.raises(RuntimeError, match=r"masters\[0\] .* that share memory"):
        step(torch.zeros(1, dtype=BF16, device=device).expand(3))  # which a move to a device would make dense
    with pytest.raises(RuntimeError, match=r"masters\[0\] .* belongs to params\[0\] .*only bfloat16"):
        step(torch.zeros(3, dtype=BF16), torch.float32)
    with pytest.raises(RuntimeError, match=r"masters has 2 entries for 1 params"):
        step(None, masters=[torch.zeros(3, dtype=BF16, device=device)] * 2)
    with pytest.raises(RuntimeError, match=r"masters\[0\] .*meta\) must be on the device of params\[0\]"):
        step(None, masters=[torch.zeros(3, dtype=BF16, device="meta")])


WHOLE_MASTERS = {
    "shape": lambda master: master[:3].clone(),
    "dtype": torch.Tensor.bfloat16,
    "device": lambda master: master.to("meta"),
    "layout": torch.Tensor.to_sparse,
    "memory": lambda master: master[:1].expand(4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [*WHOLE_MASTERS, "parameter"])
def test_whole_masters_that_do_not_fit_are_named(case, backend):
    """Guards against torch's words, which name nothing, and a step that is done before the parameter is written."""
    params = make_params((2, 4, 3), torch.float16, device_of(backend))
    groups = [{"params": [("a", params[0])]}, {"params": [("c", params[2]), ("b", params[1])]}]
    optimizer = run(MAdam(groups, **BASE, master_weights=True, backend=backend), 0, 2)
    before = {name: value.clone() for name, value in states(optimizer)}
    state = optimizer.state[params[1]]
    if case == "parameter":
        params[1].data = params[1].data[:1].expand(4)
        words = r"has elements that share memory"
    else:
        state["master"] = WHOLE_MASTERS[case](state["master"])
        words = r"has a state whose 'master' is .* must be torch.float32 of shape \[4\]"
    with pytest.raises(RuntimeError, match=r"^maxva: param_groups\[1\]\['params'\]\[1\], 'b' " + words):
        run(optimizer, 2, 3)
    for name, value in states(optimizer):
        assert name in ("params[1][1]", "master[1][1]") or torch.equal(value, before[name]), name
    if case != "parameter":
        del state["master"]
        run(optimizer, 2, 3)


@needs_cpu_kernels
@pytest.mark.parametrize("option", BFLOAT16_OPTIONS)
def test_threads_and_views_change_nothing(option):
    """Guards against results that depend on who computes an element: by 1, 2, 3 and 7 threads."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(run(MAdam(make_params((70_001, 300_000), BF16), **{**BASE, **BFLOAT16_OPTIONS[option]}), 0, 3))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert_same_bits(runs[0], other)
