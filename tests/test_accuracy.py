"""Whole runs in float32 against the reference in float64: where the paper's form fails in float32, ours must not.

The float64 reference keeps its own u~, v~ and w throughout; its error in v is below 1e-12, so to float32 it is exact.
"""

from __future__ import annotations

import math
import time

import pytest
import torch
from cases import ALGORITHMS, backend_params, device_of, needs_cpu_kernels

from maxva_kernels import MAdam, reference
from maxva_kernels.groups import Hyperparameters

SCALES = (1e-18, 1e-12, 1e-8, 1e-6, 1e-3, 1.0, 1e6)
MEANS = (0.0, 1.0, 30.0, 1000.0)  # in standard deviations
COORDINATES = 512
STEPS = 400


def follow(gradients, beta2_range, backend, dtype=torch.float32, steps=STEPS):
    """Runs both; yields after each step g, the kernel's state before and after, and the reference's beta, v and w."""
    first = gradients(0)
    param = torch.nn.Parameter(torch.zeros(first.shape, dtype=dtype, device=device_of(backend)))
    optimizer = MAdam([param], beta2_range=beta2_range, backend=backend)
    hyper = Hyperparameters(lr=1e-3, beta1=0.9, beta2_range=beta2_range, eps=1e-8, weight_decay=0.0)
    zero = torch.zeros(first.shape, dtype=torch.float64)
    exact = reference.PaperState(zero, zero, zero, zero)
    for step in range(steps):
        g = gradients(step).to(dtype)
        param.grad = g.to(param.device)
        before = {name: value.cpu().clone() for name, value in optimizer.state.get(param, {}).items()}
        optimizer.step()
        after = {name: value.cpu().double() for name, value in optimizer.state[param].items()}
        beta = reference.maxva_beta(g.double(), exact, hyper)
        exact = reference.update_moments(g.double(), exact, hyper)
        yield g.double(), before, after, beta, exact


@pytest.mark.parametrize("backend", backend_params(oracle=False, simulate=False))
@pytest.mark.parametrize("beta2_range", [(0.5, 0.999), (0.5, 0.9)], ids=["unsaturated", "saturating"])
def test_v_and_beta_at_every_scale(beta2_range, backend):
    scales = torch.tensor(SCALES, dtype=torch.float64)[:, None, None]
    means = torch.tensor(MEANS, dtype=torch.float64)[None, :, None]
    generator = torch.Generator().manual_seed(0)

    def gradients(step):
        return scales * (
            means + torch.randn(len(SCALES), len(MEANS), COORDINATES, dtype=torch.float64, generator=generator)
        )

    saturated_once = False
    in_range = torch.ones(len(SCALES), len(MEANS), COORDINATES, dtype=torch.bool)
    for g, before, after, beta, exact in follow(gradients, beta2_range, backend):
        assert all(value.isfinite().all() for value in after.values())
        v = after["grad_var"] + after["grad_mean"] ** 2
        # What is below 2^-126 float32 stores as 0, so a coordinate whose v or variance was there is followed no longer.
        # At a scale of 1e-18, squared 2^-120, that happens to some whose first gradients are nearly equal; elsewhere
        # to none.
        in_range &= (reference.from_paper(exact)[2] if before else g**2) >= 2.0**-125
        error = torch.where(in_range, (v / (exact.v / exact.w) - 1).abs(), 0)
        saturated = after["weight_sum"] == 1
        saturated_once |= bool(saturated.any())
        bound = torch.where(saturated, 1e-4, 1e-5)
        worst = (error / bound).flatten(2).amax(2)
        assert (worst <= 1).all(), f"{worst} by scale and mean, in units of the bound"
        if not before:
            continue
        # The kernel's beta is 1 - q w with q read off the mean's move, where that is well above the mean's rounding.
        deviation = g - before["grad_mean"].double()
        clear = in_range & (deviation.abs() > 2.0**-11 * after["grad_mean"].abs())
        q = (after["grad_mean"] - before["grad_mean"].double()) / deviation
        off = (1 - q * after["weight_sum"] - beta).abs()
        assert off[clear].max() <= 1e-3
    share = in_range.double().mean((1, 2))
    assert share[0] > 0.75
    assert (share[1:] == 1).all()
    assert saturated_once == (beta2_range[1] == 0.9)


@pytest.mark.parametrize("backend", backend_params(oracle=False, simulate=False))
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_gradients_that_are_not_noise(scale, backend):
    """Constant, zero, alternating, one spike among small ones: v within its bound, exact where nothing varies."""

    def gradients(step):
        spike = 1e3 if step == 100 else 1e-3 * math.sin(step + 1)
        return scale * torch.tensor([1.0, 0.0, (-1.0) ** step, spike, float(step == 0)], dtype=torch.float64)

    for g, _, after, _, exact in follow(gradients, (0.5, 0.98), backend):
        v = after["grad_var"] + after["grad_mean"] ** 2
        assert torch.equal(after["grad_mean"][:2], g[:2])
        assert torch.equal(after["grad_var"][:2], torch.zeros(2, dtype=torch.float64))
        target = exact.v / exact.w
        assert ((v - target).abs() <= 1e-4 * target).all()


@pytest.mark.parametrize("backend", backend_params(oracle=False, simulate=False))
def test_zero_gradients_move_nothing(backend):
    param = torch.nn.Parameter(torch.ones(100, device=device_of(backend)))
    optimizer = MAdam([param], backend=backend)
    for _ in range(5):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones_like(param))


@pytest.mark.parametrize("backend", backend_params(simulate=False))
@pytest.mark.parametrize(("dtype", "scale", "steps"), [(torch.float32, 1e-15, 200), (torch.float64, 1e-150, 1100)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_moments_never_become_subnormal(algorithm, dtype, scale, steps, backend):
    """A coordinate that stopped getting gradients: its moments end at 0 and not below the smallest normal number."""
    param = torch.nn.Parameter(torch.ones(64, dtype=dtype, device=device_of(backend)))
    optimizer = algorithm([param], beta1=0.5, beta2_range=(0.5, 0.6), backend=backend)
    tiny = torch.finfo(dtype).tiny
    param.grad = torch.full_like(param, scale)
    optimizer.step()
    param.grad = torch.zeros_like(param)
    for _ in range(steps):
        optimizer.step()
        for name in ("exp_avg", "grad_mean", "grad_var"):
            value = optimizer.state[param][name].abs()
            assert ((value == 0) | (value >= tiny)).all(), name
    assert not optimizer.state[param]["exp_avg"].any()
    assert not optimizer.state[param]["grad_mean"].any()


@pytest.mark.parametrize("backend", backend_params(oracle=False, simulate=False))
def test_float64_keeps_variances_that_float32_flushes(backend):
    """Guards float64's own smallest number: with float32's, or one between, v would lose its variance here."""
    generator = torch.Generator().manual_seed(0)

    def gradients(step):
        return 1e-40 * torch.randn(COORDINATES, dtype=torch.float64, generator=generator)

    for g, before, after, _, exact in follow(gradients, (0.5, 0.999), backend, torch.float64, 20):
        v = after["grad_var"] + after["grad_mean"] ** 2
        torch.testing.assert_close(v, exact.v / exact.w if before else g**2, rtol=1e-12, atol=0)
        assert (after["grad_var"] > 0).all() or not before


@pytest.mark.parametrize("backend", backend_params(oracle=False, simulate=False))
@pytest.mark.parametrize(("dtype", "nearly", "steps"), [(torch.float32, 2.0**-14, 150), (torch.float64, 2.0**-43, 500)])
def test_w_becomes_1_where_it_nearly_is(dtype, nearly, steps, backend):
    """Guards how nearly: sooner it would change v, later w be read and written for longer. An upper bound of 1 has no
    other threshold; gradients that grow make beta smaller, and w nears 1 within some steps."""
    generator = torch.Generator().manual_seed(0)

    def gradients(step):
        return 1.1**step * torch.randn(COORDINATES, dtype=torch.float64, generator=generator)

    became = torch.zeros(COORDINATES, dtype=torch.bool)
    for _, _, after, _, exact in follow(gradients, (0.5, 1.0), backend, dtype, steps):
        left, is_1 = 1 - exact.w, after["weight_sum"] == 1
        assert (left[is_1 & ~became] <= 1.01 * nearly).all()
        assert (left[~is_1] >= nearly / 1.01).all()
        became |= is_1
    assert became.double().mean() > 0.9


@needs_cpu_kernels
def test_long_dead_coordinates_cost_no_more_time():
    """Embedding rows without gradient for thousands of steps: where moments are subnormal, torch's fused AdamW is up to
    some 20 times slower, by the processor.

    Of all turns the quickest counts: what else runs on the machine only ever adds time, often several times the step's,
    and subnormals would cost in each of them.
    """
    optimizers = {}
    for name, value in (("alive", 1e-3), ("dead", 1e-39)):
        param = torch.nn.Parameter(torch.ones(1 << 20))
        param.grad = torch.randn(1 << 20) * 1e-3 if name == "alive" else torch.zeros(1 << 20)
        optimizer = MAdam([param], backend="cpu")
        optimizer.step()
        for moment in ("exp_avg", "grad_mean", "grad_var"):
            optimizer.state[param][moment].fill_(value)
        optimizer.step()  # the checkpoint with the subnormals may be slow, once
        optimizers[name] = optimizer
    times = {name: [] for name in optimizers}
    for _ in range(40):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    assert min(times["dead"]) <= 2 * min(times["alive"])
