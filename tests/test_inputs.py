"""Bad input: the error names what is wrong and says what to do, and nothing has been changed when it is raised."""

import re
import warnings

import pytest
import torch
from cases import ALGORITHMS, BASE, backend_params, device_of, make_params, set_grads, states
from torch.nn import Parameter

from maxva_kernels import MAdam, checks, functional
from maxva_kernels.backends import registry
from maxva_kernels.groups import with_gradients

NAN, INF = float("nan"), float("inf")

on_backends = pytest.mark.parametrize("backend", backend_params())
# CSR tensors warn that they are young.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse")


# --- hyperparameters -------------------------------------------------------------------------------------------------

# Each with the words its error must have besides the argument's name: what was found.
BAD_HYPERPARAMETERS = [
    ("lr", -0.1),
    ("lr", NAN),
    ("lr", INF),
    ("lr", torch.tensor(-0.1)),
    ("lr", torch.tensor([NAN])),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor([])),
    ("lr", torch.tensor(0.1 + 1j)),
    ("lr", "fast"),
    ("lr", None),
    ("beta1", -0.1),
    ("beta1", 1.0),
    ("beta1", NAN),
    ("beta1", "high"),
    ("beta1", (0.9, 0.999)),  # torch's betas
    ("beta2_range", (0.0, 0.9)),
    ("beta2_range", (-0.5, 0.9)),
    ("beta2_range", (0.9, 0.5)),
    ("beta2_range", (0.5, 1.1)),
    ("beta2_range", (NAN, 0.9)),
    ("beta2_range", (0.5, NAN)),
    ("beta2_range", (0.5, None)),
    ("beta2_range", ("0.5", "0.9")),
    ("beta2_range", 0.999),
    ("beta2_range", (0.5, 0.9, 0.99)),
    ("beta2_range", None),
    ("eps", -1e-8),
    ("eps", NAN),
    ("eps", INF),
    ("eps", "small"),
    ("weight_decay", -0.1),
    ("weight_decay", NAN),
    ("weight_decay", INF),
    ("weight_decay", None),
    ("beta2_init", -0.1),
    ("beta2_init", 1.0),
    ("beta2_init", NAN),
    ("beta2_init", "0.9"),
    ("eps_mode", "Adam"),
    ("eps_mode", None),
    ("max_grad_norm", 0.0),
    ("max_grad_norm", -1.0),
    ("max_grad_norm", NAN),
    ("max_grad_norm", "1.0"),
    ("backend", "gpu"),
    ("backend", None),
]
CONSTRUCTOR_ONLY = ("max_grad_norm", "backend")
by_name = [f"{name}={value}" for name, value in BAD_HYPERPARAMETERS]
hyperparameters = pytest.mark.parametrize(("name", "value"), BAD_HYPERPARAMETERS, ids=by_name)


@hyperparameters
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_constructor_names_the_argument(algorithm, name, value):
    """Guards against values out of range accepted (NaN passes many a comparison), and against errors that name none."""
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must .* got "):
        algorithm(make_params((2,)), **{name: value})


@pytest.mark.parametrize("init", [1.0, 1.5])
def test_first_gradient_must_weigh_something(init):
    """Guards against beta2_init = 1 with an upper bound of 1, which would leave w at 0 and divide by it."""
    with pytest.raises(ValueError, match=rf"beta2_init must be .* got {init}"):
        MAdam(make_params((2,)), beta2_range=(0.5, 1.0), beta2_init=init)


@hyperparameters
def test_group_is_refused_as_a_whole(name, value):
    """Guards against values checked only as defaults, and against a refused group left in the optimizer."""
    if name in CONSTRUCTOR_ONLY:
        pytest.skip("not an option of groups")
    optimizer = MAdam(make_params((2,)))
    with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
        optimizer.add_param_group({"params": make_params((3,)), name: value})
    assert len(optimizer.param_groups) == 1


@hyperparameters
@on_backends
def test_step_refuses_what_was_set_later(name, value, backend):
    """Guards against a scheduler's or a user's bad value in the last group met after the first has been stepped.

    The value of an lr tensor is not read by steps, which on a GPU would wait for it.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        pytest.skip("not read in a step")
    device = device_of(backend)
    optimizer = MAdam(
        [{"params": make_params((2,), device=device)}, {"params": make_params((3,), device=device)}], backend=backend
    )
    for group in optimizer.param_groups:
        set_grads(group["params"], 0)
    if name in CONSTRUCTOR_ONLY:
        setattr(optimizer, name, value)
    else:
        optimizer.param_groups[1][name] = value
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=f"{name} must"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@hyperparameters
def test_functional_form_names_the_argument(name, value):
    """Guards against the functional form trusting its caller."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        pytest.skip("not read in a step")
    lists = make_lists([torch.ones(2)])
    before = cloned(lists)
    with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
        functional.madam_(**lists, **{"lr": 0.1, name: value})
    assert_equal(entries(lists), before)


def test_parameters_torch_refuses():
    """Guards against torch's own checks of the parameters bypassed."""
    (param,) = make_params((2,))
    with pytest.raises(TypeError, match="iterable of Tensors"):
        MAdam(param)
    with pytest.raises(ValueError, match="empty parameter list"):
        MAdam([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        MAdam([{"params": [param]}, {"params": [param]}])
    with pytest.raises(ValueError, match="non-leaf"):
        MAdam([param * 2])


# --- parameters that cannot be optimised -----------------------------------------------------------------------------

BAD_PARAMETERS = {
    "coo": (lambda: torch.eye(3).to_sparse(), ["sparse", "dense"]),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), ["sparse", "dense"]),
    "complex": (lambda: torch.ones(2, 3, dtype=torch.complex64), ["[2, 3]", "torch.complex64", "view_as_real"]),
    "int": (lambda: torch.ones(2, 3, dtype=torch.int64), ["[2, 3]", "torch.int64", "float32", "strides [3, 1]", "cpu"]),
    "bool": (lambda: torch.ones(2, dtype=torch.bool), ["[2]", "torch.bool", "float32"]),
    "float8": (lambda: torch.ones(2).to(torch.float8_e4m3fn), ["[2]", "torch.float8_e4m3fn", "float32"]),
}


@on_backends
@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_constructor_names_the_parameter(kind, backend):
    """Guards against parameters refused only in the middle of training, or by an error that names none."""
    make_tensor, words = BAD_PARAMETERS[kind]
    device = device_of(backend)
    bad = Parameter(make_tensor().to(device), requires_grad=False)
    groups = [
        {"params": [("fine", make_params((2,), device=device)[0])]},
        {"params": [("also fine", make_params((2,), device=device)[0]), ("bad.weight", bad)]},
    ]
    with pytest.raises(RuntimeError) as raised:
        MAdam(groups, backend=backend)
    for word in ("params[1]", "param_groups[1]['params'][1]", "'bad.weight'", *words):
        assert word.replace("cpu", device.type) in str(raised.value), str(raised.value)


# --- tensors that do not fit, in the optimizer -----------------------------------------------------------------------


def snapshot(optimizer):
    return {name: value.clone() for name, value in states(optimizer)}, len(optimizer.state)


def assert_unchanged(optimizer, before):
    values, count = before
    assert len(optimizer.state) == count, "no state may have been made"
    assert_equal(dict(states(optimizer)), values)


def assert_equal(after, before):
    assert after.keys() == before.keys()
    for name, value in before.items():
        if value.device.type != "meta":
            assert torch.equal(after[name].to_dense(), value.to_dense()), name


def set_grad(make_grad):
    def corrupt(param, state):
        param.grad = None
        param.grad_dtype = None  # lets a gradient's dtype differ
        param.grad = make_grad(param)

    return corrupt


def set_state(name, edit):
    def corrupt(param, state):
        state[name] = edit(state[name])

    return corrupt


def set_grad_data(param, state):
    param.grad.data = torch.ones(5, device=param.device)


def expand_param(param, state):
    param.data = torch.ones(4, 1, device=param.device).expand(4, 3)


def widen_param(param, state):
    param.grad = None
    param.data = param.data.double()
    param.grad_dtype = None
    param.grad = torch.ones_like(param)


# What is done to the last parameter, of shape (4, 3), and the words that must be in the error besides those that tell
# whose tensor it is. Those of the first table need no state, so they may meet the very first step too.
BAD_TENSORS = {
    "coo gradient": (set_grad(lambda p: torch.ones_like(p).to_sparse()), ["grads[2]", "sparse", "to_dense()"]),
    "complex gradient": (
        set_grad(lambda p: torch.ones_like(p, dtype=torch.complex64)),
        ["grads[2]", "[4, 3]", "omplex"],
    ),
    "int gradient": (set_grad(lambda p: torch.ones_like(p, dtype=torch.int64)), ["grads[2]", "[4, 3]", "torch.int64"]),
    "shape of gradient": (set_grad_data, ["grads[2]", "[5]", "strides [1]", "[4, 3]", "must have the shape"]),
    "expanded parameter": (expand_param, ["params[2]", "[4, 3]", "strides [1, 0]", "share memory", "clone()"]),
}
BAD_STATES = {
    "parameter of another dtype": (widen_param, ["exp_avgs[2]", "torch.float32", "must be torch.float64"]),
    "shape of exp_avg": (set_state("exp_avg", lambda s: s.t()), ["exp_avgs[2]", "[3, 4]", "[4, 3]", "shape"]),
    "shape of grad_var": (set_state("grad_var", lambda s: s[:2]), ["grad_vars[2]", "[2, 3]", "[4, 3]", "shape"]),
    "dtype of grad_mean": (
        set_state("grad_mean", torch.Tensor.bfloat16),
        ["grad_means[2]", "torch.bfloat16", "must be torch.float32", "checkpoint"],
    ),
    "dtype of weight_sum": (
        set_state("weight_sum", torch.Tensor.double),
        ["weight_sums[2]", "torch.float64", "must be torch.float32", "checkpoint"],
    ),
    "expanded state": (
        set_state("weight_sum", lambda s: s[:1].expand(4, 3)),
        ["weight_sums[2]", "strides [0, 1]", "share memory", "clone()"],
    ),
    "sparse state": (set_state("exp_avg", lambda s: s.to_sparse()), ["exp_avgs[2]", "sparse"]),
    "shape of max_denom": (
        set_state("max_denom", lambda s: s[:3]),
        ["max_denoms[1]", "[3, 3]", "shape of params[2]", "[4, 3]"],
    ),
    "float step": (set_state("step", torch.Tensor.float), ["steps[2]", "torch.float32", "int64"]),
    "many steps": (set_state("step", lambda s: s.expand(3).clone()), ["steps[2]", "[3]", "int64"]),
}
CASES = [(case, steps) for case in BAD_TENSORS for steps in (0, 2)] + [(case, 2) for case in BAD_STATES]


@on_backends
@pytest.mark.parametrize("clip", [None, 1.0], ids=["no_clip", "clip"])
@pytest.mark.parametrize(("case", "steps"), CASES, ids=[f"{case} at step {steps}" for case, steps in CASES])
def test_step_names_the_tensor_and_changes_nothing(case, steps, clip, backend):
    """Guards against a step that fails half-way, and against errors that leave the user to search the model.

    The bad tensor is the last one, in the second group, which alone has AMSGrad; the parameter before the last has no
    gradient, so its index in the message's lists is not its index in the group.
    """
    corrupt, words = {**BAD_TENSORS, **BAD_STATES}[case]
    device = device_of(backend)
    a, b, c, d = make_params((2, 5, 3, (4, 3)), device=device)
    groups = [{"params": [("a", a), ("b", b)]}, {"params": [("c", c), ("d.weight", d)], "amsgrad": True}]
    optimizer = MAdam(groups, **BASE, max_grad_norm=clip, backend=backend)
    for step in range(steps):
        set_grads([a, c, d], step)
        optimizer.step()
    set_grads([a, c, d], steps)
    corrupt(d, optimizer.state[d] if steps else None)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    message = str(raised.value)
    for word in ("param_groups[1]['params'][1]", "'d.weight'", *words):
        assert word in message, message
    if "sparse" not in message:
        assert re.search(r"\(shape \[.*\], .*, strides \[.*\], " + device.type, message), message
    assert_unchanged(optimizer, before)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as those of quantised weights are."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.size(), dtype=tensor.dtype, device=tensor.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def free(tensor):
    tensor.untyped_storage().resize_(0)


WITHOUT_MEMORY = {
    "params": lambda param, state: free(param),
    "grads": lambda param, state: free(param.grad),
    "exp_avgs": lambda param, state: free(state["exp_avg"]),
}


@pytest.mark.parametrize("backend", backend_params(oracle=False))
@pytest.mark.parametrize("clip", [None, 1.0], ids=["no_clip", "clip"])
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_tensor_without_memory_is_refused(name, clip, backend):
    """Guards against address 0 in a kernel: the process would end, or the GPU be lost to it."""
    kept, other, param = params = make_params((2, 5, (4, 3)), device=device_of(backend))
    optimizer = MAdam([("a", kept), ("b", other), ("c", param)], **BASE, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)
    other.grad = None
    optimizer.max_grad_norm = clip
    before = kept.clone(), optimizer.state[kept]["step"].clone()
    WITHOUT_MEMORY[name](param, optimizer.state[param])
    with pytest.raises(RuntimeError, match=rf"{name}\[1\] \(shape \[4, 3\].* has no memory.*'c'"):
        optimizer.step()
    assert torch.equal(kept, before[0])
    assert torch.equal(optimizer.state[kept]["step"], before[1])


def test_wrapper_has_no_memory_for_a_gpu():
    """Guards against a tensor subclass taken for what it stands for."""
    with pytest.raises(RuntimeError, match=r"params\[1\] .* a Wrapper that stands for other tensors.*'reference'"):
        checks.check_memory([torch.ones(3), Wrapper(torch.ones(3))], "params")
    checks.check_memory([torch.ones(3), Wrapper(torch.ones(0))], "params")


class ChecksAlone:
    """A backend for "meta" tensors, which stand in for those of another device: it refuses what does not fit."""

    @staticmethod
    def step(groups, laprop, scaling, recorder=None, saturation=None):
        checks.check_groups(with_gradients(groups))

    @staticmethod
    def grad_norm(grads):
        checks.check_grads(grads)
        return torch.ones(())


@pytest.fixture
def two_devices(monkeypatch):
    """Has "meta" tensors stepped beside those of the backends' devices."""
    selected = {(name, torch.device("meta")): ChecksAlone for name in ("auto", *registry.BACKENDS)}
    monkeypatch.setattr(registry, "_selected", selected)


def assert_named(optimizer, *words):
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert all(word in str(raised.value) for word in words), str(raised.value)


# What is done to a parameter, and the list and the index in it that the error names where it is f, and where it is e.
IN_PARTS = {
    "coo gradient": (BAD_TENSORS["coo gradient"][0], "grads[4]", "grads[3]"),
    "expanded parameter": (expand_param, "params[4]", "params[3]"),
    "shape of exp_avg": (BAD_STATES["shape of exp_avg"][0], "exp_avgs[4]", "exp_avgs[3]"),
    "shape of max_denom": (BAD_STATES["shape of max_denom"][0], "max_denoms[2]", "max_denoms[1]"),
}


@on_backends
@pytest.mark.parametrize("bad", ["f", "e"])
@pytest.mark.parametrize("case", IN_PARTS)
def test_parameter_among_groups_with_and_without_trust_ratio(case, bad, backend):
    """Guards against naming another parameter where groups are stepped apart, each part with lists of its own."""
    corrupt, *entries = IN_PARTS[case]
    a, b, c, d, e, f = make_params((2, 5, 3, 7, (4, 3), (4, 3)), device=device_of(backend))
    groups = [
        {"params": [("a", a), ("b", b)], "trust_ratio": True},
        {"params": [("c", c), ("d", d), ("e", e)], "amsgrad": True},
        {"params": [("f", f)], "trust_ratio": True, "amsgrad": True},
    ]
    optimizer = MAdam(groups, **BASE, backend=backend)
    for step in range(2):
        set_grads([a, b, c, e, f], step)
        optimizer.step()
    set_grads([a, b, c, e, f], 2)
    param, entry, place = (f, entries[0], "[2]['params'][0]") if bad == "f" else (e, entries[1], "[1]['params'][2]")
    corrupt(param, optimizer.state[param])
    before = snapshot(optimizer)
    assert_named(optimizer, f"({entry} belongs to param_groups{place}, '{bad}')")
    assert_unchanged(optimizer, before)


@on_backends
@pytest.mark.parametrize("clip", [None, 1.0], ids=["no_clip", "clip"])
@pytest.mark.parametrize("bad", ["b", "d", "e", "f"])
def test_parameter_among_two_devices(bad, clip, backend, two_devices):
    """Guards against naming another parameter where each device has lists of its own, in the step and in the norm."""
    here = device_of(backend)
    places = {"a": "meta", "b": here, "c": "meta", "d": here, "e": "meta", "f": here}
    params = {name: make_params(((4, 3),), device=device)[0] for name, device in places.items()}
    names = list(params)
    groups = [{"params": [(name, params[name]) for name in its]} for its in (names[:4], names[4:])]
    optimizer = MAdam(groups, **BASE, max_grad_norm=clip, backend=backend)
    group, index = divmod(names.index(bad), 4)
    for step in range(2):  # the first parameter then has no state, or has one
        set_grads(params.values(), step)
        set_grad(lambda p: torch.ones_like(p, dtype=torch.int64))(params[bad], None)
        assert_named(optimizer, f"belongs to param_groups[{group}]['params'][{index}], '{bad}')")
        params["a"].grad = None
        assert_named(optimizer, f"belongs to param_groups[{group}]['params'][{index}], '{bad}')")
        set_grads(params.values(), step)
        optimizer.step()


@on_backends
@pytest.mark.parametrize("case", ["expanded parameter", "shape of exp_avg"])
def test_refusal_on_another_device(case, backend, two_devices):
    """Guards against parameters that have been stepped when those of another device are refused."""
    here, there = (make_params(((4, 3),) * 2, device=device) for device in (device_of(backend), "meta"))
    optimizer = MAdam([*here, *there], **BASE, backend=backend)
    set_grads([*here, *there], 0)
    optimizer.step()
    set_grads([*here, *there], 1)
    IN_PARTS[case][0](there[1], optimizer.state[there[1]])
    before = snapshot(optimizer)
    assert_named(optimizer, "belongs to param_groups[0]['params'][3])")
    assert_unchanged(optimizer, before)


@on_backends
def test_master_of_another_shape(backend):
    """Guards against naming another parameter where only some groups have masters: their list has an entry for each
    parameter of all groups."""
    params = dict(zip("abcde", make_params((2, 5, (4, 3), (4, 3), 7), torch.bfloat16, device_of(backend)), strict=True))
    groups = [{"params": list(params.items())[:2]}, {"params": list(params.items())[2:], "master_weights": True}]
    optimizer = MAdam(groups, **BASE, backend=backend)
    set_grads(params.values(), 0)
    optimizer.step()
    master = optimizer.state[params["c"]]["master"]
    optimizer.state[params["c"]]["master"] = master[:2]
    set_grads(params.values(), 1)
    assert_named(optimizer, "masters[2] (shape [2, 3]", "(masters[2] belongs to param_groups[1]['params'][0], 'c')")
    optimizer.state[params["c"]]["master"] = master
    optimizer.state[params["d"]]["master"] = master[:2]
    params["a"].grad = None
    assert_named(optimizer, "masters[2] (shape [2, 3]", "(masters[2] belongs to param_groups[1]['params'][1], 'd')")


@on_backends
def test_failed_step_can_be_repeated(backend):
    """Guards against an optimizer spoilt by a failed first step: mended, it goes on as if nothing had been."""
    device = device_of(backend)
    ours, plain = (make_params((3, (4, 3)), device=device) for _ in range(2))
    one, other = (MAdam(params, **BASE, backend=backend) for params in (ours, plain))
    for params in (ours, plain):
        set_grads(params, 0)
    good = ours[1].grad
    ours[1].grad = good.to_sparse()
    with pytest.raises(RuntimeError, match=r"grads\[1\]"):
        one.step()
    ours[1].grad = good
    one.step()
    other.step()
    expected = dict(states(other))
    for name, value in states(one):
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, NotImplementedError])
def test_errors_of_other_kinds_stay(kind, monkeypatch):
    """Guards against an error that a training loop catches by its class, told on as a mere RuntimeError."""

    def fail(*arguments, **options):
        raise kind("grads[0]")

    (param,) = make_params((3,))
    optimizer = MAdam([param])
    set_grads([param], 0)
    monkeypatch.setattr(functional, "step_groups", fail)
    with pytest.raises(kind):
        optimizer.step()
    assert not optimizer.state


@on_backends
def test_failed_step_makes_no_maximum(backend):
    """Guards against a max_denom of zeros left by a failed step with AMSGrad just switched on."""
    params = make_params((3, (4, 3)), device=device_of(backend))
    optimizer = MAdam(params, **BASE, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    params[1].grad = params[1].grad.to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"grads\[1\]"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@on_backends
def test_embedding_with_sparse_gradients(backend):
    """Guards against the commonest sparse gradient met by an error that does not say where it comes from."""
    embedding = torch.nn.Embedding(10, 4, sparse=True).to(device_of(backend))
    optimizer = MAdam(embedding.named_parameters(), backend=backend)
    embedding(torch.tensor([1, 2], device=device_of(backend))).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse=False.*'weight'"):
        optimizer.step()


@on_backends
@pytest.mark.parametrize("clip", [None, 0.5], ids=["no_clip", "clip"])
def test_expanded_gradient_is_read(clip, backend):
    """Guards against gradients refused for overlapping memory: sum().backward() makes such, and they are only read."""
    ours, plain = (make_params(((4, 3), 5), device=device_of(backend)) for _ in range(2))
    one, other = (MAdam(params, **BASE, max_grad_norm=clip, backend=backend) for params in (ours, plain))
    for expanded, full in zip(ours, plain, strict=True):
        expanded.grad = torch.full((1,) * full.dim(), 0.5, device=full.device).expand(full.shape)
        full.grad = torch.full_like(full, 0.5)
    one.step()
    other.step()
    expected = dict(states(other))
    for name, value in states(one):
        assert torch.equal(value, expected[name]), name
    assert all(param.grad.unique().item() == 0.5 for param in ours)


# --- tensors that do not fit, in the functional form -----------------------------------------------------------------

LISTS = ("params", "grads", "exp_avgs", "grad_means", "grad_vars", "weight_sums", "max_denoms", "steps")


def make_lists(params, amsgrad=False):
    """All lists of a first step; `max_denoms` as well where asked for."""
    lists = {"params": params, "grads": [torch.ones_like(param) for param in params]}
    for name in LISTS[2:]:
        lists[name] = [torch.zeros_like(param) for param in params]
    lists["steps"] = [torch.zeros((), dtype=torch.int64, device=param.device) for param in params]
    if not amsgrad:
        del lists["max_denoms"]
    return lists


def entries(lists):
    return {f"{name}[{i}]": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)}


def cloned(lists):
    return {name: tensor.clone() for name, tensor in entries(lists).items()}


@on_backends
@pytest.mark.parametrize("call", [functional.madam_, functional.lamadam_])
@pytest.mark.parametrize("change", [-1, +1], ids=["short", "long"])
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_other_lengths(call, name, change, backend):
    """Guards against lists walked to the shortest one's end, or beyond."""
    lists = make_lists([torch.ones(3, device=device_of(backend)) for _ in range(3)], amsgrad=True)
    lists[name] = lists[name][:-1] if change < 0 else [*lists[name], lists[name][0].clone()]
    before = cloned(lists)
    with pytest.raises(RuntimeError, match=r"has (2|3|4) entries for (2|3|4) params"):
        call(**lists, lr=0.1, backend=backend)
    assert_equal(entries(lists), before)


@on_backends
@pytest.mark.parametrize("name", LISTS)
def test_tensor_on_another_device(name, backend):
    """Guards against a call that lands in another device's kernel; a "meta" tensor brought one that did nothing."""
    lists = make_lists([torch.ones(3, device=device_of(backend)) for _ in range(3)], amsgrad=True)
    lists[name][2] = lists[name][2].to("meta")
    before = cloned(lists)
    with pytest.raises(RuntimeError) as raised:
        functional.madam_(**lists, lr=0.1, backend=backend)
    for word in (f"{name}[2]", "meta)", "device of" if name != "params" else "device"):
        assert word in str(raised.value), str(raised.value)
    assert_equal(entries(lists), before)


@on_backends
def test_elements_that_overlap_by_three_dimensions(backend):
    """Guards against a parameter whose elements share memory though no two of its dimensions do: a view by windows."""
    param = torch.nn.Parameter(torch.zeros(10, device=device_of(backend)).as_strided((3, 2, 2), (1, 3, 4)))
    optimizer = MAdam([param], backend=backend)
    param.grad = torch.ones_like(param)
    assert_named(optimizer, "params[0]", "share memory")


@on_backends
def test_dimension_of_one_entry_overlaps_nothing(backend):
    """Guards against a parameter refused for the stride 0 of a dimension along which nothing is repeated."""
    param = torch.ones(6, device=device_of(backend)).as_strided((1, 3), (0, 2))
    lists = make_lists([param])
    functional.madam_(**lists, lr=0.1, backend=backend)
    assert lists["steps"][0] == 1


@on_backends
def test_parameter_on_another_device(backend):
    """Guards against a parameter that agrees with its own gradient and state, and is none of the kernel's device."""
    lists = make_lists([torch.ones(3, device=device_of(backend)) for _ in range(3)], amsgrad=True)
    for name in LISTS:
        lists[name][2] = lists[name][2].to("meta")
    before = cloned(lists)
    with pytest.raises(RuntimeError, match=r"params\[2\] .*meta\).* device .*params\[0\]"):
        functional.madam_(**lists, lr=0.1, backend=backend)
    assert_equal(entries(lists), before)


@on_backends
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("kind", ["coo", "csr", "int32", "shape"])
def test_tensor_that_does_not_fit(name, kind, backend):
    """Guards against a role of tensors that nobody checks, the last one being wrong."""
    if name == "steps" and kind in ("coo", "csr"):
        pytest.skip("a scalar")
    edits = {"coo": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr, "int32": torch.Tensor.int}
    edit = edits.get(kind, lambda tensor: tensor.new_zeros(2, 2))
    lists = make_lists([torch.ones(3, 2, device=device_of(backend)) for _ in range(3)], amsgrad=True)
    lists[name][2] = edit(lists[name][2])
    before = cloned(lists)
    with pytest.raises(RuntimeError) as raised:
        functional.madam_(**lists, lr=0.1, backend=backend)
    # A parameter of another shape is told from its gradient's side.
    named = "grads[2]" if (name, kind) == ("params", "shape") else f"{name}[2]"
    assert named in str(raised.value), str(raised.value)
    assert_equal(entries(lists), before)


@on_backends
def test_no_parameters(backend):
    """Guards against an empty list that fails: a pipeline stage may have nothing to step."""
    functional.madam_([], [], [], [], [], [], [], lr=0.1, backend=backend)
    with torch.device("meta"):  # whatever the default is
        assert functional.grad_norm([], backend=backend).item() == 0


@on_backends
@pytest.mark.parametrize(
    ("bad", "word"),
    [(lambda g: g.to_sparse(), "sparse"), (lambda g: g.int(), "float32"), (lambda g: g.to(torch.complex64), "float32")],
    ids=["coo", "int32", "complex64"],
)
def test_norm_names_the_gradient(bad, word, backend):
    """Guards against a norm of what is no gradient."""
    grads = [torch.ones(3, device=device_of(backend)) for _ in range(3)]
    grads[2] = bad(grads[2])
    with pytest.raises(RuntimeError, match=rf"grads\[2\].*{word}"):
        functional.grad_norm(grads, backend=backend)


@on_backends
@pytest.mark.parametrize("bad", [2, 3])
def test_norm_over_two_devices_names_the_gradient(bad, backend, two_devices):
    """Guards against an index among the gradients of one device."""
    grads = [torch.ones(3, device=device) for device in (device_of(backend), "meta") * 2]
    grads[bad] = grads[bad].int()
    with pytest.raises(RuntimeError, match=rf"grads\[{bad}\].*float32"):
        functional.grad_norm(grads, backend=backend)


@on_backends
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_scaling_must_be_a_scalar(name, backend):
    """Guards against a scale read from the first of many elements."""
    lists = make_lists([torch.ones(3, device=device_of(backend))])
    before = cloned(lists)
    with pytest.raises(RuntimeError, match=name):
        functional.madam_(**lists, lr=0.1, backend=backend, **{name: torch.ones(3, device=device_of(backend))})
    whole = torch.ones((), dtype=torch.int64, device=device_of(backend))
    with pytest.raises(RuntimeError, match=name):
        functional.madam_(**lists, lr=0.1, backend=backend, **{name: whole})
    assert_equal(entries(lists), before)


def test_nothing_warns():
    """Guards against warnings in ordinary use."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = make_params((3, 4))
        optimizer = MAdam(params, **BASE, max_grad_norm=1.0)
        set_grads(params, 0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("option", "value", "whole"),
    [
        ("max_grad_norm", 1.0, None),
        ("skip_nonfinite", True, False),
        ("capturable", True, False),
        ("backend", "reference", "auto"),
    ],
)
def test_options_of_the_whole_optimizer_are_refused_in_a_group(option, value, whole):
    """They would be ignored there without a word; what says the same as the optimizer may stand, as ZeRO writes it."""
    with pytest.raises(ValueError, match=option):
        MAdam([{"params": make_params((3,)), option: value}])
    optimizer = MAdam([{"params": make_params((3,)), option: whole}])
    assert option not in optimizer.param_groups[0]


@pytest.mark.parametrize("named", ["LaMAdam", "MAdam", "lamadam", None])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithm_cannot_be_set_in_a_group(algorithm, named):
    """Guards against a group that is stepped by this class and saved as another's, which would then load its momentum;
    the class's own name may stand, as it does in every group that is handed on."""
    if named == algorithm.__name__:
        assert algorithm([{"params": make_params((3,)), "algorithm": named}]).param_groups[0]["algorithm"] == named
        return
    words = f"algorithm .* {algorithm.__name__!r}.* got {named!r}; leave it out, or use"
    with pytest.raises(ValueError, match=words):
        algorithm([{"params": make_params((3,)), "algorithm": named}])
    optimizer = algorithm(make_params((2,)))
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": make_params((3,)), "algorithm": named})
    assert len(optimizer.param_groups) == 1
