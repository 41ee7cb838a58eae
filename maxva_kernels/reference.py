"""The paper, line by line: Algorithms 1 (MAdam) and 2 (LaMAdam) of arXiv 2006.11918 on one tensor.

Everything else in this package is checked against these few lines. They keep the paper's u~, v~ and w, and convert from
and to the stored state (u, s, w: see `to_paper`). They work in any floating dtype, but sigma^2 = v - u^2 cancels: run
them in float64, as the ``reference`` backend does, unless that error is what you are looking at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .groups import Hyperparameters


class PaperState(NamedTuple):
    """m~, u~, v~, w of Algorithms 1 and 2, in one dtype and the parameter's shape."""

    m: Tensor
    u: Tensor
    v: Tensor
    w: Tensor


def to_paper(
    exp_avg: Tensor, grad_mean: Tensor, grad_var: Tensor, weight_sum: Tensor, dtype: torch.dtype
) -> PaperState:
    """u~ = w u and v~ = w (s + u^2), computed in ``dtype``."""
    m, u, s, w = (tensor.to(dtype) for tensor in (exp_avg, grad_mean, grad_var, weight_sum))
    return PaperState(m, w * u, w * (s + u * u), w)


def from_paper(state: PaperState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m, u = u~/w, s = v~/w - u^2 and w, where w > 0; s is at least 0."""
    u = state.u / state.w
    s = (state.v / state.w - u * u).clamp(min=0)
    return state.m, u, s, state.w


def unclipped_beta(g: Tensor, state: PaperState, delta: float = 0.0) -> Tensor:
    """Eq. 6: the beta that maximises the estimated variance, in [1/(1+w), 1/(1-w)]; NaN where w = 0.

    ``delta`` is what the paper adds to the denominator against 0/0 (Section 3, implementation notes). Squared gradients
    are often smaller than any such constant, so the default does without: where nothing deviates and nothing ever did
    every beta is right, and the largest is taken.
    """
    w = state.w
    u = state.u / w
    variance = (state.v / w - u * u).clamp(min=0)
    deviation = (g - u) ** 2
    numerator = deviation + variance
    denominator = w * (deviation - variance) + deviation + variance + delta
    return torch.where(denominator == 0, 1 / (1 - w), numerator / denominator)


def maxva_beta(g: Tensor, state: PaperState, hyper: Hyperparameters, delta: float = 0.0) -> Tensor:
    """beta_t: Eq. 6 within its bounds (line 8), or Eq. 7 where w = 0, before the first gradient."""
    beta = unclipped_beta(g, state, delta).clamp(*hyper.beta2_range)
    return torch.where(state.w == 0, hyper.first_beta2, beta)


def update_moments(g: Tensor, state: PaperState, hyper: Hyperparameters, delta: float = 0.0) -> PaperState:
    """Lines 7 to 11 of Algorithm 1; m~ is left to the algorithm."""
    return _average(g, state, maxva_beta(g, state, hyper, delta))


def _average(g: Tensor, state: PaperState, beta: Tensor) -> PaperState:
    u = beta * state.u + (1 - beta) * g
    v = beta * state.v + (1 - beta) * g**2
    w = beta * state.w + (1 - beta)
    return PaperState(state.m, u, v, w)


class Step(NamedTuple):
    """What a step leads to: the first three are kept, the others tell how it came about."""

    theta: Tensor
    state: PaperState
    max_denom: Tensor | None
    beta: Tensor
    adaptive: Tensor  # what was subtracted from theta besides decoupled weight decay


def advance(
    theta: Tensor,
    g: Tensor,
    state: PaperState,
    t: int,
    hyper: Hyperparameters,
    *,
    laprop: bool,
    max_denom: Tensor | None = None,
) -> Step:
    """Step ``t`` (1-based) of Algorithm 1, or with ``laprop`` of Algorithm 2.

    Args:
        theta, g: parameter and gradient (unscaled and clipped), of one shape and dtype.
        state: before the step; zeros before the first.
        max_denom: with AMSGrad the running maximum of the bias-corrected sqrt(v).

    Returns:
        The parameter, the state and the maximum after the step, and more; the arguments are not changed.
    """
    lr, alpha, eps = hyper.lr, hyper.beta1, hyper.eps
    if hyper.maximize:
        g = -g
    if hyper.decoupled_weight_decay:
        theta = theta - lr * hyper.weight_decay * theta
    else:
        g = g + hyper.weight_decay * theta

    beta = maxva_beta(g, state, hyper)
    state = _average(g, state, beta)
    root_w = state.w.sqrt()
    root_v = (state.v / state.w).sqrt()  # bias-corrected
    if max_denom is not None:
        root_v = max_denom = torch.maximum(max_denom, root_v)
    if hyper.eps_mode == "adam":
        normaliser = 1 / (root_v + eps)
    else:
        normaliser = root_w / (root_w * root_v + eps)  # sqrt(w) / (sqrt(v~) + eps)

    if laprop:  # Algorithm 2: normalise, then average
        m = alpha * state.m + (1 - alpha) * (g * normaliser)
        adaptive = lr * m / (1 - alpha**t)
    else:  # Algorithm 1: average, then normalise (line 12)
        m = alpha * state.m + (1 - alpha) * g
        adaptive = lr / (1 - alpha**t) * (m * normaliser)
    return Step(theta - adaptive, state._replace(m=m), max_denom, beta, adaptive)


def step(
    theta: Tensor,
    g: Tensor,
    state: PaperState,
    t: int,
    hyper: Hyperparameters,
    *,
    laprop: bool,
    max_denom: Tensor | None = None,
) -> tuple[Tensor, PaperState, Tensor | None]:
    """The parameter, the state and the maximum after step ``t``, see `advance`."""
    return advance(theta, g, state, t, hyper, laprop=laprop, max_denom=max_denom)[:3]
