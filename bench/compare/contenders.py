"""Who takes part, with which constants, and around which learning rate it is tuned.

Betas are (0.9, 0.999), MaxVA's bounds (0.5, 0.999), as in the paper's BERT runs; epsilons are each implementation's
own. In runs as short as these 0.999 is a long memory, so AdamW, MAdam and LaMAdam take part with 0.98 too: as further
contenders with a budget of their own, not as a second choice within one, so no optimizer is the better of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bert.optimizers import Lamb
from torch.optim import Optimizer

from maxva_kernels import LaMAdam, MAdam

DECAY = 0.1
# The same for all of Adam's kin, so that one grid shows who bears the larger rate.
ADAM_RATE = 4e-3


@dataclass(frozen=True)
class Contender:
    make: Callable[[Any], Optimizer]  # from parameter groups; the schedule's unit is a learning rate of 1
    centre: float  # of the grid of learning rates
    decay: float = DECAY
    separate: bool = True  # the step subtracts lr * decay * parameter, apart from the update


def package(name: str) -> Callable[..., Optimizer]:
    """An optimizer of `pytorch_optimizer`, which need not be installed to compare others."""

    def make(*args: Any, **kwargs: Any) -> Optimizer:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(*args, **kwargs)

    return make


PACKAGE = ("LaProp", "AdaBelief")  # those of it
LONG, SHORT = (0.9, 0.999), (0.9, 0.98)
CONTENDERS: dict[str, Contender] = {
    # torch's SGD and Adam know weight decay as a term of the gradient only, which is another thing: they have none.
    "SGD": Contender(lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9), 0.4, decay=0.0),
    "Adam": Contender(lambda groups: torch.optim.Adam(groups, lr=1.0, betas=LONG, fused=True), ADAM_RATE, decay=0.0),
    "AdamW": Contender(lambda groups: torch.optim.AdamW(groups, lr=1.0, betas=LONG, fused=True), ADAM_RATE),
    "AMSGrad": Contender(
        lambda groups: torch.optim.AdamW(groups, lr=1.0, betas=LONG, amsgrad=True, fused=True), ADAM_RATE
    ),
    "LaProp": Contender(lambda groups: package("LaProp")(groups, lr=1.0, betas=LONG), ADAM_RATE),
    # Decay is within the update that LAMB scales.
    "LAMB": Contender(lambda groups: Lamb(groups, lr=1.0, betas=LONG), 2e-2, separate=False),
    "AdaBelief": Contender(lambda groups: package("AdaBelief")(groups, lr=1.0, betas=LONG), ADAM_RATE),
    "RAdam": Contender(
        lambda groups: torch.optim.RAdam(groups, lr=1.0, betas=LONG, decoupled_weight_decay=True), ADAM_RATE
    ),
    "MAdam": Contender(lambda groups: MAdam(groups, lr=1.0, beta2_range=(0.5, 0.999)), ADAM_RATE),
    "LaMAdam": Contender(lambda groups: LaMAdam(groups, lr=1.0, beta2_range=(0.5, 0.999)), ADAM_RATE),
    # The same with a shorter memory.
    "AdamW 0.98": Contender(lambda groups: torch.optim.AdamW(groups, lr=1.0, betas=SHORT, fused=True), ADAM_RATE),
    "MAdam 0.98": Contender(lambda groups: MAdam(groups, lr=1.0, beta2_range=(0.5, 0.98)), ADAM_RATE),
    "LaMAdam 0.98": Contender(lambda groups: LaMAdam(groups, lr=1.0, beta2_range=(0.5, 0.98)), ADAM_RATE),
}
