"""Classifying images, as in the paper's Section 5.1 (Table 1), on a set that a CPU trains on in seconds.

    python bench/images.py [--out DIR]        minutes; the same again goes on after an interruption

The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships: 300 to train on, 400 to choose by, 1,097 to test,
drawn anew for each seed. A convolutional network with batch norm, 600 steps of 32 images, cosine decay of the learning
rate, decoupled weight decay 5e-2 of matrices (SGD: 5e-4 in the gradient). For each optimizer five learning rates, a
factor of 2 apart, are tried on seed 0, and while the best is at an edge one more beyond it, at most twice: the rate
with the smallest loss on the 400 counts. With it the network is trained on ten fresh seeds, which have other weights,
other images to train on and another order; all optimizers have the same. Printed are means and standard errors of the
accuracy on the 1,097, and of the difference from AdamW's on the same seeds.

Not controlled: betas, epsilons and decay are not tuned, and the best rate is known to a factor of 2 and from one seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import plots
import torch
from compare import paired, tuning
from compare.contenders import package
from torch import Tensor, nn

from maxva_kernels import LaMAdam, MAdam
from maxva_kernels.recipe import param_groups_weight_decay

BASELINE = "AdamW"
DECAY = 5e-2
EDGES = (300, 700)  # of what is trained on, chosen by, tested
STEPS, BATCH, RATES, FRESH = 600, 32, 5, 10


@dataclass(frozen=True)
class Contender(paired.Contender):
    decay: float = DECAY


CONTENDERS = {
    "SGD": Contender(lambda groups: torch.optim.SGD(groups, momentum=0.9), 0.1, 5e-4),
    "AdamW": Contender(torch.optim.AdamW, 4e-3),
    "LaProp": Contender(package("LaProp"), 4e-3),
    "AdaBelief": Contender(package("AdaBelief"), 4e-3),
    "MAdam": Contender(lambda groups: MAdam(groups, beta2_range=(0.5, 0.999)), 4e-3),
    "LaMAdam": Contender(lambda groups: LaMAdam(groups, beta2_range=(0.5, 0.999)), 4e-3),
}


def digits() -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8], of mean 0 and deviation 1, and what they show [n].

    Raises:
        SystemExit: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(
            'images.py: scikit-learn is not installed; in the repository: pip install ".[bench]"'
        ) from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std(), torch.tensor(found.target)


def network() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16), nn.MaxPool2d(2), *block(16, 32), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )


def train(name: str, lr: float, seed: int, steps: int, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The loss on the images to choose by, None if it is no finite number, and the accuracy on those to test."""
    torch.manual_seed(seed)
    images, labels = (each[torch.randperm(len(each), generator=torch.Generator().manual_seed(seed))] for each in data)
    model, contender = network(), CONTENDERS[name]
    groups = param_groups_weight_decay(model, contender.decay)
    optimizer = contender.make([{**group, "lr": lr} for group in groups])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(EDGES[0], (BATCH,))
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(images[slice(*EDGES)]), labels[slice(*EDGES)]).item()
        right = (model(images[EDGES[1] :]).argmax(1) == labels[EDGES[1] :]).double().mean().item()
    return {"validation": loss if math.isfinite(loss) else None, "accuracy": 100 * right}


def compare(runs: tuning.Runs, steps: int = STEPS, fresh: int = FRESH) -> dict[str, Any]:
    data = digits()

    found = paired.compare(
        runs,
        lambda name, lr, seed: train(name, lr, seed, steps, data),
        CONTENDERS,
        baseline=BASELINE,
        score="accuracy",
        rates=RATES,
        seeds=range(1, fresh + 1),
        settings={"steps": steps},
    )
    return {"steps": steps, "seeds": fresh, "optimizers": found}


def draw(record: dict[str, Any]) -> Any:
    title = f"Accuracy on test images: {record['seeds']} seeds, mean and standard error"
    return paired.figure(record["optimizers"], "accuracy", "%", title)


def main(argv: list[str] | None = None) -> None:
    args = plots.parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)  # the network is too small to share
    paired.report(args, "images", compare, draw, BASELINE, "accuracy")


if __name__ == "__main__":
    main()
