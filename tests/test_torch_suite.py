"""torch's own table of optimizer inputs, through our constructor: with equal bounds of beta MAdam is Adam.

In float64 and with eps placed alike (eps_mode="adam") what differs is rounding; see `bound`.
"""

import pytest
import torch
from cases import ALGORITHMS, backend_params, device_of
from torch.nn import Parameter

from maxva_kernels import MAdam

table = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="torch's test tables need expecttest: pip install expecttest"
)

STEPS = 20
INFOS = {info.name: info for info in table.optim_db if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW)}
INPUTS = [(name, entry.kwargs, entry.desc) for name, info in INFOS.items() for entry in info.optim_inputs_func("cpu")]
BETAS = ((0.9, 0.999), (0.5, 0.9))

on_backends = pytest.mark.parametrize("backend", backend_params())
inputs = pytest.mark.parametrize(
    ("name", "kwargs"), [(n, k) for n, k, _ in INPUTS], ids=[f"{n}-{d}" for n, _, d in INPUTS]
)


def ours_like(theirs, params, backend):
    """MAdam with the hyperparameters of a torch.optim.Adam or AdamW, mapped by name."""
    defaults = theirs.defaults
    beta1, beta2 = defaults["betas"]
    return MAdam(
        params,
        beta1=beta1,
        beta2_range=(beta2, beta2),
        decoupled_weight_decay=isinstance(theirs, torch.optim.AdamW),
        eps_mode="adam",
        backend=backend,
        **{key: defaults[key] for key in ("lr", "eps", "weight_decay", "amsgrad", "maximize")},
    )


def make_params(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (17,), ())
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(device)) for shape in shapes]


def set_grads(params, step, growth):
    """Each element's gradient has a sign of its own, a size between 1 and 2, and grows or shrinks by a fifth a step."""
    generator = torch.Generator().manual_seed(1)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).sign()
        grad *= 1 + torch.rand(param.shape, generator=generator, dtype=torch.float64)
        param.grad = (grad * growth**step).to(param.device)


def bound(lr, beta2):
    """How far two float64 runs may part: in each step an update, below 4 lr, whose denominator carries torch's rounding
    of 1 - beta2^t (relative to at least 1 - beta2) and some 30 operations."""
    return STEPS * 4 * float(lr) * 32 * torch.finfo(torch.float64).eps / (1 - beta2)


def assert_close(ours, theirs, atol):
    # The parameters are of order 1 and rounded once a step on either side.
    rounding = 2 * STEPS * torch.finfo(torch.float64).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=atol + rounding)


@on_backends
@inputs
@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float_lr", "tensor_lr"])
def test_fixed_beta_is_torchs(name, kwargs, betas, as_tensor, backend):
    """Guards against any departure from Adam and AdamW where MaxVA has no choice: decay, maximize, bias correction.

    The gradients grow, and so does v, corrected or not: torch's AMSGrad keeps the maximum of the uncorrected v and ours
    of the corrected, which are then the same.
    """
    kwargs = {**kwargs, "betas": betas}
    kwargs["lr"] = kwargs.get("lr", 1e-3)
    if as_tensor:
        kwargs["lr"] = torch.tensor(kwargs["lr"], dtype=torch.float64)
    theirs = make_params()
    ours = make_params(device_of(backend))
    torchs = INFOS[name].optim_cls(theirs, **kwargs)
    optimizer = ours_like(torchs, ours, backend)
    for step in range(STEPS):
        set_grads(theirs, step, 1.2)
        set_grads(ours, step, 1.2)
        torchs.step()
        optimizer.step()
    assert_close([param.cpu() for param in ours], theirs, bound(kwargs["lr"], betas[1]))


@on_backends
@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fixed_beta_is_adam_and_laprop_by_hand(algorithm, amsgrad, betas, backend):
    """Guards against a maximum of the wrong quantity: the gradients shrink, so that AMSGrad's maximum is the first
    corrected v, where torch would keep the largest uncorrected one. LaMAdam is then LaProp, which torch lacks."""
    (alpha, beta), lr, eps = betas, 0.01, 1e-3
    (param, *_), (theta, *_) = make_params(device_of(backend)), make_params()
    theta = theta.detach()
    m, v, largest = (torch.zeros_like(theta) for _ in range(3))
    optimizer = algorithm([param], lr, alpha, (beta, beta), eps, eps_mode="adam", amsgrad=amsgrad, backend=backend)
    for step in range(STEPS):
        set_grads([param], step, 0.8)
        optimizer.step()
        g = param.grad.cpu()
        v = beta * v + (1 - beta) * g * g
        root = (v / (1 - beta ** (step + 1))).sqrt()
        largest = torch.maximum(largest, root)
        denominator = (largest if amsgrad else root) + eps
        average = g if algorithm is MAdam else g / denominator
        m = alpha * m + (1 - alpha) * average
        direction = m / denominator if algorithm is MAdam else m
        theta = theta - lr * direction / (1 - alpha ** (step + 1))
    assert_close([param.detach().cpu()], [theta], bound(lr, beta))


SCHEDULES = range(len(INFOS["Adam"].scheduler_inputs)) if "Adam" in INFOS else ()


@on_backends
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torchs_schedulers(schedule, backend):
    """Guards against schedulers that find something missing, or whose lr comes a step late."""
    theirs, ours = make_params(), make_params(device_of(backend))
    torchs = torch.optim.Adam(theirs, lr=0.01, betas=(0.5, 0.9))
    optimizer = ours_like(torchs, ours, backend)
    schedulers = [[make(o) for make in INFOS["Adam"].scheduler_inputs[schedule]] for o in (torchs, optimizer)]
    rates = []
    for step in range(STEPS):
        for params, each, its in ((theirs, torchs, schedulers[0]), (ours, optimizer, schedulers[1])):
            set_grads(params, step, 1.0)
            each.step()
            for scheduler in its:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if plateau else []))
            rates.append(each.param_groups[0]["lr"])
    assert rates[::2] == rates[1::2]
    assert_close([param.cpu() for param in ours], theirs, bound(0.01, 0.9))


@on_backends
@inputs
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_goes_the_right_direction(algorithm, name, kwargs, backend):
    """Guards against divergence or ascent with any of torch's inputs, MaxVA's choice on; torch's own test of this name,
    for its parameters and gradients on all options of the table."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    weight, bias, data = (torch.randn(s, generator=generator).to(device) for s in ((10, 5), (10,), (5,)))
    params = [Parameter(weight), Parameter(bias)]
    optimizer = algorithm(params, decoupled_weight_decay=name == "AdamW", backend=backend, **kwargs)

    def closure():
        optimizer.zero_grad()
        loss = (params[0].mv(data) + params[1]).pow(2).sum()
        loss.backward()
        return -loss if kwargs.get("maximize") else loss

    losses = [optimizer.step(closure).item() for _ in range(STEPS)]
    assert losses[-1] < losses[0]


def error_inputs():
    """Those of torch's bad inputs whose arguments we have, mapped by name."""
    entries = []
    for entry in INFOS["Adam"].optim_error_inputs_func("cpu", torch.float64) if "Adam" in INFOS else ():
        kwargs = dict(entry.optimizer_error_input.kwargs)
        betas = kwargs.pop("betas", (0.9, 0.999))
        if "foreach" in kwargs or "fused" in kwargs or any(isinstance(beta, torch.Tensor) for beta in betas):
            continue  # no such options here, and betas may be tensors
        if betas[1] > 0:  # 0 is refused too, but is not what that entry is about
            kwargs["beta2_range"] = (betas[1], betas[1])
        entries.append(pytest.param(entry, {"beta1": betas[0], **kwargs}, id=entry.optimizer_error_input.desc))
    return entries


@pytest.mark.parametrize(("entry", "kwargs"), error_inputs())
def test_torchs_bad_inputs(entry, kwargs):
    """Guards against input accepted that torch.optim.Adam refuses. Messages about parameters are torch's own, those
    about hyperparameters ours."""
    params = entry.optimizer_error_input.params
    regex = ".*" if params is None else entry.error_regex
    params = make_params() if params is None else params
    if issubclass(entry.error_type, Warning):
        with pytest.warns(entry.error_type, match=regex):
            MAdam(params, **kwargs)
        return
    with pytest.raises(entry.error_type, match=regex):
        MAdam(params, **kwargs)
