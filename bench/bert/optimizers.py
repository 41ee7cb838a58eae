"""The optimizers a run can choose, with the weight decay where BERT has it, and LAMB for comparison."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.recipe import param_groups_weight_decay

NAMES = ("madam", "lamadam", "adamw", "lamb", "reference")


STATE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
# How parameters are kept, and what that asks of ours; others know none but the first two.
PARAMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {},
    "bfloat16-stochastic": {"stochastic_rounding": True},
    "bfloat16-master": {"master_weights": True},
}


def build(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    beta2_range: tuple[float, float],
    max_grad_norm: float | None,
    state_dtype: str = "float32",
    params: str = "float32",
) -> torch.optim.Optimizer:
    """`max_grad_norm` is for the optimizers that clip inside their step (see `clips`), `state_dtype` and what
    `params` asks are for ours."""
    groups = param_groups_weight_decay(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2_range[1]), fused=True)
    if name == "lamb":
        return Lamb(groups, lr=lr, betas=(0.9, beta2_range[1]))
    algorithm = LaMAdam if name == "lamadam" else MAdam
    options = PARAMS[params] | {"backend": "reference" if name == "reference" else "auto"}
    options |= {"max_grad_norm": max_grad_norm, "state_dtype": STATE_DTYPES[state_dtype]}
    return algorithm(groups, lr=lr, beta2_range=beta2_range, **options)


def clips(name: str) -> bool:
    """Whether the optimizer clips by the global norm inside its step."""
    return name in ("madam", "lamadam", "reference")


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., "Large Batch Optimization for Deep Learning", arXiv 1904.00962, Algorithm 2), plainly.

        m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  r = m^ / (sqrt(v^) + eps)
        x <- x - lr phi(|x|) / |r + decay x| (r + decay x)

    with the bias-corrected m^, v^, one trust ratio a tensor and phi the identity. A ratio of 1 is taken where either
    norm is 0, and for tensors without weight decay, which is what the BERT recipes do for biases and LayerNorm.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                step, m, v = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = (m / (1 - beta1**step)).div_((v / (1 - beta2**step)).sqrt_().add_(group["eps"]))
                ratio: float | torch.Tensor = 1.0
                if decay:
                    update.add_(p, alpha=decay)
                    size, length = p.norm(), update.norm()
                    ratio = torch.where((size > 0) & (length > 0), size / length, 1.0)
                p.sub_(update.mul_(ratio), alpha=group["lr"])
        return loss
