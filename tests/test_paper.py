"""What the paper proves about MaxVA, as properties of the reference; and Adam and LaProp as its special cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import backend_params, device_of, make_params, set_grads
from hypothesis import given
from hypothesis import strategies as st

from maxva_kernels import LaMAdam, MAdam, reference
from maxva_kernels.groups import Hyperparameters

reals = st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3)
weights = st.floats(1e-3, 1 - 1e-6)
variances = st.floats(1e-3, 1e3)

# float64; Eq. 6 divides differences whose relative error is at most 1e-16 * (u^2 + s) / s <= 1e-7 for these ranges.
CLOSE = 1e-6


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def paper_state(u: float, s: float, w: float) -> reference.PaperState:
    """The state whose corrected moments are u and s."""
    return reference.to_paper(scalar(0.0), scalar(u), scalar(s), scalar(w), torch.float64)


def hyper(lower: float = 0.5, upper: float = 0.999, **options) -> Hyperparameters:
    return Hyperparameters(
        **{"lr": 0.1, "beta1": 0.9, "beta2_range": (lower, upper), "eps": 1e-8, "weight_decay": 0.0, **options}
    )


@given(g=reals, u=reals, s=variances, w=weights)
def test_beta_is_within_the_bounds_of_section_3(g, u, s, w):
    beta = reference.unclipped_beta(scalar(g), paper_state(u, s, w)).item()
    assert 1 / (1 + w) * (1 - CLOSE) <= beta <= 1 / (1 - w) * (1 + CLOSE)


@given(u=reals, s=variances, w=weights, smaller=st.floats(0, 100), larger=st.floats(0, 100))
def test_beta_falls_as_the_deviation_grows(u, s, w, smaller, larger):
    """Eq. 8, in R = deviation^2 / variance."""
    smaller, larger = sorted((smaller, larger))
    state = paper_state(u, s, w)
    at = [reference.unclipped_beta(scalar(u + math.sqrt(ratio * s)), state).item() for ratio in (smaller, larger)]
    assert at[0] >= at[1] * (1 - CLOSE)


@given(u=reals, s=variances, w=weights, sign=st.sampled_from((-1, 1)))
def test_beta_is_1_where_the_deviation_is_the_standard_deviation(u, s, w, sign):
    state = paper_state(u, s, w)
    assert reference.unclipped_beta(scalar(u + sign * math.sqrt(s)), state).item() == pytest.approx(1, rel=CLOSE)


@given(first=reals, second=reals, init=st.floats(0.0, 0.99))
def test_second_beta_does_not_depend_on_the_gradients(first, second, init):
    """At t = 2 it is 1 / (2 - beta_1)."""
    if abs(first - second) < 1e-3:
        return  # 0/0
    h = hyper(beta2_init=init)
    zero = torch.zeros((), dtype=torch.float64)
    state = reference.update_moments(scalar(first), reference.PaperState(zero, zero, zero, zero), h)
    assert state.w.item() == pytest.approx(1 - init)
    assert reference.unclipped_beta(scalar(second), state).item() == pytest.approx(1 / (2 - init), rel=CLOSE)


@given(gradients=st.lists(reals, min_size=2, max_size=30), init=st.floats(0.0, 0.999))
def test_w_rises_from_its_first_value_to_1(gradients, init):
    h = hyper(beta2_init=init)
    zero = torch.zeros((), dtype=torch.float64)
    state = reference.PaperState(zero, zero, zero, zero)
    weights = []
    for g in gradients:
        state = reference.update_moments(scalar(g), state, h)
        weights.append(state.w.item())
    assert weights[0] == pytest.approx(1 - init)
    assert all(a <= b + 1e-15 for a, b in itertools.pairwise(weights))
    assert weights[-1] <= 1 + 1e-15


@given(g=reals, u=reals, s=variances, w=weights, lower=st.floats(0.05, 0.9), width=st.floats(0, 0.5))
def test_beta_maximises_the_variance(g, u, s, w, lower, width):
    """Eq. 5, against a grid search over [lower, upper]."""
    h = hyper(lower, min(1.0, lower + width), beta2_init=0.5)
    state = paper_state(u, s, w)
    chosen = reference.maxva_beta(scalar(g), state, h)
    grid = torch.cat([torch.linspace(*h.beta2_range, 501, dtype=torch.float64), chosen.reshape(1)])
    weight = grid * state.w + (1 - grid)
    mean = (grid * state.u + (1 - grid) * g) / weight
    variance = (grid * state.v + (1 - grid) * g**2) / weight - mean**2
    assert variance[-1] >= variance.max() - 1e-12 * (g**2 + u**2 + s)


@pytest.mark.parametrize("backend", backend_params(simulate=False))
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("beta2", [0.9, 0.98])
def test_equal_bounds_are_adam(beta2, decoupled, backend):
    """With both bounds at beta2 MAdam is `torch.optim.Adam`/`AdamW`, eps placed alike, amsgrad apart."""
    params, twins = (make_params(dtype=torch.float64, device=device_of(backend)) for _ in range(2))
    common = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
    ours = MAdam(
        params,
        beta1=0.8,
        beta2_range=(beta2, beta2),
        eps_mode="adam",
        decoupled_weight_decay=decoupled,
        backend=backend,
        **common,
    )
    theirs = (torch.optim.AdamW if decoupled else torch.optim.Adam)(twins, betas=(0.8, beta2), foreach=False, **common)
    for step in range(100):
        for optimizer, its in ((ours, params), (theirs, twins)):
            set_grads(its, step)
            optimizer.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-10, atol=1e-10)  # 100 steps of float64 rounding


@pytest.mark.parametrize("backend", backend_params())
def test_equal_bounds_are_laprop(backend):
    """LaMAdam with equal bounds is LaProp (Ziyin et al., 2020), written out here."""
    (param,) = make_params((50,), dtype=torch.float64, device=device_of(backend))
    theta, m, v = param.detach().clone(), 0.0, 0.0
    optimizer = LaMAdam(
        [param], lr=1e-2, beta1=0.8, beta2_range=(0.95, 0.95), eps=1e-3, eps_mode="adam", backend=backend
    )
    for step in range(1, 60):
        set_grads([param], step)
        optimizer.step()
        v = 0.95 * v + 0.05 * param.grad**2
        m = 0.8 * m + 0.2 * param.grad / ((v / (1 - 0.95**step)).sqrt() + 1e-3)
        theta = theta - 1e-2 * m / (1 - 0.8**step)
        torch.testing.assert_close(param.detach(), theta, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("algorithm", [MAdam, LaMAdam])
def test_upper_bound_1_starts_with_beta_09(algorithm, backend):
    """Section 4.1 uses an upper bound of 1, where Eq. 7 with beta_1 = 1 would divide by w = 0."""
    (param,) = make_params((9,), device=device_of(backend))
    set_grads([param], 0)
    optimizer = algorithm([param], beta2_range=(0.5, 1.0), backend=backend)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["weight_sum"], torch.full_like(param, 0.1))
    assert param.isfinite().all()
