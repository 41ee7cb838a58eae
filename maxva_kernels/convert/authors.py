"""The authors' MAdam and LaMAdam, in and out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..groups import MOMENTS
from ..optim import LaMAdam, MAdam
from ..reference import PaperState, from_paper, to_paper
from .formats import AUTHORS_LAMADAM, AUTHORS_MADAM, OURS, Group, States, convert_groups, source_of
from .state import State, decoupled, our_group, steps_of


def from_authors(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of the authors' MAdam or LaMAdam as one for `maxva_kernels.MAdam` or `LaMAdam`.

    Their `max_grad_norm` is not in it: pass it to our optimizer. Where the learning rate was changed, the direction
    that their LaMAdam's momentum stands for is kept; later gradients weigh as in Algorithm 2, not by their learning
    rates. Their LaMAdam never applies `amsgrad`, whatever its group says, so neither does the converted one.

    Args:
        state_dict: as their optimizer's `state_dict()` returned it; tensors of any floating dtype, `total_w` a tensor
            or a number, `step` an int or a one-element tensor, per parameter or per group. Where both are there, the
            group's counts if it is ahead of all its parameters'.

    Raises:
        ValueError: it is not theirs (the message names its keys), its tensors do not belong together, or it uses what
            this package does not have: nesterov, share_beta, lamb beside L2 decay, a moment_warmup that is not over.
    """
    source = source_of(state_dict, AUTHORS_MADAM, AUTHORS_LAMADAM)
    return convert_groups(state_dict, _from_madam if source is AUTHORS_MADAM else _from_lamadam)


def to_authors(state_dict: dict[str, Any], *, fairseq: bool = False) -> dict[str, Any]:
    """A state dict of our MAdam or LaMAdam as one for the authors' optimizer of that name.

    It comes back through `from_authors` up to rounding: what v~ = w (s + u^2) rounds away of s where u^2 is larger. Not
    in their form are `beta2_init`, which only a parameter without state would use, and eps_mode="paper", which comes
    back as "adam": beside sqrt(v) it is eps / sqrt(w), and theirs is eps, which is the same once w is near 1.

    Args:
        state_dict: as our optimizer's `state_dict()` returned it.
        fairseq: for the authors' fairseq code (nmt_nlu) instead of image_classification, whose LaMAdams have different
            keys. A MAdam's dict suits all their programs: it has the step per parameter and per group.

    Raises:
        ValueError: it is not ours (the message names its keys), or it uses what their code does not have: maximize,
            master weights, stochastic_rounding, AMSGrad in LaMAdam or in fairseq, a learning rate of 0 in LaMAdam,
            trust_ratio in LaMAdam, in fairseq or without decoupled weight decay.
    """
    source_of(state_dict, OURS)
    convert = _to_lamadam if state_dict["param_groups"][0]["algorithm"] == "LaMAdam" else _to_madam
    return convert_groups(state_dict, lambda where, group, states: convert(where, group, states, fairseq))


def _centred(m: Tensor, mean: Tensor, square: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m, u, s, w of m~, u~, v~, w; before the first step, where w is 0, u and s are 0. NaN stays."""
    _, u, s, _ = from_paper(PaperState(m, mean, square, w))
    return m, torch.where(w == 0, 0.0, u), torch.where(w == 0, 0.0, s), w


def _rounding(states: States) -> list[str]:
    """Options that keep small updates of parameters in 16 bits."""
    return ["stochastic_rounding", *(["master_weights"] if any("master" in state for state in states.values()) else [])]


def _refuse(where: str, group: Group, *options: str) -> None:
    for name in options:
        if group.get(name):
            raise ValueError(
                f"{where} has {name}={group[name]!r}, which the other side does not have: the run would not go on as "
                f"it was; set {name} to False in the state dict if that is what you want"
            )


def _from_madam(where: str, group: Group, states: States) -> tuple[Group, States]:
    _refuse(where, group, "nesterov", "share_beta")
    trust_ratio = bool(group.get("lamb")) and group["weight_decay"] > 0  # theirs is 1 where nothing decays
    if trust_ratio and not group.get("adamw"):
        _refuse(where, group, "lamb")  # it would decay twice
    warmup = group.get("moment_warmup", 0)  # steps before the momentum begins, from which its bias correction counts
    converted = {}
    for index, step in steps_of(where, group, states).items():
        state = State(index, states[index], "exp_avg")
        if 0 < step <= warmup:
            raise ValueError(f"{state.where} is at step {step} of moment_warmup={warmup}; convert it when that is over")
        mean = state.double("exp_avg")
        moments = _centred(state.double("exp_avg_grad"), mean, state.double("exp_avg_sq"), state.weight_sum(mean))
        max_denom = None
        if "max_exp_avg_sq" in state.entries:
            max_denom = (state.double("max_exp_avg_sq") - group["eps"]).clamp(min=0)
        converted[index] = state.ours(max(step - warmup, 0), *moments, max_denom=max_denom)
    hyper = {
        "beta1": group["beta1"],
        "beta2_range": tuple(group["beta2_range"]),
        "decoupled_weight_decay": decoupled(where, group, group.get("adamw"), "set its adamw to True or False"),
        "amsgrad": bool(group.get("amsgrad")),
        "trust_ratio": trust_ratio,
    }
    return our_group(where, group, AUTHORS_MADAM, MAdam, **hyper), converted


def _from_lamadam(where: str, group: Group, states: States) -> tuple[Group, States]:
    _refuse(where, group, "nesterov")
    momentum, lr = group["momentum"], float(group["lr"])
    converted = {}
    for index, step in steps_of(where, group, states).items():
        state = State(index, states[index], "g_est")
        mean, update = state.double("g_est"), state.double("update_est")
        correction = 1 - momentum**step
        rate = float(state.entries.get("update_lr_bc", state.entries.get("update_avg_lr", lr * correction)))
        if rate == 0 and update.any():
            raise ValueError(f"{state.where} has an update_est, but its learning rate is 0; set {where}['lr'] to it")
        m = update * (correction / rate if rate else 0.0)
        converted[index] = state.ours(step, *_centred(m, mean, state.double("g_sq_est"), state.weight_sum(mean)))
    coupled = group.get("use_adam")
    said = group.get("use_adamw", None if coupled is None else not coupled)
    hyper = {
        "beta1": momentum,
        "beta2_range": (group["beta_min"], group["beta"]),
        "decoupled_weight_decay": decoupled(where, group, said, "set its use_adamw to True or False"),
    }
    return our_group(where, group, AUTHORS_LAMADAM, LaMAdam, **hyper), converted


def _to_madam(where: str, group: Group, states: States, fairseq: bool) -> tuple[Group, States]:
    _refuse(where, group, *_rounding(states), "maximize", *(["amsgrad", "trust_ratio"] if fairseq else []))
    if not (group["decoupled_weight_decay"] and group["weight_decay"] > 0):
        _refuse(where, group, "trust_ratio")  # theirs would be 1, or decay twice
    converted: States = {}
    for index, step in steps_of(where, {}, states).items():
        state = State(index, states[index], "exp_avg")
        m, mean, square, w = _paper(state)
        tensors = {"exp_avg": mean, "exp_avg_sq": square, "exp_avg_grad": m, "total_w": w}
        if "max_denom" in state.entries:
            tensors["max_exp_avg_sq"] = state.double("max_denom") + group["eps"]
        converted[index] = {"step": step, **state.rounded(tensors)}
    new = _without_ours(group)
    new.update(beta1=group["beta1"], beta2_range=tuple(group["beta2_range"]), amsgrad=group["amsgrad"])
    new.update(
        adamw=group["decoupled_weight_decay"],
        nesterov=False,
        lamb=group.get("trust_ratio", False),
        share_beta=False,
        moment_warmup=0,
    )
    new.update(ams_warmup_steps=1, ams_reset_freq=-1, use_sgd=False, neq_thresh=0)
    if converted:
        new["step"] = max(state["step"] for state in converted.values())
    return new, converted


def _to_lamadam(where: str, group: Group, states: States, fairseq: bool) -> tuple[Group, States]:
    _refuse(where, group, *_rounding(states), "maximize", "amsgrad", "trust_ratio")
    lr, momentum, (lower, upper) = float(group["lr"]), group["beta1"], group["beta2_range"]
    if states and lr == 0:
        raise ValueError(f"{where} has lr=0, by which the authors' momentum is scaled; set it to the next step's")
    converted: States = {}
    for index, step in steps_of(where, {}, states).items():
        state = State(index, states[index], "exp_avg")
        m, mean, square, w = _paper(state)
        tensors = {"g_est": mean, "g_sq_est": square, "update_est": lr * m, "total_w": w}
        rate = lr * (1 - momentum**step)
        converted[index] = {
            "step": step,
            **state.rounded(tensors),
            "update_avg_lr" if fairseq else "update_lr_bc": rate,
        }
    new = {**_without_ours(group), "momentum": momentum, "beta": upper, "beta_min": lower}
    if fairseq:
        new.update(use_adam=not group["decoupled_weight_decay"], nesterov=False, scale=1)
    else:
        new.update(use_adamw=group["decoupled_weight_decay"], amsgrad=False)
    return new, converted


def _paper(state: State) -> PaperState:
    m, u, s, w = map(state.double, MOMENTS)
    return to_paper(m, u, s, w, torch.float64)


def _without_ours(group: Group) -> Group:
    """What a group has beside our hyperparameters, and those that both sides call the same."""
    ours = MAdam([Parameter(torch.empty(0))]).param_groups[0].keys() - {"params", "lr", "eps", "weight_decay"}
    return {name: value for name, value in group.items() if name not in ours}
