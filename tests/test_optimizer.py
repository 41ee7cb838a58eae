"""The optimizer classes: groups, schedulers, closures, hooks, GradScaler, copies, and tensors of every layout.

What a step computes is `test_step`'s; here runs are compared with runs, bit for bit unless a bound says otherwise.
"""

import copy
import pickle

import pytest
import torch
from cases import ALGORITHMS, BASE, assert_same_bits, backend_params, device_of, make_params, run, set_grads, states
from torch.nn import Parameter
from torch.optim import lr_scheduler

from maxva_kernels import LaMAdam, MAdam

on_backends = pytest.mark.parametrize("backend", backend_params())
both_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)

SHAPES = (3, (2, 5), 70)  # small: what matters here is not the arithmetic


def make(algorithm, backend, params, **options):
    return algorithm(params, backend=backend, **{**BASE, **options})


def values(optimizer):
    """What a step may change, copied."""
    return {name: value.clone() for name, value in states(optimizer)}


def assert_unchanged(optimizer, before):
    after = dict(states(optimizer))
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


# --- parameter groups ------------------------------------------------------------------------------------------------

GROUPS = [
    {},
    {"lr": 0.3, "beta1": 0.2, "beta2_range": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.0},
    {"amsgrad": True, "maximize": True, "decoupled_weight_decay": False, "eps_mode": "adam", "beta2_init": 0.4},
]


@on_backends
@both_algorithms
def test_groups_are_optimizers_of_their_own(algorithm, backend):
    """Guards against one group's hyperparameters, or its AMSGrad maxima, reaching another's tensors."""
    device = device_of(backend)
    together = make_params(SHAPES * 3, device=device)
    alone = make_params(SHAPES * 3, device=device)
    n = len(SHAPES)
    one = make(algorithm, backend, [{"params": together[i * n : (i + 1) * n], **GROUPS[i]} for i in range(3)])
    three = [make(algorithm, backend, alone[i * n : (i + 1) * n], **GROUPS[i]) for i in range(3)]
    for step in range(5):
        set_grads(together, step)
        set_grads(alone, step)
        one.step()
        for optimizer in three:
            optimizer.step()
    ours = dict(states(one))
    theirs = {name.replace("[0]", f"[{g}]", 1): v for g in range(3) for name, v in states(three[g])}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@on_backends
@both_algorithms
def test_clip_is_by_the_norm_over_all_groups(algorithm, backend):
    """Guards against a norm per group or per tensor: here every tensor's norm, the whole and the factor are powers of
    two, so that torch's clip_grad_norm_ (whose 1e-6 beside a norm of 256 rounds away) gives the same bits."""
    sizes = (1024, 1024, 256, 1024, 256, 256, 256)  # 4096 in all
    clipped, manual = ([Parameter(torch.ones(n, device=device_of(backend))) for n in sizes] for _ in range(2))
    ours = make(algorithm, backend, [{"params": clipped[:1]}, {"params": clipped[1:], "lr": 0.5}], max_grad_norm=2.0)
    plain = make(algorithm, backend, [{"params": manual[:1]}, {"params": manual[1:], "lr": 0.5}])
    for step in range(5):
        for a, b in zip(clipped, manual, strict=True):
            sign = torch.randn(a.shape, generator=torch.Generator().manual_seed(step)).sign().to(a.device)
            a.grad, b.grad = 4.0 * 2**step * sign, 4.0 * 2**step * sign  # the norm is 256 * 2^step
        ours.step()
        assert torch.nn.utils.clip_grad_norm_(manual, 2.0) == 256 * 2**step
        plain.step()
    assert_same_bits(ours, plain)


@on_backends
@both_algorithms
def test_clip_agrees_with_torch(algorithm, backend):
    """Guards against a wrong clip of ordinary gradients.

    The norms, fp32 sums of 4096 squares in trees of at most 16 levels, differ by 8 units of rounding each after the
    root; torch adds 1e-6 / 1000 relative; factor and product round a few times: less than 32 units. A first step moves
    by at most lr, and no faster than in proportion to the gradient. Its s is 0, or what the paper's form leaves of two
    float64 squares below 16.
    """
    unit = torch.finfo(torch.float32).eps
    clipped, manual = make_params((1000, 3000, 96)), make_params((1000, 3000, 96))
    clipped, manual = ([Parameter(p.detach().to(device_of(backend))) for p in ps] for ps in (clipped, manual))
    ours, plain = make(algorithm, backend, clipped, max_grad_norm=30.0), make(algorithm, backend, manual)
    for params in (clipped, manual):
        set_grads(params, 0, scale=30.0)
    ours.step()
    norm = torch.nn.utils.clip_grad_norm_(manual, 30.0)
    assert norm > 1000
    plain.step()
    theirs = dict(states(plain))
    for name, value in states(ours):
        atol = 32 * unit * BASE["lr"] if name.startswith("params") else 16 * torch.finfo(torch.float64).eps
        rtol = unit if name.startswith("params") else 32 * unit
        torch.testing.assert_close(value, theirs[name], atol=atol, rtol=rtol)


@on_backends
def test_clip_leaves_small_gradients_alone(backend):
    """Guards against gradients scaled up to the norm."""
    clipped, plain = (
        run(make(MAdam, backend, make_params(SHAPES, device=device_of(backend)), **options))
        for options in ({"max_grad_norm": 1e6}, {})
    )
    assert_same_bits(clipped, plain)


@on_backends
@both_algorithms
def test_group_added_mid_run_starts_afresh(algorithm, backend):
    """Guards against late parameters that inherit the optimizer's age: their first step must be a first step."""
    device = device_of(backend)
    old, late = make_params(SHAPES, device=device), make_params((5, 9), device=device, seed=1)
    optimizer = make(algorithm, backend, old)
    run(optimizer)
    optimizer.add_param_group({"params": late, "lr": 0.2})
    alone = make(algorithm, backend, make_params((5, 9), device=device, seed=1), lr=0.2)
    for step in range(3):
        set_grads(old, 4 + step)
        set_grads(late, step)
        optimizer.step()
    run(alone, last=3)
    expected = {name.replace("[0]", "[1]", 1): value for name, value in states(alone)}
    assert {name: v for name, v in states(optimizer) if "[1][" in name}.keys() == expected.keys()
    for name, value in states(optimizer):
        if "[1][" in name:
            assert torch.equal(value, expected[name]), name


@on_backends
@both_algorithms
def test_lazy_modules(algorithm, backend):
    """Guards optimizers that are made before a model's first batch, when some parameters have no shape yet."""
    device = device_of(backend)
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 1)).to(device)
    optimizer = algorithm(model.parameters(), **BASE, master_weights=True, backend=backend)
    for _ in range(2):
        model(torch.ones(2, 5, device=device)).sum().backward()
        optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (3, 5)


@on_backends
@both_algorithms
def test_parameter_that_joins_late_starts_afresh(algorithm, backend):
    """Guards against a shared step count or a moment from before: a coordinate without gradient until step 5 takes a
    first step then."""
    device = device_of(backend)
    early, late = make_params((4, 4), device=device)
    optimizer = make(algorithm, backend, [early, late])
    for step in range(5):
        set_grads([early], step)
        optimizer.step()
    assert late not in optimizer.state
    fresh = Parameter(late.detach().clone())
    alone = make(algorithm, backend, [fresh])
    for step in range(5, 8):
        set_grads([early, late], step)
        fresh.grad = late.grad.clone()
        optimizer.step()
        alone.step()
    assert torch.equal(late, fresh)
    assert optimizer.state[early]["step"].item() == 8
    for name, value in alone.state[fresh].items():
        assert torch.equal(value, optimizer.state[late][name]), name


@on_backends
def test_parameter_without_gradient_is_left_alone(backend):
    """Guards against steps, decay or state for a parameter that has no gradient this step, or never one."""
    device = device_of(backend)
    params = make_params((3, 3, 3), device=device)
    optimizer = make(MAdam, backend, params)
    set_grads(params[:2], 0)
    optimizer.step()
    before = values(optimizer)
    optimizer.zero_grad()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    after = dict(states(optimizer))
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed
    assert all(name.endswith("[0][0]") for name in changed)
    assert params[2] not in optimizer.state
    params[0].grad = None
    optimizer.step()  # no gradient at all


@on_backends
def test_zero_grad(backend):
    """Guards against a zero gradient taken for none: the one decays moments, the other leaves them."""
    param, *_ = make_params((5,), device=device_of(backend))
    optimizer = make(MAdam, backend, [param], weight_decay=0.0)
    run(optimizer)
    before = values(optimizer)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert_unchanged(optimizer, before)
    param.grad = torch.ones_like(param)
    kept = param.grad
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert param.grad is kept
    state = optimizer.state[param]
    assert state["step"].item() == 5
    assert (state["exp_avg"].abs() < before["exp_avg[0][0]"].abs()).all()


@on_backends
@both_algorithms
def test_amsgrad_switched_on_and_off_mid_run(algorithm, backend):
    """Guards against a missing maximum: the first one is the current denominator, so that step is as without."""
    device = device_of(backend)
    plain = run(make(algorithm, backend, make_params(SHAPES, device=device)))
    switched = run(make(algorithm, backend, make_params(SHAPES, device=device)))
    switched.param_groups[0]["amsgrad"] = True
    run(plain, 4, 5)
    run(switched, 4, 5)
    for a, b in zip(plain.param_groups[0]["params"], switched.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)
        maximum = switched.state[b]["max_denom"].clone()
        assert (maximum > 0).all()
    run(switched, 5, 7)
    assert (switched.state[b]["max_denom"] >= maximum).all()
    maximum = switched.state[b]["max_denom"].clone()
    switched.param_groups[0]["amsgrad"] = False
    run(switched, 7, 9)
    assert torch.equal(switched.state[b]["max_denom"], maximum)


@on_backends
def test_decoupled_decay_does_not_enter_the_moments_and_l2_does(backend):
    """Guards against the two decays exchanged: with a zero gradient one only shrinks, the other makes a gradient."""
    (decoupled,), (l2,) = (make_params((6,), device=device_of(backend)) for _ in range(2))
    start = decoupled.detach().clone()
    first = make(MAdam, backend, [decoupled])
    second = make(MAdam, backend, [l2], decoupled_weight_decay=False)
    decoupled.grad, l2.grad = torch.zeros_like(decoupled), torch.zeros_like(l2)
    first.step()
    second.step()
    # Two products and a difference in fp32, three roundings of at most half a unit.
    expected = start.double() * (1 - BASE["lr"] * BASE["weight_decay"])
    bound = 2 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(decoupled.double(), expected, rtol=bound, atol=0.0)
    assert not first.state[decoupled]["grad_mean"].any()
    grad = BASE["weight_decay"] * start.double()
    torch.testing.assert_close(second.state[l2]["grad_mean"].double(), grad, rtol=bound, atol=0.0)


@on_backends
@both_algorithms
def test_maximize_is_the_descent_of_the_negated_gradient(algorithm, backend):
    """Guards against a sign lost on the way, with the clip too."""
    device = device_of(backend)
    up = make(algorithm, backend, make_params(SHAPES, device=device), maximize=True, max_grad_norm=1.0)
    down = make(algorithm, backend, make_params(SHAPES, device=device), max_grad_norm=1.0)
    for step in range(4):
        set_grads(up.param_groups[0]["params"], step)
        set_grads(down.param_groups[0]["params"], step)
        for param in down.param_groups[0]["params"]:
            param.grad.neg_()
        up.step()
        down.step()
    assert_same_bits(up, down)


# --- learning rate and schedulers ------------------------------------------------------------------------------------

SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.75**epoch),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10, cycle_momentum=False),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
}


@on_backends
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
def test_lr_tensor_is_followed(backend, scheduler, shape):
    """Guards against an lr read once: a scheduler changes the tensor in place. In float64 it is the float's twin."""
    device = device_of(backend)
    rates = (0.125, torch.full(shape, 0.125, dtype=torch.float64))
    optimizers = [make(MAdam, backend, make_params(((), 5), device=device), lr=rate) for rate in rates]
    seen = []
    for optimizer in optimizers:
        schedule = SCHEDULERS[scheduler](optimizer)
        for step in range(6):
            run(optimizer, step, step + 1)
            schedule.step(*([1.0] if scheduler == "plateau" else []))
            seen.append(float(optimizer.param_groups[0]["lr"]))
    assert seen[:6] == seen[6:]
    assert len(set(seen)) > 3
    assert_same_bits(*optimizers)


@on_backends
@both_algorithms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lr_tensor_of_any_dtype(algorithm, backend, dtype):
    """Guards against arithmetic in the lr tensor's own precision: 0.125 is exact in all, lr / (1 - 0.7^t) is not."""
    device = device_of(backend)
    rates = (0.125, torch.tensor(0.125, dtype=dtype))
    assert_same_bits(*(run(make(algorithm, backend, make_params(SHAPES, torch.float64, device), lr=r)) for r in rates))


@on_backends
def test_lr_tensor_is_not_written(backend):
    """Guards against a shared lr tensor changed by the step."""
    rate = torch.tensor(0.5)
    run(make(MAdam, backend, make_params(SHAPES, device=device_of(backend)), lr=rate))
    assert rate.item() == 0.5
    assert rate._version == 0


def test_schedules_that_end_beside_zero():
    """Guards the last step of a run: torch's LinearLR multiplies its way down, to -4e-20 here."""
    params = make_params((3,))
    optimizer = MAdam(params, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, total_iters=7)
    for step in range(9):
        set_grads(params, step)
        before = params[0].detach().clone()
        optimizer.step()
        assert torch.equal(params[0], before) == (step >= 7)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] <= 0
    optimizer.param_groups[0]["lr"] = -1e-3
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step()


@pytest.mark.parametrize("seed", [1.5, "7", None], ids=repr)
def test_seed_is_a_whole_number(seed):
    """Guards an error in place of one from the depths of a step."""
    with pytest.raises(TypeError, match="rounding_seed must be a whole number"):
        MAdam(make_params((3,)), rounding_seed=seed)


@on_backends
def test_lr_zero_moves_nothing_and_learns_moments(backend):
    """Guards against lr = 0 (every warm-up's first step) refused or skipped."""
    params = make_params(SHAPES, device=device_of(backend))
    start = [param.detach().clone() for param in params]
    optimizer = run(make(MAdam, backend, params, lr=0.0))
    assert all(torch.equal(a, b) for a, b in zip(start, params, strict=True))
    assert optimizer.state[params[0]]["grad_mean"].any()


# --- closures, hooks, autograd, profiler -----------------------------------------------------------------------------


@on_backends
def test_closure(backend):
    """Guards against a closure called without autograd, or its loss lost."""
    (param,) = make_params((4,), device=device_of(backend))
    optimizer = make(MAdam, backend, [param])
    before = param.detach().clone()

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    expected = (before**2).sum()
    assert torch.equal(optimizer.step(closure).detach(), expected)
    assert not torch.equal(param, before)
    assert optimizer.step() is None


def test_step_leaves_grad_mode_as_it_was():
    """Guards against gradients left disabled after the step."""
    run(make(MAdam, "auto", make_params(SHAPES)))
    assert torch.is_grad_enabled()


@on_backends
def test_step_hooks(backend):
    """Guards against a step() that torch's hooks do not see, once each and in order."""
    params = make_params((2,), device=device_of(backend))
    for algorithm in ALGORITHMS:
        optimizer = make(algorithm, backend, params)
        start, seen = params[0].detach().clone(), []
        optimizer.register_step_pre_hook(
            lambda *_, start=start, seen=seen: seen.append(("pre", torch.equal(params[0], start)))
        )
        optimizer.register_step_post_hook(
            lambda *_, start=start, seen=seen: seen.append(("post", torch.equal(params[0], start)))
        )
        set_grads(params, 0)
        optimizer.step()
        assert seen == [("pre", True), ("post", False)]


@on_backends
def test_version_counter_is_bumped(backend):
    """Guards against a kernel that writes behind autograd's back: backward through the old value must raise."""
    (param,) = make_params((4,), device=device_of(backend))
    optimizer = make(MAdam, backend, [param])
    loss = (param**2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_backends
def test_parameters_stay_leaves(backend):
    """Guards against a step recorded by autograd, or a parameter replaced by another tensor."""
    (param,) = make_params((4,), device=device_of(backend))
    address = param.data_ptr()
    run(make(MAdam, backend, [param]))
    assert param.is_leaf
    assert param.requires_grad
    assert param.data_ptr() == address


def test_profiler_range():
    """Guards against a step that profilers cannot find: torch's range names the class."""
    optimizers = [make(algorithm, "auto", make_params(SHAPES)) for algorithm in ALGORITHMS]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for optimizer in optimizers:
            run(optimizer, last=1)
    ranges = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#MAdam.step", "Optimizer.step#LaMAdam.step"} <= ranges


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_are_only_read(backend, dtype):
    """Guards against unscaling, clipping, maximize or L2 done in the gradient, as torch's fused Adam does."""
    params = make_params((5, 1000, 17), dtype, device_of(backend))
    optimizer = make(MAdam, backend, params, maximize=True, max_grad_norm=0.1, decoupled_weight_decay=False)
    set_grads(params, 0)
    optimizer.grad_scale = torch.tensor(8.0, device=device_of(backend))
    grads = [param.grad.clone() for param in params]
    versions = [param.grad._version for param in params]
    optimizer.step()
    for param, grad, version in zip(params, grads, versions, strict=True):
        assert torch.equal(param.grad, grad)
        assert param.grad._version == version


# --- GradScaler ------------------------------------------------------------------------------------------------------


def scaled_loss(params, step):
    """A loss whose gradients are those of set_grads, exactly, and stay exact when scaled by a power of two."""
    set_grads(params, step)
    targets = [param.grad for param in params]
    for param in params:
        param.grad = None
    return sum((param * target).sum() for param, target in zip(params, targets, strict=True))


@on_backends
@both_algorithms
@pytest.mark.parametrize("unscale", [False, True], ids=["in_step", "unscale_"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clip"])
def test_grad_scaler(algorithm, backend, unscale, options):
    """Guards against gradients unscaled twice or not at all, a lost found_inf, and a clip before unscaling.

    An overflow leaves everything as it was; all other steps are those of the unscaled run, bit for bit: scales are
    powers of two.
    """
    device = device_of(backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2)
    ours = make(algorithm, backend, make_params(SHAPES, device=device), **options)
    plain = make(algorithm, backend, make_params(SHAPES, device=device), **options)
    params = ours.param_groups[0]["params"]
    scales, done = [], 0
    for attempt in range(8):
        scales.append(scaler.get_scale())
        scaler.scale(scaled_loss(params, done)).backward()
        overflow = attempt in (0, 3)  # also on the very first step
        if overflow:
            params[1].grad[1, 2] = float("inf")
        before = values(ours)
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if overflow:
            after = dict(states(ours))
            assert all(torch.equal(after[name], value) for name, value in before.items())
            assert all(not value.any() for name, value in after.items() if name not in before), "state is still fresh"
        else:
            scaled_loss(plain.param_groups[0]["params"], done).backward()
            plain.step()
            done += 1
            assert_same_bits(ours, plain)
        ours.zero_grad()
        plain.zero_grad()
    assert scales == [1024, 512, 512, 1024, 512, 512, 1024, 1024]


@on_backends
@pytest.mark.parametrize("found", [1.0, 2.0, float("inf"), float("nan")])
def test_any_found_inf_skips(backend, found):
    """Guards against `found_inf == 1`, which overlooks the sum of several devices' flags."""
    optimizer = run(make(MAdam, backend, make_params(SHAPES, device=device_of(backend))))
    before = values(optimizer)
    optimizer.found_inf = torch.tensor(found, device=device_of(backend))
    optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.found_inf = torch.tensor(0.0, device=device_of(backend))
    optimizer.step()
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].item() == 5


# --- copies ----------------------------------------------------------------------------------------------------------


@on_backends
@both_algorithms
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_bit_for_bit(algorithm, backend, duplicate):
    """Guards against options kept outside the groups and lost in a copy, and against state shared with it."""
    device = device_of(backend)
    groups = [{"params": make_params((3, 4), device=device)}, {"params": make_params((5,), torch.bfloat16, device)}]
    optimizer = run(make(algorithm, backend, groups, max_grad_norm=0.5, amsgrad=True))
    twin = duplicate(optimizer)
    assert (twin.max_grad_norm, twin.backend, twin.capturable) == (0.5, backend, False)
    assert_same_bits(optimizer, twin)
    before = values(twin)
    run(optimizer, 4, 7)
    assert_unchanged(twin, before)
    run(twin, 4, 7)
    assert_same_bits(optimizer, twin)


def test_copy_before_the_first_step_and_its_groups():
    """Guards against a copy that cannot take another group: defaults must survive."""
    twin = pickle.loads(pickle.dumps(make(MAdam, "auto", make_params(SHAPES), lr=0.25)))
    twin.add_param_group({"params": make_params((2,))})
    assert twin.param_groups[1]["lr"] == 0.25
    run(twin)


# --- layouts, storage, dtypes ----------------------------------------------------------------------------------------


def shifted(tensor, offset):
    """The tensor's values, `offset` elements into a storage that is aligned to 64 bytes."""
    storage = torch.full((tensor.numel() + offset,), 9.0, dtype=tensor.dtype, device=tensor.device)
    view = storage[offset:].view(tensor.shape)
    return view.copy_(tensor)


# Each keeps values and shape (4, 6, 5, 7 or its like) and changes where the elements lie.
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "every_other": lambda x: torch.stack([x, x + 9], dim=-1)[..., 0],
    "slice": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 0), value=9.0)[:, :, 1:, 1:-2],
    "offset_1": lambda x: shifted(x, 1),
    "offset_2": lambda x: shifted(x, 2),
    "offset_3": lambda x: shifted(x, 3),
}


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_parameters_and_gradients_changes_no_bit(backend, dtype, layout):
    """Guards against operands walked in memory order although their strides differ, and against vector loads that
    assume alignment: one parameter for each gradient layout."""
    device = device_of(backend)
    start = torch.randn((4, 6, 5, 7), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    ours = [Parameter(LAYOUTS[layout](start)) for _ in LAYOUTS]
    plain = [Parameter(start.clone()) for _ in LAYOUTS]
    one, other = make(MAdam, backend, ours, amsgrad=True), make(MAdam, backend, plain, amsgrad=True)
    strides = [param.stride() for param in ours]
    for step in range(3):
        set_grads(plain, step)
        for param, contiguous, grad_layout in zip(ours, plain, LAYOUTS.values(), strict=True):
            param.grad = grad_layout(contiguous.grad)
        one.step()
        other.step()
    assert [param.stride() for param in ours] == strides
    assert_same_bits(one, other)


@on_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_of_any_layout(backend, layout):
    """Guards against a norm that counts what lies between the elements, or some elements twice: 1024 times 4 is exact
    in every order, and so the step is that of a gradient of half the size."""
    device = device_of(backend)
    (ours,), (plain,) = (make_params(((4, 8, 8, 4),), device=device) for _ in range(2))
    sign = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0)).sign().to(device)
    ours.grad, plain.grad = LAYOUTS[layout](2 * sign), sign
    one, other = make(MAdam, backend, [ours], max_grad_norm=32.0), make(MAdam, backend, [plain])
    one.step()
    other.step()
    assert_same_bits(one, other)


@on_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_of_another_layout_changes_no_bit(backend, layout):
    """Guards against state (from a checkpoint, or a parameter whose layout changed) read in the parameter's order."""
    device = device_of(backend)
    start = torch.randn((4, 6, 5, 7), generator=torch.Generator().manual_seed(0)).to(device)
    ours, plain = Parameter(start.clone()), Parameter(start.clone())
    one, other = make(MAdam, backend, [ours], amsgrad=True), make(MAdam, backend, [plain], amsgrad=True)
    run(one)
    run(other)
    for name in ("exp_avg", "grad_mean", "grad_var", "weight_sum", "max_denom"):
        one.state[ours][name] = LAYOUTS[layout](one.state[ours][name])
    run(one, 4, 6)
    run(other, 4, 6)
    assert_same_bits(one, other)


@on_backends
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "permuted"])
def test_state_is_laid_out_as_its_parameter(backend, layout):
    """Guards against state made contiguous beside a parameter that is not: it would be copied in every step."""
    param = Parameter(LAYOUTS[layout](torch.ones((4, 6, 5, 7), device=device_of(backend))))
    optimizer = run(make(MAdam, backend, [param], amsgrad=True), last=1)
    assert {value.stride() for name, value in optimizer.state[param].items() if name != "step"} == {param.stride()}


@on_backends
def test_slice_writes_nothing_beside_it(backend):
    """Guards against a parameter that is a slice written back over its neighbours."""
    base = torch.full((6, 8), 7.0, device=device_of(backend))
    param = Parameter(base[1:5, 2:7:2])
    run(make(MAdam, backend, [param]))
    inside = torch.zeros_like(base, dtype=torch.bool)
    inside[1:5, 2:7:2] = True
    assert (base[~inside] == 7.0).all()
    assert (base[inside] != 7.0).all()


@on_backends
@both_algorithms
def test_empty_and_0_dim_tensors(algorithm, backend):
    """Guards against zero-size tensors that fail, or that shift their neighbours' work; they step like any other."""
    device = device_of(backend)
    shapes = (0, (), (3, 0, 2), 5, 0)
    mixed = make_params(shapes, device=device)
    optimizer = run(make(algorithm, backend, mixed, max_grad_norm=1.0, amsgrad=True))
    assert [optimizer.state[param]["step"].item() for param in mixed] == [4] * 5
    assert [optimizer.state[param]["exp_avg"].shape for param in mixed] == [param.shape for param in mixed]
    assert mixed[1].isfinite().all()
    only_empty = run(make(algorithm, backend, make_params((0,), device=device), max_grad_norm=1.0))
    assert only_empty.state[only_empty.param_groups[0]["params"][0]]["step"].item() == 4


@on_backends
def test_storage_swapped_under_a_parameter(backend):
    """Guards against pointers kept between steps: param.data = ... moves the parameter."""
    (ours,), (plain,) = (make_params((100,), device=device_of(backend)) for _ in range(2))
    one, other = run(make(MAdam, backend, [ours])), run(make(MAdam, backend, [plain]))
    old = ours.data
    kept = old.clone()
    ours.data = shifted(ours.data, 1)
    run(one, 4, 6)
    run(other, 4, 6)
    assert_same_bits(one, other)
    assert torch.equal(old, kept), "the old storage is no longer the parameter's"


@on_backends
def test_mixed_dtypes_in_one_group(backend):
    """Guards against one dtype decided for a whole group: each parameter steps as if alone, fp64 with fp64 state."""
    device = device_of(backend)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32)
    mixed = [make_params((33,), dtype, device)[0] for dtype in dtypes]
    together = make(MAdam, backend, mixed)
    alone = [make(MAdam, backend, make_params((33,), dtype, device)) for dtype in dtypes]
    for step in range(4):
        for param, optimizer in zip(mixed, alone, strict=True):
            set_grads([param], step)
            set_grads(optimizer.param_groups[0]["params"], step)
            optimizer.step()
        together.step()
    for param, optimizer in zip(mixed, alone, strict=True):
        twin = optimizer.param_groups[0]["params"][0]
        assert torch.equal(param, twin)
        expected = torch.float64 if param.dtype == torch.float64 else torch.float32
        for name, value in together.state[param].items():
            assert torch.equal(value, optimizer.state[twin][name]), name
            assert value.dtype == (torch.int64 if name == "step" else expected)


@on_backends
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradient_of_another_dtype(backend, dtype, grad_dtype):
    """Guards against a gradient rounded to the parameter's dtype: u of the first step is the gradient itself (in the
    paper's form after a product and a division)."""
    (param,) = make_params((100,), dtype, device_of(backend))
    optimizer = make(MAdam, backend, [param])
    set_grads([param], 0, dtype=grad_dtype)
    assert param.grad.dtype == grad_dtype
    optimizer.step()
    mean = optimizer.state[param]["grad_mean"]
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = 2 * torch.finfo(torch.float64).eps if backend == "reference" else 0.0
    torch.testing.assert_close(mean, param.grad.to(mean.dtype), rtol=bound, atol=0.0)


@on_backends
def test_16_bit_parameters_round_only_when_stored(backend):
    """Guards against arithmetic in bf16: a step from fp32 copies, rounded once, gives the same bits."""
    (ours,) = make_params((1000,), torch.bfloat16, device_of(backend))
    wide = Parameter(ours.detach().float())
    one, other = make(MAdam, backend, [ours]), make(MAdam, backend, [wide])
    for step in range(3):
        set_grads([ours], step)
        wide.data.copy_(ours.data)
        wide.grad = ours.grad.float()
        one.step()
        other.step()
        assert torch.equal(ours, wide.bfloat16())


@on_backends
@both_algorithms
def test_lazily_negated_gradient(algorithm, backend):
    """Guards against a kernel that reads the memory of a view whose sign is still to be applied."""
    (ours,), (plain,) = (make_params((9,), device=device_of(backend)) for _ in range(2))
    ours.grad = torch._neg_view(torch.full_like(ours, 0.5))  # as of z.conj().imag
    plain.grad = torch.full_like(plain, -0.5)
    one, other = make(algorithm, backend, [ours]), make(algorithm, backend, [plain])
    one.step()
    other.step()
    assert_same_bits(one, other)


# --- what users see --------------------------------------------------------------------------------------------------


def test_defaults():
    """Guards against a default that departs from the paper or from torch's names."""
    expected = {"lr": 1e-3, "beta1": 0.9, "beta2_range": (0.5, 0.999), "weight_decay": 0.0, "beta2_init": None}
    expected |= {"decoupled_weight_decay": True, "amsgrad": False, "maximize": False, "eps_mode": "paper"}
    for algorithm, eps in ((MAdam, 1e-8), (LaMAdam, 1e-15)):
        optimizer = algorithm(make_params((2,)))
        assert {**expected, "eps": eps}.items() <= optimizer.defaults.items()
        assert optimizer.param_groups[0]["eps"] == eps
        assert (optimizer.max_grad_norm, optimizer.capturable, optimizer.backend) == (None, False, "auto")


def test_positional_arguments():
    """Guards against a changed order of the positional arguments."""
    optimizer = MAdam(make_params((2,)), 0.5, 0.8, (0.6, 0.9), 1e-3, 0.2)
    group = optimizer.param_groups[0]
    names = ("lr", "beta1", "beta2_range", "eps", "weight_decay")
    assert tuple(group[name] for name in names) == (0.5, 0.8, (0.6, 0.9), 1e-3, 0.2)


def test_repr():
    """Guards against a repr that hides the class or a group's hyperparameters."""
    text = repr(LaMAdam([{"params": make_params((2,))}, {"params": make_params((2,)), "lr": 0.25}]))
    assert text.startswith("LaMAdam (")
    assert "Parameter Group 1" in text
    assert "lr: 0.25" in text
    assert "beta2_range: (0.5, 0.999)" in text


def test_named_parameters():
    """Guards against named parameters refused, or their names lost."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = MAdam(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    before = model[0].weight.detach().clone()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_backend_that_cannot_run_says_so(backend):
    """Guards against a silent fallback to another backend than the one asked for, and an error that leaves it there."""
    remedies = "MAXVA_BUILD=cuda|backend='auto'|pip install triton"
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run on device cpu: .*({remedies})"):
        MAdam(make_params((2,)), backend=backend)


def test_unknown_backend():
    """Guards against a misspelt backend taken for auto, in the constructor and when it is changed later."""
    with pytest.raises(ValueError, match=r"backend must be one of .*'cpu'.*got 'gpu'"):
        MAdam(make_params((2,)), backend="gpu")
    optimizer = run(make(MAdam, "auto", make_params((2,))))
    before = values(optimizer)
    optimizer.backend = "gpu"
    with pytest.raises(ValueError, match="got 'gpu'"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_device_without_backend():
    """Guards against an error that does not say what is wrong with the device."""
    with pytest.raises(RuntimeError, match=r"no backend can run on device meta.*to_empty"):
        MAdam([Parameter(torch.ones(2, device="meta"))])


@both_algorithms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", backend_params(oracle=False))
def test_backend_may_change_at_any_step(algorithm, backend, dtype):
    """Guards against state that means something else on another backend.

    The run changes backend at each step; a copy that takes the same step on the other one must agree. All quantities
    are of order 1 and some 20 operations lie between them: 64 units of rounding, and for w the distance to 1 below
    which kernels set it to 1.
    """
    unit = torch.finfo(dtype).eps
    optimizer = make(algorithm, backend, make_params((1, 33, 513), dtype, device_of(backend)))
    for step in range(8):
        names = (backend, "reference") if step % 2 else ("reference", backend)
        twin = copy.deepcopy(optimizer)
        for each, name in zip((optimizer, twin), names, strict=True):
            each.backend = name
            run(each, step, step + 1)
        theirs = dict(states(twin))
        for name, value in states(optimizer):
            bound = 64 * unit
            if name.startswith("weight_sum"):
                bound = max(bound, 2.0**-14 if dtype == torch.float32 else 2.0**-43)
            torch.testing.assert_close(value, theirs[name], rtol=bound, atol=bound)


def test_regression_is_learnt():
    """Guards against everything at once, as a user would see it."""
    torch.manual_seed(0)
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    target = data @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 0.25
    for algorithm in ALGORITHMS:
        model = torch.nn.Linear(4, 1)
        optimizer = algorithm(model.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(data), target)
            loss.backward()
            optimizer.step()
        assert loss < 1e-2
