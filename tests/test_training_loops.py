"""Training loops that people write: steps inside the backward pass, accumulated gradients, averaged weights."""

import pytest
import torch
from cases import ALGORITHMS, assert_same_bits, backend_params, device_of
from torch import nn
from torch.optim import swa_utils

from maxva_kernels import MAdam

on_backends = pytest.mark.parametrize("backend", backend_params())
both_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def make_model(backend):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(device_of(backend))


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 5, generator=generator).to(next(model.parameters()).device)
    return (model(inputs) - inputs[:, :3]).square().mean()


def train(model, optimizer, first=0, last=4):
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


@on_backends
@both_algorithms
def test_step_inside_the_backward_pass(algorithm, backend):
    """Guards the way that saves the memory of gradients: one optimizer a parameter, in autograd's thread."""
    model, other = make_model(backend), make_model(backend)
    options = {"lr": 0.1, "backend": backend, "weight_decay": 0.1}
    optimizers = {param: algorithm([param], **options) for param in model.parameters()}

    def step_and_forget(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step_and_forget)
    for step in range(4):
        loss_of(model, step).backward()
        assert all(param.grad is None for param in model.parameters())

    whole = algorithm(other.parameters(), **options)
    train(other, whole)
    together = algorithm(model.parameters(), **options)
    together.state.update((param, optimizer.state[param]) for param, optimizer in optimizers.items())
    assert_same_bits(together, whole)


@on_backends
@both_algorithms
def test_accumulated_gradients(algorithm, backend):
    """Guards against a gradient accumulated in place, at the address of the step before, taken for the old one."""
    model, other = make_model(backend), make_model(backend)
    optimizers = [algorithm(m.parameters(), lr=0.1, backend=backend, max_grad_norm=0.5) for m in (model, other)]
    for step in range(3):
        optimizers[0].zero_grad(set_to_none=False)
        for micro in range(4):
            (loss_of(model, 4 * step + micro) / 4).backward()
        grads = [sum(part) for part in zip(*(grads_of(other, 4 * step + micro) for micro in range(4)), strict=True)]
        for param, grad in zip(other.parameters(), grads, strict=True):
            param.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(*optimizers)


def grads_of(model, step):
    return torch.autograd.grad(loss_of(model, step) / 4, list(model.parameters()))


@on_backends
@both_algorithms
def test_averaged_weights(algorithm, backend):
    """Guards against parameters that a step replaces instead of updating, and a schedule that it does not follow."""
    model = make_model(backend)
    optimizer = algorithm(model.parameters(), lr=0.1, backend=backend)
    mean, ema = (
        swa_utils.AveragedModel(model),
        swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)),
    )
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=2, anneal_strategy="linear")
    seen, rates = [], []
    for step in range(4):
        train(model, optimizer, step, step + 1)
        schedule.step()
        mean.update_parameters(model)
        ema.update_parameters(model)
        seen.append([param.detach().clone() for param in model.parameters()])
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.06, 0.02, 0.02, 0.02])
    for i, (averaged, moving) in enumerate(zip(mean.parameters(), ema.parameters(), strict=True)):
        values = [step[i] for step in seen]
        assert not torch.equal(values[0], values[-1])
        torch.testing.assert_close(averaged.detach(), sum(values) / 4)
        expected = values[0]
        for value in values[1:]:
            expected = (expected + value) / 2
        torch.testing.assert_close(moving.detach(), expected)
    swa_utils.update_bn([torch.ones(8, 5, device=device_of(backend))], mean)


@on_backends
def test_parameters_that_live_elsewhere_than_the_model_computes(backend):
    """Guards CPU offload: parameters and state stay on the CPU, gradients are brought there, the model is a copy."""
    model = make_model(backend)
    kept = [nn.Parameter(param.detach().cpu().clone()) for param in model.parameters()]
    name = "cpu" if device_of(backend).type == "cuda" else backend
    optimizer = MAdam(kept, lr=0.1, max_grad_norm=0.5, backend=name)
    other = make_model("cpu")
    whole = MAdam(other.parameters(), lr=0.1, max_grad_norm=0.5, backend=name)
    for step in range(3):
        with torch.no_grad():
            for param, value in zip(model.parameters(), kept, strict=True):
                param.copy_(value)
        for value, grad in zip(kept, torch.autograd.grad(loss_of(model, step), list(model.parameters())), strict=True):
            value.grad = grad.cpu()
        optimizer.step()
        train(other, whole, step, step + 1)
    if device_of(backend).type == "cpu":
        assert_same_bits(optimizer, whole)
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"cpu"}


@both_algorithms
def test_differentiable_is_refused(algorithm):
    """Guards against a step taken for one that autograd can go through; where it is asked for, and why not."""
    params = list(make_model("cpu").parameters())
    algorithm(params, differentiable=False)
    for make in (
        lambda: algorithm(params, differentiable=True),
        lambda: algorithm([{"params": params, "differentiable": True}]),
    ):
        with pytest.raises(ValueError, match=r"differentiable=True is not supported: .*reference\.step"):
            make()


@on_backends
@both_algorithms
def test_autocast(algorithm, backend):
    """Guards bf16 autocast: parameters, gradients and state stay float32, and every backend does the same with them."""
    optimizers = []
    for name in (backend, "cpu"):
        model = make_model(name)
        optimizer = algorithm(model.parameters(), lr=0.1, max_grad_norm=0.5, backend=name)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast(device_of(name).type, torch.bfloat16):
                assert model(torch.ones(8, 5, device=device_of(name))).dtype == torch.bfloat16
                loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
        assert {param.grad.dtype for param in model.parameters()} == {torch.float32}
        assert {state["grad_var"].dtype for state in optimizer.state.values()} == {torch.float32}
        optimizers.append(optimizer)
    if device_of(backend).type == "cpu" and backend != "reference":
        assert_same_bits(*optimizers)
