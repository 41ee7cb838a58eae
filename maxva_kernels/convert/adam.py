"""torch's Adam and AdamW, in."""

from __future__ import annotations

from typing import Any

import torch

from ..optim import MAdam
from .formats import ADAM, Group, States, convert_groups, source_of
from .state import State, decoupled, our_group, steps_of


def from_adam(
    state_dict: dict[str, Any],
    *,
    beta2_range: tuple[float, float] | None = None,
    decoupled_weight_decay: bool | None = None,
) -> dict[str, Any]:
    """A state dict of `torch.optim.Adam` or `AdamW` as one for `maxva_kernels.MAdam`.

    Adam has no mean under the weights of v; u starts as m^, with s = v^ - u^2 and w = 1 - beta2^t. Where |m^| exceeds
    sqrt(v^), as no such mean can, |u| is sqrt(v^) and s is 0, so that v = s + u^2 is v^ everywhere: with equal bounds
    the run goes on as Adam's. AMSGrad starts from Adam's present denominator, sqrt(max v~ / w); from then on ours is
    the maximum of the corrected sqrt(v), Adam's of the uncorrected one, which is the same once w is near 1.

    There is none for LaMAdam, whose momentum averages gradients that were divided by the denominators of their own
    steps: those are not in Adam's state.

    Args:
        state_dict: as Adam's `state_dict()` returned it, tensors of any floating dtype.
        beta2_range: the bounds of beta. None: from 0.5, the paper's choice, to Adam's beta2.
        decoupled_weight_decay: whether the decay is AdamW's, for checkpoints of older torch that do not say.

    Raises:
        ValueError: it is not Adam's (the message names its keys), its tensors do not belong together, it does not say
            what its weight decay is, or a hyperparameter is out of our range.
    """
    source_of(state_dict, ADAM)
    return convert_groups(
        state_dict,
        lambda where, group, states: _from_adam(where, group, states, beta2_range, decoupled_weight_decay),
    )


def _from_adam(
    where: str,
    group: Group,
    states: States,
    beta2_range: tuple[float, float] | None,
    decoupled_weight_decay: bool | None,
) -> tuple[Group, States]:
    beta1, beta2 = map(float, group["betas"])
    converted = {}
    for index, step in steps_of(where, {}, states).items():
        state = State(index, states[index], "exp_avg")
        m = state.double("exp_avg")
        weight = 1 - beta2**step
        v = state.double("exp_avg_sq") / (weight or 1.0)  # weight is 0 before the first step
        root_v = v.sqrt()
        u = torch.clamp(m / ((1 - beta1**step) or 1.0), -root_v, root_v)
        max_denom = None
        if "max_exp_avg_sq" in state.entries:
            max_denom = (state.double("max_exp_avg_sq") / (weight or 1.0)).sqrt()
        moments = (m, u, (v - u * u).clamp(min=0), torch.full_like(m, weight))
        converted[index] = state.ours(step, *moments, max_denom=max_denom)
    said = group.get("decoupled_weight_decay", decoupled_weight_decay)
    hyper = {
        "beta1": beta1,
        "beta2_range": (0.5, beta2) if beta2_range is None else tuple(beta2_range),
        "decoupled_weight_decay": decoupled(where, group, said, "pass decoupled_weight_decay=True or False"),
        "amsgrad": bool(group["amsgrad"]),
        "maximize": bool(group.get("maximize")),
    }
    return our_group(where, group, ADAM, MAdam, **hyper), converted
